"""Numbers among the settings of objectives, from YAML and command lines."""

import math
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


def read_weights(name: str, value: Any) -> tuple[float, ...] | None:
    """Read weights of which at least one is above 0: numbers in a list, or text such as "1,2"; None if there are none.

    Raises:
        UserError: not such a list.
    """
    expected = "a number of at least 0 for each teacher, [1, 2] for example"
    if value is None or value == []:
        return None
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        raise UserError(f"{name} is {value!r}; expected {expected}")
    weights = tuple(read_number(name, each, lambda weight: 0 <= weight < math.inf, expected) for each in values)
    if not any(weights):
        raise UserError(f"{name} is {value!r}, all zero, so nothing would be learned; give at least one above 0")
    return weights


def read_label_share(value: Any) -> float:
    """Read `lambda`, the share of the labels in a loss."""
    return read_number("lambda", value, lambda share: 0 <= share <= 1, "the share of the labels, from 0 to 1")
