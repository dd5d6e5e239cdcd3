"""Labels of clips: a column of classes joined by ";", its classes, and their indexes.

A class is a name; AudioSet's identifiers (/m/09x0r) and display names ("Speech") stand for each other.
"""

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from audio.audioset import display_name, other_name
from common.errors import Faults, UserError, did_you_mean, some

SEPARATOR = ";"
_MAX_LISTED = 20


def split_labels(cell: str) -> list[str]:
    """Return the labels of a cell, without spaces around them."""
    return [label for part in cell.split(SEPARATOR) if (label := part.strip())]


def count_classes(cells: Iterable[str]) -> Counter[str]:
    """Return how many of the cells have each class; AudioSet's identifiers count as their display names."""
    counts: Counter[str] = Counter()
    for cell, n in Counter(cells).items():
        for name in {display_name(label) for label in split_labels(cell)}:
            counts[name] += n
    return counts


def list_classes(cells: Iterable[str]) -> list[str]:
    """Return the classes that occur: in alphabetical order, or by size where all are numbers.

    AudioSet's identifiers are replaced by their display names.
    """
    names = {display_name(label) for cell in set(cells) for label in split_labels(cell)}
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def format_label_table(classes: Iterable[str]) -> str:
    """Lay out classes as a table in AudioSet's format: index,mid,display_name; no MID for other classes."""
    table = io.StringIO("index,mid,display_name\n")
    table.seek(0, io.SEEK_END)
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([index, other_name(name) or "", name] for index, name in enumerate(classes))
    return table.getvalue()


def fold_spelling(label: str) -> str:
    """Return what labels that look alike have in common: case, spaces, "_", "-" and Unicode form do not count."""
    folded = unicodedata.normalize("NFKC", label).casefold()
    return "".join(character for character in folded if not character.isspace() and character not in "_-")


def find_lookalikes(names: Iterable[str]) -> list[list[str]]:
    """Return each set of two or more labels that differ only by what `fold_spelling` takes away, sorted."""
    by_spelling: dict[str, list[str]] = {}
    for name in names:
        by_spelling.setdefault(fold_spelling(name), []).append(name)
    return [sorted(labels) for labels in by_spelling.values() if len(labels) > 1]


def describe_lookalikes(counts: Mapping[str, int]) -> str:
    """Return a warning on classes that are probably the same, such as "Dog" and "dog"; "" where there are none.

    They remain different classes: a list is not changed.
    """
    pairs = [
        " and ".join(f"{_show(name)} ({counts[name]} clips)" for name in labels) for labels in find_lookalikes(counts)
    ]
    if not pairs:
        return ""
    return (
        f"classes that differ only by case, spaces, '_', '-' or Unicode form are different classes: {some(pairs)}; "
        "write them alike in the list if they are one"
    )


def _show(label: str) -> str:
    """Return a label in quotes; one that can be composed otherwise with escapes, since both look the same."""
    return repr(label) if all(unicodedata.normalize(form, label) == label for form in ("NFC", "NFD")) else ascii(label)


def parse_labels(
    column: pd.Series, classes: int | Sequence[str], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Turn a column of classes joined by ";" into arrays of class indexes.

    Args:
        column: strings such as "74;75", or "Dog;Bark" (or "/m/0bt9lr;/m/05tny_") where the classes have names.
        classes: their number, or their names.
        names: the clips' names, for messages.

    Returns:
        For each row the indexes, int64, ascending, each once.

    Raises:
        UserError: every entry that is neither a whole number in range nor a class's name, with its first row, or rows
            without one; in one line where no row is right.
    """
    num_classes = classes if isinstance(classes, int) else len(classes)
    index_of = {} if isinstance(classes, int) else {name: index for index, name in enumerate(classes)}
    # Where classes are named by numbers ("3", "5"), a number is a name and no index.
    numbers_are_names = any(_index(name, 10**9) is not None for name in index_of)
    if numbers_are_names:
        expected = f"one of the {num_classes} classes, which are named {some(index_of)}"
    else:
        expected = f"whole numbers from 0 to {num_classes - 1}" + (" or names of classes" if index_of else "")
    n_indices = 0 if numbers_are_names else num_classes
    parsed: dict[str, np.ndarray] = {}  # rows share few distinct values
    faulty: dict[str, tuple[str, list[int]]] = {}  # value → what is wrong with it, and in which rows
    labels = []
    for row, value in enumerate(column.astype(str)):
        if value in faulty:
            faulty[value][1].append(row)
            continue
        if value not in parsed:
            parts = split_labels(value)
            indexes = [_find(part, index_of, n_indices) for part in parts]
            wrong = [part for part, index in zip(parts, indexes, strict=True) if index is None]
            if wrong or not parts:
                what = "no label" if not parts else f"{', '.join(map(repr, wrong))} is no class"
                faulty[value] = (what + _hint(wrong, index_of), [row])
                continue
            parsed[value] = np.unique(np.array(indexes, dtype=np.int64))
        labels.append(parsed[value])
    _raise_if_faulty(f"the column {column.name!r}", faulty, len(column), expected, names)
    return labels


def _raise_if_faulty(
    subject: str,
    faulty: Mapping[str, tuple[str, Sequence[int]]],
    n_rows: int,
    expected: str,
    names: Sequence[str] | None,
) -> None:
    if len(faulty) > 1 and sum(len(rows) for _, rows in faulty.values()) == n_rows:  # another set of classes
        found = some(list_classes(faulty))
        raise UserError(f"{subject}: none of the {n_rows} rows has a known class: found {found}; expected {expected}")
    faults = Faults(subject, _MAX_LISTED)
    for what, rows in faulty.values():
        clip = f" ({names[rows[0]]})" if names is not None else ""
        more = f", and so in {len(rows) - 1} rows more" if len(rows) > 1 else ""
        faults.add(f"row {rows[0] + 1}{clip}: {what}{more}; expected {expected}")
    faults.raise_if_any()


def _find(label: str, index_of: Mapping[str, int], n_indices: int) -> int | None:
    if (index := index_of.get(label)) is not None:
        return index
    if index_of and (other := other_name(label)) in index_of and other is not None:
        return index_of[other]
    return _index(label, n_indices)


def _index(text: str, num_classes: int) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) < num_classes else None


def _hint(wrong: list[str], index_of: Mapping[str, int]) -> str:
    return did_you_mean(wrong[0], index_of) if wrong else ""
