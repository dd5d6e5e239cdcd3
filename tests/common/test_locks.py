"""Two processes at one piece of work: each part is done by one of them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.locks import lock_shares, try_lock
from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("fork")


def work(folder: Path, numbers: list[int], seconds: float) -> None:
    """Do what is missing of some parts: note begin and end of each."""
    with lock_shares(folder, numbers, "parts"):
        for number in numbers:
            if not (folder / f"{number}.done").exists():
                with open(folder / "journal", "a") as journal:
                    journal.write(f"{number}\n")
                time.sleep(seconds)
                (folder / f"{number}.done").touch()


def start(function: Callable[..., None], *arguments: Any) -> Any:
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_overlapping_shares_are_done_once_and_the_lock_is_removed(tmp_path: Path) -> None:
    shares = [[0, 1, 2, 3], [0, 2], [1, 3], [0, 1, 2, 3]]
    processes = [start(work, tmp_path, numbers, 0.02) for numbers in shares]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted((tmp_path / "journal").read_text().split()) == ["0", "1", "2", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.done", "1.done", "2.done", "3.done", "journal"]


def test_a_killed_process_keeps_nobody_waiting(tmp_path: Path) -> None:
    killed = start(work, tmp_path, [0], 600)
    wait_for(tmp_path / "journal")
    waiting = start(work, tmp_path, [0], 0)
    other = start(work, tmp_path, [1], 0)  # another share is not blocked
    other.join(60)
    assert other.exitcode == 0
    assert waiting.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    waiting.join(60)
    assert waiting.exitcode == 0
    assert (tmp_path / "0.done").exists()


def test_another_part_of_the_same_process_neither_gets_a_lock_nor_releases_it(tmp_path: Path) -> None:
    """Locks of POSIX belong to the process, and end when it closes any handle of the file."""
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    code = "import sys, pathlib; from common.locks import try_lock; print(try_lock(pathlib.Path(sys.argv[1])) is None)"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "True\n"
    first.close()
    again = try_lock(tmp_path / "lock")
    assert again is not None
    again.close()
