"""A table and a picture of the figures of several heads or networks on several tasks."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.columns import format_markdown_table
from common.files import write_bytes, write_text
from training.figures import COLOURS, INK, render_png, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.figure import Figure

AVERAGE = "average"
_LINES = (("dashed", "--"), ("dotted", ":"), ("dash-dotted", "-."))  # of references in the picture, at most three


@dataclass(frozen=True)
class Row:
    """The figures of one network or head, in percent.

    Attributes:
        name: in table and picture.
        values: task → one value for each seed; empty where there is none.
        intervals: task → interval of the only value.
    """

    name: str
    values: Mapping[str, Sequence[float]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def averages(self) -> list[float]:
        """The mean over the tasks for each seed; empty unless every task has as many values."""
        counts = set(map(len, self.values.values()))
        return [statistics.fmean(seed) for seed in zip(*self.values.values(), strict=True)] if len(counts) == 1 else []

    @property
    def average(self) -> float:
        """The mean over tasks and seeds."""
        return statistics.fmean(self.averages)

    def get(self, task: str) -> Sequence[float]:
        """Return the values of a task, or the averages."""
        return self.averages if task == AVERAGE else self.values[task]

    def format_cell(self, task: str) -> str:
        """Return the value of a task, with the deviation over seeds or the interval; "" without a value."""
        values = self.get(task)
        if not values:
            return ""
        cell = f"{round(statistics.fmean(values), 1) + 0.0:.1f}"  # adding 0.0 turns -0.0 into 0.0
        if len(values) > 1:
            return f"{cell} ± {statistics.stdev(values):.1f}"
        return cell + (" ({:.1f} to {:.1f})".format(*self.intervals[task]) if task in self.intervals else "")


def list_columns(rows: Sequence[Row]) -> list[str]:
    """Return the tasks of rows, and `AVERAGE` of several."""
    tasks = list(rows[0].values)
    return [*tasks, *([AVERAGE] if len(tasks) > 1 else [])]


def format_rows(rows: Sequence[Row], references: Sequence[Row] = (), teacher: Row | None = None) -> str:
    """Lay out rows as Markdown, references last.

    Args:
        rows: with values of the same tasks.
        references: others, such as baseline and chance.
        teacher: one of the references, to whose average those of the rows are compared in percent.
    """
    tasks = list_columns(rows)
    lines = [["", *tasks, *(["% of teacher"] if teacher else [])]]
    for row in [*rows, *references]:
        share = f"{100 * row.average / teacher.average:.1f}" if teacher and row is not teacher else ""
        lines.append([row.name, *(row.format_cell(task) for task in tasks), *([share] if teacher else [])])
    return format_markdown_table(lines)


def draw_rows(rows: Sequence[Row], references: Sequence[Row] = ()) -> "Figure":
    """Draw tasks side by side: a bar for each row with its interval or a point for each seed, references as lines."""
    from matplotlib.figure import Figure

    tasks = list_columns(rows)
    figure = Figure(figsize=(2.2 + 2.6 * len(tasks), 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for index, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        style(axis)
        for place, row in enumerate(rows):
            values = row.get(task)
            if not values:
                continue
            axis.barh(place, statistics.fmean(values), color=COLOURS[index % len(COLOURS)], alpha=0.75, height=0.66)
            if task in row.intervals:
                axis.plot(row.intervals[task], [place] * 2, color=INK, linewidth=1.4)
            axis.plot(values, [place] * len(values), "o", color=INK, markersize=3)
        notes = []
        for (word, line), reference in zip(_LINES[: len(references)], references, strict=True):
            if found := reference.get(task):
                axis.axvline(statistics.fmean(found), color=INK, linewidth=1.2, linestyle=line)
                notes.append(f"{word}: {reference.name} {statistics.fmean(found):.1f}")
        axis.set_title("\n".join([task, *notes]), fontsize=9, color=INK, parse_math=False)
        axis.set_xlim(0, 100)
        axis.set_xlabel("%")
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes[0].invert_yaxis()
    return figure


def write_comparison(
    folder: Path, rows: Sequence[Row], references: Sequence[Row] = (), teacher: Row | None = None
) -> str:
    """Write probes.md and probes.png to a folder, and return the table; arguments as in `format_rows`."""
    text = format_rows(rows, references, teacher)
    write_text(folder / "probes.md", text + "\n")
    write_bytes(folder / "probes.png", render_png(draw_rows(rows, references)))
    return text
