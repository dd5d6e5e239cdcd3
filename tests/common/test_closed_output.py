"""A command whose reader has ended, ends: no traceback, not even from the end of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_without_reader(*words: str, both: bool = False) -> subprocess.CompletedProcess[bytes]:
    """Run Python with a standard output (and error) that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    error = writing if both else subprocess.PIPE
    try:
        return subprocess.run(
            [sys.executable, *words], stdout=writing, stderr=error, cwd=ROOT, check=False, timeout=120
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    "body",
    [
        "print('x')",  # less than a buffer: only the end of the program writes it
        "[print('x' * 1000) for _ in range(10_000)]",
        "[print('x'), sys.exit(0)]",
        "[print('x'), sys.exit(3)]",
        "[print('x'), fail('nothing')]",
    ],
)
def test_a_command_ends_with_its_reader(body: str) -> None:
    code = f"import sys; from common.entry_points import *; print_user_errors(lambda: {body})()"
    found = run_without_reader("-c", code)
    assert found.returncode == 141
    assert found.stderr.decode() in ("", "error: nothing\n")
    assert run_without_reader("-c", code, both=True).returncode == 141


def test_a_broken_pipe_of_the_command_itself_is_an_error() -> None:
    """Output is read here; a worker has died."""
    body = "import os; r, w = os.pipe(); os.close(r)"
    code = f"{body}; from common.entry_points import *; print_user_errors(lambda: os.write(w, b'x'))()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False)
    assert found.returncode == 1
    assert found.stderr.decode() == "error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("words", [["run.py", "--help"], ["scripts/make_lists.py", "--help"]])
def test_help_may_be_cut(words: list[str]) -> None:
    found = run_without_reader(*words)
    assert found.stderr == b""
    assert found.returncode in (0, 141)  # argparse ignores errors of its output


@pytest.mark.long
@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")], ids=lambda path: path.name)
def test_the_help_of_every_command_may_be_cut(path: Path) -> None:
    if path.name == "hubconf.py" or "__main__" not in path.read_text():
        return
    found = run_without_reader(str(path), "--help")
    assert found.stderr == b""
    assert found.returncode in (0, 141)  # argparse ignores errors of its output
