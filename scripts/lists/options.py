"""The options of make_lists.py: read from text, checked before any folder is searched, every fault at once."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import Faults, UserError, did_you_mean
from scripts.lists.labels import LabelOptions
from scripts.lists.splits import SplitOptions

DEFAULT_SHARE = "0.2"


@dataclass(frozen=True)
class ListOptions:
    """What make_lists.py was given.

    Attributes:
        folder: of sounds.
        output: folder for the lists.
        labels: where labels come from.
        split: how clips are shared out.
        split_given: the options of `split` that were given, with their dashes.
        split_column: a column, "none", or "" for a usual one.
        group: what is not split, see `scripts.lists.groups.find_groups`.
        seed: of the split.
        compare_content: look for identical files.
        overwrite: replace lists that the command did not make.
    """

    folder: str
    output: str
    labels: LabelOptions
    split: SplitOptions
    split_given: list[str]
    split_column: str
    group: str
    seed: int
    compare_content: bool
    overwrite: bool


def read_options(
    folder: str | None, more: Iterable[str], given: dict[str, str], unknown: Iterable[str], known: Iterable[str]
) -> ListOptions:
    """Check a command line.

    Args:
        folder: the first word.
        more: further words, which are a fault.
        given: option → text, for the options given.
        unknown: names of options that there are not.
        known: names of all options.

    Raises:
        UserError: with every fault.
    """
    faults = Faults("the command")
    for name in unknown:
        faults.add(f"unknown option --{name}{did_you_mean(name, known)}; --help lists all")
    extra = list(more)
    if extra:
        faults.add(
            f"found the folders {folder!r} and {extra[0]!r}; wanted one (a name with a space in it needs quotes)"
        )
    if not folder:
        faults.add("no folder is given; wanted: python scripts/make_lists.py FOLDER")
    split_given = [f"--{name}" for name in ("valid", "test", "folds") if name in given]
    options = ListOptions(
        folder or "",
        given.get("output", "data"),
        LabelOptions(
            **{name: given[name] for name in LabelOptions.__dataclass_fields__ if name in given},
        ),
        _read_split(given, faults),
        split_given,
        given.get("split_column", ""),
        given.get("group", ""),
        _read_whole("seed", given.get("seed", "42"), 0, faults),
        _read_flag("compare_content", given.get("compare_content", "true"), faults),
        _read_flag("overwrite", given.get("overwrite", "false"), faults),
    )
    if len(faults.sentences) == 1:
        raise UserError(faults.sentences[0])
    faults.raise_if_any()
    return options


def _read_split(given: dict[str, str], faults: Faults) -> SplitOptions:
    shares = {}
    for name in ("valid", "test"):
        text = given.get(name, DEFAULT_SHARE)
        try:
            shares[name] = float(text)
        except ValueError:
            shares[name] = -1.0
        if not 0 <= shares[name] < 1:  # NaN is not either
            faults.add(
                f"--{name} is {text!r}; wanted a share of the clips from 0 (no such list) to below 1, such as 0.2"
            )
            shares[name] = 0.0
    folds = _read_whole("folds", given["folds"], 2, faults) if "folds" in given else 0
    if not folds and sum(shares.values()) >= 1:
        faults.add(
            f"--valid {shares['valid']:g} and --test {shares['test']:g} leave nothing to train on; wanted a sum below 1"
        )
    for name, share in shares.items():
        if folds and share and name in given:
            faults.add(
                f"--{name} {given[name]} cannot stand beside --folds {folds}, whose first fold is test and "
                f"second fold valid; leave it out, or give --{name} 0 for no such list"
            )
    return SplitOptions(shares["valid"], shares["test"], folds)


def _read_whole(name: str, text: str, least: int, faults: Faults) -> int:
    if text.isascii() and text.isdecimal() and int(text) >= least:
        return int(text)
    faults.add(f"--{name} is {text!r}; wanted a whole number, {least} or more")
    return least


def _read_flag(name: str, text: str, faults: Faults) -> bool:
    if text.lower() not in ("true", "false"):
        faults.add(f"--{name} is {text!r}; wanted true or false")
    return text.lower() == "true"
