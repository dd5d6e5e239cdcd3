"""Processes that tests start."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(function: Callable[[], Any], log: Path) -> int:
    """Call a function in a child, whose output is appended to `log`; return the number of the child."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def find_processes(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found
