"""Compare probes of several seeds in one table: tasks side by side, their average, and the share of the teacher's.

    python scripts/compare_probes.py --tasks esc,words --teacher 'heads/teacher_{task}_s*.json' --output FOLDER
        --rows 'MobileNetV3=heads/mn_{task}_s*.json,DyMN=heads/dymn_{task}_s*.json'

Every row is a name and a pattern of the .json files that `run.py probe` wrote, in which `{task}` is replaced by each
task; several files for one task (seeds, folds) give a mean and a standard deviation. Averages are over the tasks of
each seed, with the files of a task in the order of their names. FOLDER gets probes.md, probes.csv and probes.png.
`run.py probe --tasks` trains the heads of several tasks, and makes the same table and picture of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import glob
from collections.abc import Iterator

from pydantic import Field

from common.errors import Faults
from common.files import write_text
from common.options import Options, parse_arguments
from common.parsing import load_json
from probing.comparison import Row, write_comparison
from scripts.sweeps.results import format_csv


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
    return Row(name, values)


def format_rows_csv(rows: list[Row]) -> str:
    """Format the value of every row, task and seed as CSV."""
    lines = [
        (row.name, task, seed, value)
        for row in rows
        for task, values in row.values.items()
        for seed, value in enumerate(values, 1)
    ]
    return format_csv(lines, ["row", "task", "seed", "value"])


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
    references = [teacher] if teacher else []
    text = write_comparison(folder, rows, references, teacher)
    write_text(folder / "probes.csv", format_rows_csv([*rows, *references]))
    print(f"{text}\n\nwritten: {folder / 'probes.md'}, probes.csv, probes.png")


if __name__ == "__main__":
    main()
