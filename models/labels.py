"""Names of classes, and their tables."""

import csv
import functools
from pathlib import Path

from common.class_names import find_label_fault
from common.errors import UserError

MAX_CLASSES = 100_000
AUDIOSET_LABELS = Path(__file__).resolve().parent.parent / "resources" / "class_labels_indices.csv"


def read_labels(path: str | Path) -> list[str]:
    """Read a label table in AudioSet's format: a header, then index,mid,"display name" from index 0 upwards.

    Args:
        path: the CSV file; a name that contains a comma is quoted.

    Returns:
        The display names in the order of their indices.

    Raises:
        UserError: the file is missing, is not such a table, or its indices are not 0, 1, 2, ...
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row][1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a label table: {error}") from error
    if not rows:
        raise UserError(f'{path}: no labels below the header; expected lines of index,mid,"display name"')
    for line, row in enumerate(rows):
        if len(row) != 3 or row[0] != str(line):
            raise UserError(
                f'{path}: row {line + 2} reads {",".join(row)!r}; expected {line},mid,"display name" '
                "(indices count from 0, names with commas are quoted)"
            )
    return [row[2] for row in rows]


@functools.cache
def _audioset_labels() -> tuple[str, ...]:
    return tuple(read_labels(AUDIOSET_LABELS))


def audioset_labels() -> list[str]:
    """Return the 527 display names of AudioSet in their published order."""
    return list(_audioset_labels())


def labels_for(num_classes: int, labels: list[str] | None) -> list[str]:
    """Return `labels`, or default names for `num_classes` classes: AudioSet's if 527, else their numbers.

    Raises:
        UserError: more than `MAX_CLASSES` classes, or see `common.class_names.find_label_fault`.
    """
    if num_classes > MAX_CLASSES:
        raise UserError(f"num_classes is {num_classes}; expected at most {MAX_CLASSES}")
    if labels is None:
        names = audioset_labels()
        return names if num_classes == len(names) else [str(index) for index in range(num_classes)]
    if fault := find_label_fault(num_classes, labels):
        raise UserError(fault)
    return list(labels)
