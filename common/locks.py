"""Folders that one process at a time works in."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import explain_write_errors

_TIMEOUT = 1.0  # seconds; a process that was just killed may hold its locks for a moment


@contextmanager
def lock_folder(folder: Path, busy: str) -> Iterator[None]:
    """Lock a folder for this process; it is created if it is missing, and may be removed while it is locked.

    The lock ends with the process. File systems without locks are not protected.

    Args:
        folder: contains the lock file, `lock`.
        busy: the sentence if another process has it.

    Raises:
        UserError: another process has it, or it cannot be created.
    """
    deadline = time.monotonic() + _TIMEOUT
    with explain_write_errors(folder):
        while (lock := _try_lock(folder)) is None:
            if time.monotonic() > deadline:
                raise UserError(busy)
            time.sleep(_TIMEOUT / 20)
    with lock:
        yield


def _try_lock(folder: Path) -> IO[bytes] | None:
    """Create and lock the lock file; return None if another process has it, or has removed it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    try:
        lock = open(path, "ab")  # noqa: SIM115 - open as long as the folder is locked
    except FileNotFoundError:  # the folder has just been removed
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would hold on to
    except (BlockingIOError, PermissionError):
        lock.close()
        return None
    except OSError:  # a file system without locks
        return lock
    try:
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except FileNotFoundError:
        pass
    lock.close()
    return None
