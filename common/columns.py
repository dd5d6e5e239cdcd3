"""Tables as text: aligned columns, and Markdown."""

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], alignment: str = "<") -> str:
    """Lay out rows of cells in columns that are two spaces apart.

    Args:
        rows: of cells, as many in each.
        alignment: "<" (left) or ">" (right) for each column; the last one applies to all further columns.

    Returns:
        One line a row, without spaces at its end.
    """
    return "\n".join("  ".join(cells).rstrip() for cells in _pad_cells(rows, alignment))


def format_markdown_table(rows: Sequence[Sequence[str]], alignment: str = "<>") -> str:
    """Lay out rows of cells as a Markdown table whose columns are aligned in the source as well.

    Args:
        rows: of cells, as many in each; the first is the header.
        alignment: as in `align_columns`.
    """
    rules = ["---:" if side == ">" else "---" for side in _spread_alignment(alignment, len(rows[0]))]
    padded = _pad_cells([rows[0], rules, *rows[1:]], alignment)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _pad_cells(rows: Sequence[Sequence[str]], alignment: str) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = _spread_alignment(alignment, len(widths))
    return [[f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True)] for row in rows]


def _spread_alignment(alignment: str, n_columns: int) -> str:
    return alignment.ljust(n_columns, alignment[-1])
