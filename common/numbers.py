"""Numbers as a command line has them."""

from typing import Any

import yaml

from common.errors import UserError


def read_numbers(text: str) -> float | list[float]:
    """Read `16`, or with commas `16,-1`; whole numbers become `int`.

    Raises:
        UserError: these are no numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is no number, nor a list of them with commas between") from None
    exact = [int(number) if number.is_integer() else number for number in numbers]
    return exact if len(exact) > 1 else exact[0]


def read_merging(text: str) -> Any:
    """Read a setting of token merging: numbers as `read_numbers` takes them, or `{r: 16, proportional: false}`.

    Raises:
        UserError: it is neither.
    """
    if not text.lstrip().startswith("{"):
        return read_numbers(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{text!r} cannot be read; wanted, say, '{{r: 8, proportional: false}}'") from None
