"""Temporary folders: removed at the end, or by the next process where one was killed; short enough for sockets."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAKE = "import os, sys; from common.temporary import process_folder; print(process_folder(), flush=True); {}"


def run(folder: Path, then: str) -> tuple[Path, int]:
    """Make the folder of a process, with TMPDIR at `folder`; return its path, and the exit status."""
    words = [sys.executable, "-c", MAKE.format(then)]
    environment = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    return Path(result.stdout.strip()), result.returncode


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        left, status = run(Path(folder), "os.kill(os.getpid(), 9)")
        assert (status, left.parent, left.is_dir()) == (-signal.SIGKILL, Path(folder), True)
        found, status = run(Path(folder), "assert not os.listdir(process_folder())")
        assert (status, found.parent) == (0, Path(folder))
        assert not os.listdir(folder)


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "raise SystemExit"])
def test_a_forked_process_that_ends_leaves_the_folder_to_its_parent(tmp_path, end):
    folder, status = run(
        tmp_path,
        f"import gc\nif not os.fork():\n  {end}\nos.wait(); gc.collect(); assert process_folder().is_dir()",
    )
    assert status == 0
    assert not folder.exists()


def test_a_tmpdir_that_is_too_long_for_a_socket_is_not_used(tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    script = (
        "import socket; socket.socket(socket.AF_UNIX).bind(str(process_folder() / 'pymp-12345678/listener-12345678'))"
    )
    found, status = run(folder, "os.mkdir(process_folder() / 'pymp-12345678'); " + script)
    assert (status, found.parent) == (0, Path("/tmp"))
    assert not found.exists()
