"""Numbers among the settings of objectives, from YAML and command lines."""

from collections.abc import Callable
from typing import Any

from common.errors import UserError


def read_number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    """Read a number.

    Args:
        name: of the setting.
        value: as given; YAML reads 1e-1 as text.
        fits: whether a number is in range.
        expected: description of the range, for the message.

    Raises:
        UserError: not a number, or out of range.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}, not a number; expected {expected}") from None
    if not fits(number):
        raise UserError(f"{name} is {value!r}; expected {expected}")
    return number


def read_label_share(value: Any) -> float:
    """Read `lambda`, the share of the labels in a loss."""
    return read_number("lambda", value, lambda share: 0 <= share <= 1, "the share of the labels, from 0 to 1")
