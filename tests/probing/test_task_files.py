"""The files of probeconfig/: valid tasks, and heads with command, needs and figures."""

import re
from pathlib import Path

import pytest

from common.errors import Faults
from common.options import read_options
from probing.options import ProbeOptions
from probing.tasks import read_tasks

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "probeconfig").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_tasks_is_valid_and_opens_with_its_command_and_figures(path):
    faults = Faults(path.name)
    tasks = read_tasks(str(path), faults)
    for task in tasks.values():
        read_options(ProbeOptions, {"model": "mn04_as", "name": "x"} | task, faults)
    assert not faults.sentences
    assert len(tasks) > 1
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for part in (f"--tasks probeconfig/{path.name}", "Command:", "Needs:", "Makes:", "Measured:", "CPU cores"):
        assert part in head
    assert re.search(r"\d\d\d\d-\d\d-\d\d", head.split("Measured:")[1])
