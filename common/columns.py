"""Text in columns, for what commands print."""

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], first: str = "<", others: str = "<", between: str = "  ") -> list[str]:
    """Pad cells to the width of their columns.

    Args:
        rows: of cells, as many in each.
        first: side of the first column's text, "<" or ">".
        others: side of the text in all other columns; where it is "<", lines end without spaces.
        between: the columns.

    Returns:
        A line a row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [first, *others * (len(widths) - 1)]
    lines = [between.join(f"{c:{side}{n}}" for c, side, n in zip(row, sides, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines] if others == "<" else lines
