"""Checks of class names, for models and tables alike."""

from collections.abc import Sequence
from typing import Any


def is_writable(text: str) -> bool:
    """Return whether text can be written as UTF-8: pickles and JSON may contain halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def find_label_fault(num_classes: int, labels: Sequence[Any]) -> str | None:
    """Return why these are not the names of `num_classes` classes: another number, equal or empty ones; or None."""
    if len(labels) != num_classes:
        return f"{len(labels)} labels were given for {num_classes} classes: give one name per class"
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            return f"label {index} is {label!r:.80}: expected a name for every class"
        if label in seen:
            return f"two classes have the label {label!r:.80}: expected a different name for each"
        if not is_writable(label):
            return f"label {index} is {label!r:.80}: expected characters that can be written as UTF-8"
        seen.add(label)
    return None
