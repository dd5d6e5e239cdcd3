"""Numbers as a command line has them."""

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
