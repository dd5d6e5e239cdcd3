"""Compare probes in one table: tasks side by side, their average, and the share of the teacher's average.

    python scripts/compare_probes.py --tasks esc,words --teacher 'heads/teacher_{task}_s*.json' --output FOLDER
        --rows 'MobileNetV3=heads/mn_{task}_s*.json,DyMN=heads/dymn_{task}_s*.json'

Every row is a name and a pattern of the .json files that `run.py probe` wrote, in which `{task}` is replaced by each
task; several files for one task (seeds, folds) give a mean and a standard deviation. Averages are over the tasks of
each seed, with the files of a task in the order of their names. FOLDER gets probes.md, probes.csv and probes.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import glob
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from common.columns import format_markdown_table
from common.errors import Faults
from common.files import write_bytes, write_text
from common.options import Options, parse_arguments
from common.parsing import load_json
from scripts.sweeps.results import format_csv
from scripts.sweeps.token_merging import Spread
from training.figures import COLOURS, INK, render_png, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """The figures of one network's probes, in percent.

    Attributes:
        name: as given.
        values: task → one value for each seed; "average" → means over the tasks.
    """

    name: str
    values: dict[str, list[float]]

    @property
    def average(self) -> float:
        """The mean over tasks and seeds."""
        return statistics.fmean(self.values["average"])


def read_row(name: str, pattern: str, tasks: list[str], faults: Faults) -> Row:
    """Read the figures of a row; missing and invalid files are added to `faults`."""
    values: dict[str, list[float]] = {}
    for task in tasks:
        paths = sorted(glob.glob(pattern.replace("{task}", task)))
        if not paths:
            faults.add(f"{name}: no file matches {pattern.replace('{task}', task)}")
        values[task] = []
        for path in paths:
            try:
                values[task].append(100 * float(load_json(path)["value"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                faults.add(f"{path}: not a file that `run.py probe` wrote beside a head ({error!r})")
    counts = [f"{len(found)} of {task}" for task, found in values.items()]
    if len({len(found) for found in values.values()}) > 1:
        faults.add(f"{name}: the tasks have different numbers of files: {', '.join(counts)}; expected as many of each")
    else:
        values["average"] = [statistics.fmean(seed) for seed in zip(*values.values(), strict=True)]
    return Row(name, values)


def format_rows(rows: list[Row], teacher: Row | None) -> str:
    """Lay out the rows as Markdown, the teacher's last; % of teacher compares the averages."""
    lines = [["", *rows[0].values, *(["% of teacher"] if teacher else [])]]
    for row in [*rows, *([teacher] if teacher else [])]:
        line = [row.name, *(f"{Spread.of(values):.1f}" for values in row.values.values())]
        if teacher:
            line.append("" if row is teacher else f"{100 * row.average / teacher.average:.1f}")
        lines.append(line)
    return format_markdown_table(lines)


def format_rows_csv(rows: list[Row]) -> str:
    """Format the value of every row, task and seed as CSV."""
    lines = [
        (row.name, task, seed, value)
        for row in rows
        for task, values in row.values.items()
        if task != "average"
        for seed, value in enumerate(values, 1)
    ]
    return format_csv(lines, ["row", "task", "seed", "value"])


def draw_rows(rows: list[Row], teacher: Row | None) -> "Figure":
    """Draw the tasks side by side, one bar for each row, a point for each seed, and the teacher as a line."""
    from matplotlib.figure import Figure

    tasks = list(rows[0].values)
    figure = Figure(figsize=(2.2 + 2.6 * len(tasks), 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for index, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        style(axis)
        for place, row in enumerate(rows):
            values = row.values[task]
            axis.barh(place, statistics.fmean(values), color=colour, alpha=0.75, height=0.66)
            axis.plot(values, [place] * len(values), "o", color=INK, markersize=3)
        if teacher:
            value = statistics.fmean(teacher.values[task])
            axis.axvline(value, color=INK, linewidth=1.2, linestyle="--")
            task += f"   (dashed: {teacher.name}, {value:.1f})"
        axis.set_title(task, fontsize=9, color=INK)
        axis.set_xlim(0, 100)
        axis.set_xlabel("%")
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[0].invert_yaxis()
    return figure


class CompareOptions(Options):
    """The options of compare_probes.py."""

    rows: list[str] = Field(min_length=1)  # NAME=PATTERN, several with commas between, see above
    tasks: list[str] = Field(min_length=1)  # values of `{task}`, several with commas between
    teacher: str | None = None  # pattern of the teacher's own probes; NAME=PATTERN to give it a name
    output: str = "heads/compared"  # folder to write into

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each row without a name."""
        for row in self.rows:
            if "=" not in row:
                yield f"--rows {row!r}: expected NAME=PATTERN"


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Print the table of some probes, and write it as Markdown, CSV and a picture."""
    options = parse_arguments(CompareOptions, __doc__, arguments)
    faults = Faults("the comparison")
    rows = []
    for row in options.rows:
        name, _, pattern = row.partition("=")
        rows.append(read_row(name, pattern, options.tasks, faults))
    teacher = None
    if options.teacher:
        name, equals, pattern = options.teacher.partition("=")
        teacher = read_row(name if equals else "teacher", pattern or name, options.tasks, faults)
    faults.raise_if_any()
    folder = Path(options.output)
    text = format_rows(rows, teacher)
    write_text(folder / "probes.md", text + "\n")
    write_text(folder / "probes.csv", format_rows_csv([*rows, *([teacher] if teacher else [])]))
    write_bytes(folder / "probes.png", render_png(draw_rows(rows, teacher)))
    print(f"{text}\n\nwritten: {folder / 'probes.md'}, probes.csv, probes.png")


if __name__ == "__main__":
    main()
