"""Workers live as long as their parent, however they were started; signals without a terminal; notes of stops."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.entry_points import print_user_errors
from common.errors import UserError
from common.files import explain_write_errors
from common.interrupts import StopSignal, note_when_stopped
from tests.conftest import ROOT


def start(method: str) -> subprocess.Popen[str]:
    """Start a process with a worker, whose number it prints."""
    code = (
        "import multiprocessing, time\n"
        "from tests.common import worker\n"
        f"multiprocessing.get_context({method!r}).Process(target=worker.work).start()\n"
        "time.sleep(60)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_worker_lives_as_long_as_its_parent_however_it_was_started() -> None:
    parents = {method: start(method) for method in ("fork", "spawn", "forkserver")}
    workers = {}
    for method, parent in parents.items():
        with parent:
            assert parent.stdout is not None
            line = parent.stdout.readline()
            workers[method] = Path(f"/proc/{line.strip() or 'none'}")
            assert workers[method].exists(), method
            parent.kill()
    deadline = time.monotonic() + 60
    while any(worker.exists() for worker in workers.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [method for method, worker in workers.items() if worker.exists()] == []


@pytest.mark.parametrize("stderr", ["gone", "closed"])
@pytest.mark.parametrize("is_raised", [True, False])
def test_without_a_terminal_a_signal_ends_a_command_as_with_one(stderr: str, is_raised: bool) -> None:
    code = (
        "import os, signal, sys\n"
        "from common import entry_points, interrupts\n"
        "interrupts.act_as_entry_point()\n"
        "stop = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"(entry_points.print_user_errors(stop) if {is_raised} else stop)()\n"
    )
    receiver, sender = os.pipe()
    os.close(receiver)
    command = [sys.executable, "-c", code] if stderr == "gone" else ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable]
    command += ["-c", code] if stderr == "closed" else []
    result = subprocess.run(command, cwd=ROOT, stderr=sender, stdout=subprocess.PIPE)
    os.close(sender)
    assert (result.returncode, result.stdout) == (143, b"")


def full_disk() -> None:
    with explain_write_errors(Path("x.csv")):
        raise OSError(28, "No space left on device")


def stop() -> None:
    raise StopSignal(signal.SIGTERM)


def wrong_input() -> None:
    raise UserError("the model is unknown")


@pytest.mark.parametrize(("happen", "is_noted"), [(full_disk, True), (stop, True), (wrong_input, False)])
def test_what_is_kept_is_said_of_stops_and_of_errors_of_the_machine(happen, is_noted, capsys) -> None:
    def command() -> None:
        with note_when_stopped("files are kept"):
            happen()

    with pytest.raises(SystemExit):
        print_user_errors(command)()
    assert ("files are kept" in capsys.readouterr().err) == is_noted
