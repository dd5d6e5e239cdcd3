"""Several processes at one output: who may write it, and when they were started together."""

import json
import os
import subprocess
import sys
import threading

import pytest

from common.errors import UserError
from tagging.outputs import claim_folder
from tagging.parts import SINGLE_PROCESS, Share, lock, unlock
from tests.conftest import ROOT

HOLD = (
    "import sys, pathlib; from tagging.parts import Share, lock; "
    "lock(pathlib.Path(sys.argv[1]), Share(int(sys.argv[2]), int(sys.argv[3]))); print('taken', flush=True); input()"
)


@pytest.fixture
def holder(tmp_path):
    """`holder(rank, world_size)` starts a process that takes tags.csv and keeps it."""
    processes = []

    def start(*share):
        command = [sys.executable, "-c", HOLD, tmp_path / "tags.csv", *map(str, share)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("theirs", "mine", "fine"),
    [
        ((0, 1), SINGLE_PROCESS, False),
        ((1, 2), SINGLE_PROCESS, False),
        ((0, 1), Share(1, 2), False),
        ((1, 2), Share(1, 2), False),
        ((0, 3), Share(0, 2), False),
        ((1, 2), Share(0, 2), True),
    ],
)
def test_an_output_that_another_process_writes_is_a_sentence_until_that_is_killed(
    tmp_path, monkeypatch, holder, theirs, mine, fine
):
    monkeypatch.setattr("tagging.parts.LOCK_TIMEOUT", 0.1)
    process = holder(*theirs)
    if fine:
        lock(tmp_path / "tags.csv", mine)
    else:
        with pytest.raises(UserError, match=r"tags\.csv is being written by another process"):
            lock(tmp_path / "tags.csv", mine)
    process.kill()
    process.wait()
    lock(tmp_path / "tags.csv", mine)
    lock(tmp_path / "tags.csv", mine)
    unlock(tmp_path / "tags.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_while_one_waited_for_it_is_none(tmp_path, holder):
    """The other one ends within the time that this one waits."""
    process = holder(0, 1)
    (tmp_path / ".tags.csv.taken").unlink()  # as the other one does at its end
    lock(tmp_path / "tags.csv", SINGLE_PROCESS)
    assert (tmp_path / ".tags.csv.taken").exists()
    unlock(tmp_path / "tags.csv")
    process = holder(0, 1)
    timer = threading.Timer(0.3, process.kill)
    timer.start()
    lock(tmp_path / "tags.csv", SINGLE_PROCESS)
    unlock(tmp_path / "tags.csv")
    timer.join()


def test_a_note_that_another_process_writes_meanwhile_is_no_strange_file(tmp_path, monkeypatch):
    note = tmp_path / "made_with.json"
    note.write_text(json.dumps({"model": "a"}))
    exists = type(note).exists
    monkeypatch.setattr(type(note), "exists", lambda path: path != note and exists(path))  # it came just afterwards
    claim_folder(tmp_path, {"model": "a"})


def test_processes_that_torchrun_has_not_started_are_a_sentence(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "MASTER_", "LOCAL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun has not started this process"):
        Share.from_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert Share.from_torchrun()[:2] == (1, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert Share.from_torchrun()[:2] == (0, 1)
