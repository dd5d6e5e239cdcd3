"""Killed or stopped at any moment, every command does the rest when it is started again, and leaves nothing behind."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common import interrupts
from models import create_model, save_checkpoint
from tests.conftest import ROOT, run_command
from tests.processes import find_children
from tests.training.test_resume import LABELS_ONLY, SETTINGS

ENTRY_POINTS = [path for folder in (ROOT, ROOT / "scripts") for path in sorted(folder.glob("*.py"))]
NOT_COMMANDS = ("hubconf", "configuration_reference", "hear_api", "xares_encoder")
ENTRY_POINTS = [path for path in ENTRY_POINTS if path.stem not in NOT_COMMANDS]
QUICK = "wavlist_to_hdf5"  # the long form kills all commands


def count(folder: Path, name: str, times: int, seed: int, *commands: str) -> dict[str, int]:
    """Return command → number of signals; all rounds must have been in order."""
    result = run_command("tests/kills/harness.py", folder, name, str(times), str(seed), *commands)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["command"]: line["faults"] for line in lines} == {line["command"]: [] for line in lines}
    return {line["command"]: line["signals"] for line in lines}


def test_after_a_kill_the_next_start_does_the_rest_and_nothing_stays(tmp_path):
    assert count(tmp_path, "KILL", 1, 0, QUICK) == {QUICK: 1}


@pytest.mark.long
def test_after_three_hundred_kills_over_all_commands_nothing_is_lost_and_nothing_stays(tmp_path, record_property):
    counts = count(tmp_path, "KILL", 17, 1)
    assert sum(counts.values()) >= 300
    record_property("commands killed at random moments", sum(counts.values()))


@pytest.mark.long
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_signal_stops_every_command_with_a_sentence_and_no_file_is_left_half_written(tmp_path, name, record_property):
    counts = count(tmp_path, name, 2, 2)
    assert len(counts) >= 18
    record_property("commands stopped by SIGTERM, SIGINT or SIGHUP", sum(counts.values()))


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.stem)
def test_signals_are_handled_before_anything_slow_is_imported(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    before = modules[: modules.index("common.entry_points")]
    assert set(before) <= {"sys", "pathlib"}
    assert path.parent.name == "scripts" or path.name in interrupts._PROGRAMS


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.stem)
def test_a_signal_during_the_imports_prints_no_traceback(path, number):
    for seconds in (0.2, 0.5, 1.0):
        words = [sys.executable, str(path), "--help"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
            time.sleep(seconds)
            command.send_signal(number)
            errors = command.communicate()[1]
        # -number: after the end of the program, while Python shuts down
        assert (command.returncode, errors) in ((128 + number, "\nstopped\n"), (0, ""), (-number, ""))


@pytest.mark.long
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_loader_process_that_is_killed_is_one_sentence(tone_pack, tmp_path, command):
    checkpoint = tmp_path / "model.pt"
    labels = [f"tone {i}" for i in range(7)]
    save_checkpoint(checkpoint, create_model("audiotransformer_pico", num_classes=7, labels=labels))
    config = tmp_path / "config.yaml"
    settings = SETTINGS | LABELS_ONLY | {"train_data": str(tone_pack), "epochs": 1000, "num_workers": 1}
    config.write_text(yaml.safe_dump(settings))
    evaluation = ["--test_data", tone_pack, "--batch_size", "1", "--device", "cpu", "--num_workers", "1"]
    words = {
        "train": ["run.py", "train", config, "--outputpath", tmp_path],
        "evaluate": ["run.py", "evaluate", checkpoint, *evaluation],
    }[command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        workers: list[int] = []
        while not workers:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
            if command == "evaluate" or list(tmp_path.rglob("step=000000003.json")):
                workers = find_children(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == 1
    assert "error: a process that loads clips has died" in errors
    assert "Traceback" not in errors
    assert command == "evaluate" or "the same command resumes from it" in errors
