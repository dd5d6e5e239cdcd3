r"""Make a subset of lists of clips: all clips of some labels, and others as negatives.

    python scripts/make_subset.py unbalanced_train_segments.csv balanced_train_segments.csv \
        --labels "Dog" "Baby cry, infant cry" "Gunshot, gunfire" --negatives 20000 --output data/detector/train.tsv
    python scripts/make_subset.py data/mine/labels/train.tsv --labels dog --output data/mine/labels/dog.tsv

A list is AudioSet's (*_segments.csv, whose sounds are named Y<id>_<start>.wav as long as none are found), or a table
with the columns `filename` and `labels`: names, AudioSet's MIDs or numbers, joined by ";". The subset of a pack's list
is one of that pack, and needs no packing.

Written are OUTPUT, a list for scripts/wavlist_to_hdf5.py and training: `filename`, `labels` (those of --labels; the
negatives have a label of their own), all other columns, and `all_labels`, what `labels` was; OUTPUT_labels.csv, the
classes (`labels_csv` of a configuration); and OUTPUT.json, what was chosen from what. The same names, labels and seed
give the same clips, whatever their order.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import json
import os
import shlex
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pandas as pd

from audio.labels import SEPARATOR, format_label_table, list_classes, parse_labels
from audio.manifest import read_manifest, resolve
from audio.selection import Selection, select_clips
from common.errors import UserError, some
from common.files import sha256, write_text
from common.options import parse_arguments
from scripts.lists.labels import find_delimiter, label_sounds
from scripts.lists.options import ListOptions, SelectionOptions
from scripts.lists.report import describe_selection, format_lines
from scripts.lists.sound_folders import find_sounds


class SubsetOptions(SelectionOptions):
    """The options of make_subset.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("lists",)

    lists: list[str]  # of AudioSet's segments, or tables of clips
    output: str = "data/subset.tsv"  # list to write
    # with the sounds, found below it under any name that downloads have; clips without a sound are left out; null = the
    # names of the lists
    folder: str | None = None
    labels_csv: str | None = None  # index,mid,display_name, where labels are numbers; null = AudioSet's
    overwrite: bool = False  # replace other files of these names


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Choose the clips, write the list with its classes and record, and print what was chosen."""
    options = parse_arguments(SubsetOptions, __doc__, arguments)
    if not options.labels:
        raise UserError('--labels is missing: the labels to choose, each in quotes, such as --labels "Dog" "Bark"')
    tables = [_read_list(path, options) for path in options.lists]
    table = _join(tables, options)
    subject = some(options.lists, 3)
    try:
        table["labels"] = _name_numbers(table, options)
        selection = select_clips(table, options.selection, options.read_ontology(options.lists[0]))
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None
    subset = selection.take(table)
    is_packed = "hdf5path" in subset
    origins = np.repeat(options.lists, [len(each) for each in tables])[selection.rows]
    if options.folder is None:
        column = "hdf5path" if is_packed else "filename"  # in a pack, the name is a key
        subset[column] = _locate(subset[column], origins)
    written = _write(subset, selection, options)
    where = f" with a sound below {options.folder}" if options.folder else ""
    found = [f"{len(each):,} clips in {path}{where}" for each, path in zip(tables, options.lists, strict=True)]
    lines = format_lines("found", *found)
    lines += describe_selection(selection, options.find_ontology(options.lists[0]))
    if not is_packed:
        n_missing = sum(not os.path.exists(name) for name in subset["filename"])
        lines += format_lines("sounds", f"{len(subset) - n_missing:,} of the {len(subset):,} files are here")
    lines += format_lines("written", ", ".join(map(str, written)))
    if not is_packed:
        pack = ["python", "scripts/wavlist_to_hdf5.py", options.output, str(Path(options.output).parent)]
        lines += format_lines("next", shlex.join(pack))
    print("\n".join(lines))


def _read_list(path: str, options: SubsetOptions) -> pd.DataFrame:
    """Return the clips of a list; with --folder, those whose sounds are below it, with their paths."""
    if options.folder is None:
        return read_manifest(path, required=("filename", "labels"), delimiter=find_delimiter(path))
    sounds = find_sounds(options.folder)
    table = label_sounds(sounds, ListOptions.model_validate({"folder": options.folder, "table": path})).table
    table["filename"] = [sounds.path(name) for name in table["filename"]]
    return table.drop(columns="hdf5path", errors="ignore")  # names in a pack are others


def _join(tables: Sequence[pd.DataFrame], options: SubsetOptions) -> pd.DataFrame:
    """Return all rows of several lists; columns that one does not have are empty there."""
    packed = ["hdf5path" in table for table in tables]
    if any(packed) and not all(packed):
        one, other = options.lists[packed.index(True)], options.lists[packed.index(False)]
        raise UserError(f"{one} is a packed list and {other} is not; make a subset of either")
    return pd.concat(tables, ignore_index=True).fillna("")


def _name_numbers(table: pd.DataFrame, options: SubsetOptions) -> pd.Series:
    """Return the column of labels; where all of its labels are numbers and --labels are names, with names for them."""
    classes = list_classes(table["labels"].unique())
    if not (classes and all(map(str.isdigit, classes))) or all(map(str.isdigit, options.labels)):
        return table["labels"]
    from models.labels import AUDIOSET_LABELS, read_labels  # with PyTorch, which takes seconds

    names = read_labels(options.labels_csv or AUDIOSET_LABELS)
    indexes = parse_labels(table["labels"], len(names), table["filename"])
    return pd.Series([SEPARATOR.join(names[index] for index in row) for row in indexes], dtype=str)


def _locate(paths: pd.Series, lists: np.ndarray) -> pd.Series:
    """Return paths for a list in another folder: those that exist beside their own list, below its folder."""
    places = {pair: resolve(*pair) for pair in set(zip(paths, lists, strict=True))}
    found = [places[pair] for pair in zip(paths, lists, strict=True)]
    exists = {place: os.path.exists(place) for place in set(found)}  # not Path.exists, which raises for long names
    return pd.Series([str(new) if exists[new] else old for new, old in zip(found, paths, strict=True)], dtype=str)


def _write(subset: pd.DataFrame, selection: Selection, options: SubsetOptions) -> list[Path]:
    """Write the list, its classes and the record, unless other files of these names are there; return their paths."""
    target = Path(options.output)
    classes = target.with_name(f"{target.stem}_labels.csv")
    record = {
        "made_by": "scripts/make_subset.py",
        "lists": {path: sha256(Path(path)) for path in options.lists},
        "options": options.model_dump(exclude={"lists", "output", "overwrite"}),
        "classes": selection.classes,
        "clips": selection.n_chosen,
        "clips_in_lists": selection.n_found,
        "clips_by_kind": selection.n_by_kind,
    }
    texts = {
        target: subset.to_csv(sep="\t", index=False, lineterminator="\n"),
        classes: format_label_table(selection.classes),
        target.with_suffix(".json"): json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    if len(texts) < 3 or target.is_dir():
        raise UserError(f"--output {options.output}: expected the name of a list to write, such as data/subset.tsv")
    differing = [str(path) for path, text in texts.items() if path.exists() and path.read_bytes() != text.encode()]
    if differing and not options.overwrite:
        raise UserError(f"{some(differing)}: exists with other content; choose another --output, or add --overwrite")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


if __name__ == "__main__":
    main()
