"""Run the tests that docs/reliability.md names in their long form, and write their figures to that page.

    python scripts/reliability.py [PYTEST_ARGUMENTS]

With files among the arguments, only these are run. Tests report what they tried with `record_property`; a figure counts
tests that have passed. Needs the packages of requirements-dev.txt, and takes about two hours on two cores. The exit
status is that of pytest.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import argparse
import datetime
import platform
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter

from common.columns import format_markdown_table
from common.files import write_text
from common.temporary import temporary_folder

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- figures -->", "<!-- end of figures -->"


def count_tried(report: Path) -> tuple[Counter[str], int, int]:
    """Read a JUnit report; return what was tried how often, and the numbers of tests that passed and failed."""
    tried: Counter[str] = Counter()
    n_passed = n_failed = 0
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            n_failed += 1
        elif case.find("skipped") is None:
            n_passed += 1
            for entry in case.iter("property"):
                if (value := str(entry.get("value"))).isdecimal():  # Hypothesis adds texts
                    tried[str(entry.get("name"))] += int(value)
    return tried, n_passed, n_failed


def format_figures(tried: Counter[str], n_passed: int, n_failed: int) -> str:
    """Lay out the figures as a table, with the place and date."""
    rows = [["tried", "times"], *([name, f"{n:,}"] for name, n in sorted(tried.items()))]
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    tests = f"{n_passed:,} tests passed, {n_failed} failed"
    return f"{datetime.date.today()}, {where}: {tests}.\n\n{format_markdown_table(rows)}\n"


@print_user_errors
def main(arguments: list[str]) -> int:
    """Run the tests and write the figures; return the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parser.parse_known_args(arguments)[1]
    page = PAGE.read_text(encoding="utf-8")
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = [*arguments, *sorted(set(re.findall(r"tests/\w+/\w+\.py", page)))]
    with temporary_folder() as folder:
        report = folder / "report.xml"
        words = ["-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", f"--junitxml={report}", *arguments]
        status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
        figures = format_figures(*count_tried(report))
    before, _, rest = page.partition(START)
    write_text(PAGE, f"{before}{START}\n{figures}{END}{rest.partition(END)[2]}")
    print(figures)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
