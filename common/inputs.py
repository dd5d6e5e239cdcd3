"""Input that may come from a stranger: files that can be read to their end, bounded JSON, names of classes."""

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

MAX_BYTES = 64 << 20


def check_regular_file(path: str | Path) -> None:
    """Check that a path is a file that can be read to its end: no folder, device or pipe.

    Raises:
        UserError: it is something else, or may not be read.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UserError(f"{path} is {kind}; expected a file")


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UserError: it cannot be read, is larger than `MAX_BYTES`, or contains something else.
    """
    check_regular_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES >> 20} MB; expected a JSON object")
    return parse_json_object(content, str(path))


def parse_json_object(text: str | bytes, origin: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: the JSON.
        origin: where it is from, for messages.

    Raises:
        UserError: it is no JSON, or no object.
    """
    value = parse_json(text, origin)
    if not isinstance(value, dict):
        raise UserError(f"{origin}: found a JSON {type(value).__name__}; expected an object, {{NAME: VALUE}}")
    return value


def parse_json(text: str | bytes, origin: str) -> Any:
    """Parse JSON of any kind; arguments and errors as in `parse_json_object`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{origin}: its JSON is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits, and text that is not UTF-8
        raise UserError(f"{origin}: is no JSON ({error})") from error


def is_writable(text: str) -> bool:
    """Whether text can be written as UTF-8: pickles and JSON may contain halves of characters."""
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
