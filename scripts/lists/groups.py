"""Groups of clips that must stay in one list: by column, by folder, or by identical files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from audio.manifest import GROUP_COLUMNS
from common.errors import UserError, did_you_mean, some

FOLDER = "folder"


@dataclass
class Groups:
    """The groups of N clips.

    Attributes:
        columns: that define the groups; none if every clip is a group of its own.
        by_column: groups by the columns alone, int64 (N,).
        joined: groups with identical files joined, int64 (N,).
        identical: rows of each set of identical files.
        notes: for the report.
    """

    columns: list[str]
    by_column: np.ndarray
    joined: np.ndarray
    identical: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_groups(table: pd.DataFrame, given: str, identical: Sequence[Sequence[str]] = ()) -> Groups:
    """Find the groups that must not be split; for groups by folder, a column `folder` is added to the table.

    Args:
        table: of clips, with the column `filename`.
        given: a column, "folder", several with commas, "none", or "" for a column of `GROUP_COLUMNS`.
        identical: names of files with the same bytes, each set of two or more.

    Raises:
        UserError: the table has no such column.
    """
    columns = _choose_columns(table, given)
    if FOLDER in columns and FOLDER not in table:
        table[FOLDER] = pd.Series([name.rpartition("/")[0] for name in table["filename"]], dtype=str)
    by_column = join_groups(len(table), [table[column].tolist() for column in columns])
    notes = []
    if columns and not given:
        notes.append(f"chosen by the name {columns[0]!r}; --group none for no groups")
    row_of = {name: row for row, name in enumerate(table["filename"])} if identical else {}
    sets = [rows for names in identical if len(rows := [row_of[name] for name in names if name in row_of]) > 1]
    if sets:
        example = some((table["filename"][row] for row in sets[0]), 2)
        notes.append(
            f"files with the same bytes as another: {sum(map(len, sets))}, in {len(sets)} sets that are not split "
            f"({example})"
        )
        notes += _note_label_conflicts(table, sets)
    joined = join_groups(len(table), [table[column].tolist() for column in columns], sets) if sets else by_column
    return Groups(columns, by_column, joined, sets, notes)


def _choose_columns(table: pd.DataFrame, given: str) -> list[str]:
    columns = [str(column) for column in table.columns if column not in ("filename", "labels")]
    if given == "none":
        return []
    if not given:
        return [name for name in GROUP_COLUMNS if name in columns][:1]
    chosen = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in chosen:
        if name not in (*columns, FOLDER):
            raise UserError(
                f"--group {name!r} is no column of the pattern or the table{did_you_mean(name, [*columns, FOLDER])}; "
                f"expected {some([*map(repr, columns), repr(FOLDER)], 20)} (the deepest folder)"
            )
    return chosen


def _note_label_conflicts(table: pd.DataFrame, sets: list[list[int]]) -> list[str]:
    if "labels" not in table:
        return []
    labels = table["labels"].tolist()
    differing = [rows for rows in sets if len({labels[row] for row in rows}) > 1]
    if not differing:
        return []
    shown = [f"{table['filename'][row]} ({labels[row]})" for row in differing[0]]
    return [f"identical files with different labels: {len(differing)} sets ({some(shown, 2)})"]


def join_groups(n_clips: int, keys: Iterable[Sequence[str]], sets: Iterable[Sequence[int]] = ()) -> np.ndarray:
    """Number the connected components of clips that must not be split.

    Args:
        n_clips: N.
        keys: columns of N strings: clips with the same string in a column belong together; "" is no group.
        sets: rows of further clips that belong together.

    Returns:
        The group of each clip, int64 (N,): 0 to G - 1, numbered in the order of their first clips.
    """
    pairs: list[tuple[int, int]] = [(same[0], i) for same in sets for i in same[1:]]
    for column in keys:
        first: dict[str, int] = {}
        pairs += [(first.setdefault(key, i), i) for i, key in enumerate(column) if key]
    one, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    edges = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(n_clips, n_clips))
    component = connected_components(edges, directed=False)[1]
    # Numbers of components are not documented to follow the order of their first clips.
    first_rows, group = np.unique(component, return_index=True, return_inverse=True)[1:]
    return np.argsort(np.argsort(first_rows))[group]
