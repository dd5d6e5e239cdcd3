"""Lists and folds of clips: train, valid and test, published in a table or drawn by stratification."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from common.errors import UserError, did_you_mean, some
from scripts.lists.options import ListOptions
from scripts.lists.stratification import stratify

TRAIN, VALID, TEST = LISTS = ("train", "valid", "test")
# Names of the three lists in published tables, in lower case.
LIST_WORDS = {
    word: name
    for name, words in {
        TRAIN: ("train", "training", "tr", "train_set", "trainset"),
        VALID: ("valid", "validation", "validate", "val", "dev", "development", "cv"),
        TEST: ("test", "testing", "eval", "evaluation", "evaluate", "test_set", "testset"),
    }.items()
    for word in words
}
SPLIT_COLUMNS = ("split", "fold", "folds")
_MAX_FOLDS = 100


@dataclass
class Split:
    """The list of each of N clips.

    Attributes:
        lists: "train", "valid" or "test", N.
        folds: names of folds, N, or None.
        published: whether they are from a column of the table.
        notes: for the report.
    """

    lists: list[str]
    folds: list[str] | None = None
    published: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The lists that have clips, in the order train, valid, test."""
        return [name for name in LISTS if name in set(self.lists)]


def choose_split_column(table: pd.DataFrame, given: str = "") -> str:
    """Return the column of published lists or folds: the one given, else the first usual one; "" if there is none.

    Raises:
        UserError: the table has no such column.
    """
    columns = [str(column) for column in table.columns if column not in ("filename", "labels")]
    if given in columns or given == "none":
        return "" if given == "none" else given
    if given:
        raise UserError(
            f"--split_column {given!r} is no column{did_you_mean(given, columns)}; found "
            f"{some(map(repr, columns), 20) or 'none beside filename and labels'}"
        )
    usual = {column.lower(): column for column in reversed(columns)}
    return next((usual[name] for name in SPLIT_COLUMNS if name in usual), "")


def read_published_lists(values: pd.Series) -> dict[str, str] | None:
    """Map the names of lists in a table to train, valid and test.

    Args:
        values: the table's column.

    Returns:
        Each value that is not "" → train, valid or test; None if the values are folds.

    Raises:
        UserError: the values are neither lists nor folds.
    """
    distinct = sorted(set(values) - {""})
    read = {value: LIST_WORDS[word] for value in distinct if (word := value.strip().lower()) in LIST_WORDS}
    if distinct and len(read) == len(distinct):
        if TRAIN not in read.values():  # "dev" and "eval": the development set is the training set
            read = {value: TRAIN if name == VALID else name for value, name in read.items()}
        return read
    if not read and 2 <= len(distinct) <= _MAX_FOLDS:
        return None
    raise UserError(
        f"the column {values.name!r} holds {some(map(repr, distinct)) or 'nothing'}; expected lists (train, valid, "
        f"test) or folds (2 to {_MAX_FOLDS} different values); --split_column none makes new lists"
    )


def keep_published(
    values: pd.Series, labels: Sequence[str], groups: np.ndarray, valid: float, order: np.ndarray
) -> Split:
    """Return the split of a column; if it has train and test clips only, valid clips are drawn from train.

    Args:
        values: the column, N strings, none of them "".
        labels: of each clip, see `stratify`.
        groups: of each clip, int (N,).
        valid: share of valid in the train clips; 0 for none.
        order: of each clip, see `audio.selection.compute_order`.
    """
    list_names = read_published_lists(values)
    column = str(values.name)
    if list_names is None:
        folds = [str(value) for value in values]
        split = _split_by_folds(folds, valid > 0, True)
        split.notes.insert(0, f"the {len(set(folds))} folds of the column {column!r} are kept")
        split.published = True
        return split
    lists = [list_names[value] for value in values]
    mapping = ", ".join(value if value == name else f"{value} as {name}" for value, name in list_names.items())
    split = Split(lists, published=True, notes=[f"those of the column {column!r} are kept ({mapping})"])
    if VALID not in lists and TRAIN in lists and valid > 0:
        rows = [row for row, name in enumerate(lists) if name == TRAIN]
        train_groups = np.unique(groups[rows], return_inverse=True)[1]
        shares = [1 - valid, valid]
        drawn = stratify([labels[row] for row in rows], train_groups, shares, order[rows], first_has_all=True)
        for row in np.array(rows)[drawn == 1].tolist():
            lists[row] = VALID
        split.notes.append(
            f"the column has no valid clips: {100 * valid:g} % of its train clips are drawn (--valid 0 for none)"
        )
    return split


def draw_split(labels: Sequence[str], groups: np.ndarray, options: ListOptions, order: np.ndarray) -> Split:
    """Draw lists or folds by stratification.

    Args:
        labels: of each clip, see `stratify`.
        groups: of each clip, int (N,).
        options: the shares, or the number of folds.
        order: of each clip, see `audio.selection.compute_order`.

    Raises:
        UserError: a list or a fold is empty.
    """
    n_groups = int(groups.max()) + 1
    if options.folds:
        n_folds = options.folds
        drawn = stratify(labels, groups, [1 / n_folds] * n_folds, order)
        if len(set(drawn.tolist())) < n_folds:
            raise UserError(f"{_describe_size(n_groups, len(labels))} cannot fill {n_folds} folds; use fewer --folds")
        return _split_by_folds([str(1 + fold) for fold in drawn.tolist()], options.valid > 0, options.test > 0)
    shares = {TRAIN: 1 - options.valid - options.test, VALID: options.valid, TEST: options.test}
    names = [name for name, share in shares.items() if share > 0]
    drawn = stratify(labels, groups, [shares[name] for name in names], order, first_has_all=True)
    split = Split([names[number] for number in drawn])
    empty = [name for name in names if name not in split.names]
    if empty:
        raise UserError(
            f"{_describe_size(n_groups, len(labels))} leave {' and '.join(empty)} without a clip: a label with one "
            "group is in train; use more groups for each label, or omit a list (--valid 0, --test 0)"
        )
    return split


def _describe_size(n_groups: int, n_clips: int) -> str:
    return f"{n_clips} clips" if n_groups == n_clips else f"{n_clips} clips in {n_groups} groups that are not split"


def _split_by_folds(folds: list[str], with_valid: bool, with_test: bool) -> Split:
    """Make lists of folds: the first is test, the second valid (if there are three or more), all others train."""
    ordered = sorted(set(folds), key=_make_sort_key)
    list_of = dict.fromkeys(ordered, TRAIN)
    if with_test:
        list_of[ordered[0]] = TEST
    if with_valid and len(ordered) > 2:
        list_of[ordered[1 if with_test else 0]] = VALID
    named = ", ".join(f"fold {fold} is {name}" for fold, name in list_of.items() if name != TRAIN)
    return Split(
        [list_of[fold] for fold in folds], folds, notes=[f"{named or 'all folds are train'}, the others train"]
    )


def _make_sort_key(fold: str) -> list[str | int]:
    """Return a sort key by which "fold2" precedes "fold10": text and numbers in alternation."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", fold)]


def count_split_groups(groups: np.ndarray, lists: Sequence[str]) -> int:
    """Return the number of groups with clips in more than one list (or fold)."""
    pairs = pd.DataFrame({"group": groups, "list": list(lists)}).drop_duplicates()
    return int((pairs["group"].value_counts() > 1).sum())
