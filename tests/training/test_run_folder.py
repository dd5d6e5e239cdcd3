"""Which run a command resumes, beside other processes that end, are killed, or have another clock."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import sleep

import pytest

from common.errors import UserError
from training import run_folder
from training.config import TrainConfig
from training.run_folder import RunFolder, choose_folder
from training.states import States

IDENTITY = {"seed": 1}


@contextmanager
def other_process(path: Path, then: Callable[[RunFolder], None]) -> Iterator[None]:
    """A process that locks a run's folder, and then does something and ends."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        folder = RunFolder(path)
        os.write(sender, b"1" if folder.lock() else b"0")
        then(folder)
        os._exit(0)
    assert os.read(receiver, 1) == b"1"
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def make(parent, name="2026-01-01_00-00-00_aaaaaaaa"):
    """An unfinished run with a state, which no process has locked."""
    folder = RunFolder(parent / name)
    folder.make(TrainConfig(model="ced_tiny", train_data="a.tsv"), ["Bell"], IDENTITY)
    States(folder.path / "states").save(1, {"step": 1})
    folder.unlock()
    return folder


@pytest.mark.parametrize("resume", ["auto", "the folder"])
def test_a_start_beside_a_run_that_is_ending_sees_that_it_has_finished(tmp_path, monkeypatch, resume):
    run, (receiver, sender) = make(tmp_path), os.pipe()

    def finish_later(folder: RunFolder) -> None:
        """Finish while the other process waits for the lock."""
        os.read(receiver, 1)
        folder.finish({})

    with other_process(run.path, finish_later):
        monkeypatch.setattr(run_folder, "LOCK_SECONDS", 60.0)
        monkeypatch.setattr(run_folder, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: (os.write(sender, b"1"), sleep(seconds)))
        if resume == "auto":
            folder, _, is_resumed = choose_folder(tmp_path, IDENTITY, resume)
            assert (is_resumed, folder.path.name > run.path.name) == (False, True)
        else:
            with pytest.raises(UserError, match="that run has just finished; its weights are in"):
                choose_folder(tmp_path, IDENTITY, str(run.path))
    assert run.finished


def test_what_a_process_killed_at_the_end_has_left_is_completed_by_the_next_start(tmp_path):
    older, run = make(tmp_path / "m", "2026-01-01_00-00-00_a"), make(tmp_path / "m", "2026-01-01_00-00-01_b")
    older.finish({})
    (run.path / run_folder.FINISHED).write_text("{}")
    begun = tmp_path / "m" / "2026-01-01_00-00-02_c"
    begun.mkdir()
    (begun / ".lock").touch()
    (begun / "config.yaml").touch()
    choose_folder(tmp_path / "m", IDENTITY, "auto")
    assert os.readlink(tmp_path / "m" / "latest") == run.path.name
    assert os.readlink(tmp_path / "latest") == f"m/{run.path.name}"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [older.path.name, run.path.name, "latest"]
    assert not (run.path / "states").exists()


def test_a_run_ends_without_links_where_there_can_be_none(tmp_path, monkeypatch, caplog):
    def symlink(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    run = make(tmp_path / "m")
    monkeypatch.setattr(os, "symlink", symlink)
    run.finish({})
    assert f"{tmp_path}/m/latest cannot be made a link to {run.path.name}: Operation not permitted" in caplog.text
    assert sorted(os.listdir(tmp_path / "m")) == [run.path.name]
    assert not (run.path / "states").exists()
    caplog.clear()
    choose_folder(tmp_path / "m", IDENTITY, "auto")
    assert not caplog.records


def test_a_folder_that_another_process_is_making_is_left_alone(tmp_path):
    path = tmp_path / "2026-01-01_00-00-02_c"
    with other_process(path, lambda folder: time.sleep(60)):
        choose_folder(tmp_path, IDENTITY, "auto")
        assert (path / ".lock").is_file()


def test_the_newest_run_is_resumed_also_after_the_clock_was_set_back(tmp_path, monkeypatch):
    make(tmp_path, "2026-05-01_00-00-00_aaaaaaaa")

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2020, 1, 1)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    newer = choose_folder(tmp_path, IDENTITY, "never")[0]
    make(tmp_path, newer.path.name)
    os.utime(newer.path / "run.json", (0, 0))
    assert choose_folder(tmp_path, IDENTITY, "auto")[0].path == newer.path


def test_waiting_for_a_lock_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    run = make(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert run.lock()
    assert json.loads((run.path / "run.json").read_text())["identity"] == IDENTITY
