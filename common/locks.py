"""Locks on files and folders that several processes may work with.

They are those of `fcntl.lockf`, which end with their process, however it ends. Not `flock`: processes that were forked
meanwhile, such as loader workers, hold on to it. On file systems without locks nothing is protected.
"""

import fcntl
import io
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, ClassVar, cast

from common.errors import UserError
from common.files import explain_write_errors

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SHARES_LOCK = ".shares.lock"
_TIMEOUT = 1.0  # seconds; a process that was just killed may hold its locks for a moment


def lock_range(file: IO[bytes] | io.FileIO, first: int = 0, length: int = 0) -> bool:
    """Lock bytes of an open file, by default all; return False if another process holds a lock on one of them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_current(file: IO[bytes] | io.FileIO, path: Path) -> bool:
    """Return whether a path still leads to an open file; the process that held its lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _LockFile(io.FileIO):
    """A lock file that this process has locked, until it is closed."""

    held: ClassVar[set[tuple[int, int]]] = set()  # device and inode

    def hold(self) -> None:
        """Note that this process has the lock: closing another handle of the same file would release it."""
        status = os.fstat(self.fileno())
        self.key = (status.st_dev, status.st_ino)
        self.held.add(self.key)

    def close(self) -> None:
        """Close the file, which releases the lock."""
        super().close()
        self.held.discard(getattr(self, "key", (-1, -1)))


_OPENING = threading.Lock()


def try_lock(path: Path) -> BinaryIO | None:
    """Lock a file until it is closed; it and its folder are created if they are missing.

    Returns:
        The file; None if another process or another part of this one has locked it, or has just removed it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _OPENING:
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in _LockFile.held:
                return None
        except FileNotFoundError:
            pass
        try:
            file = _LockFile(path, "ab")
        except FileNotFoundError:  # the folder has just been removed
            return None
        if lock_range(file) and is_current(file, path):
            file.hold()
            return cast(BinaryIO, file)
        file.close()
        return None


@contextmanager
def lock_folder(folder: Path, busy: str) -> Iterator[None]:
    """Lock a folder for this process; it is created if it is missing, and may be removed while it is locked.

    Args:
        folder: contains the lock file, `lock`.
        busy: the sentence if another process has it.

    Raises:
        UserError: another process has it, or it cannot be created.
    """
    deadline = time.monotonic() + _TIMEOUT
    with explain_write_errors(folder):
        while (lock := try_lock(folder / "lock")) is None:
            if time.monotonic() > deadline:
                raise UserError(busy)
            time.sleep(POLL_SECONDS)
    with lock:
        yield


@contextmanager
def wait_for_lock(path: Path, busy: str) -> Iterator[None]:
    """Lock a file for this process, and remove it at the end; wait while another process has it.

    Args:
        path: the lock file.
        busy: logged while waiting.
    """
    is_logged = False
    while (lock := try_lock(path)) is None:
        if not is_logged:
            logger.info(busy)
            is_logged = True
        time.sleep(POLL_SECONDS)
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lock_shares(folder: Path, numbers: Iterable[int], what: str) -> Iterator[None]:
    """Keep the parts with these numbers to this process; wait, with a logged line, while another process has one.

    Args:
        folder: of the work; the lock file is in it, and removed by the last process.
        numbers: of the parts, each a byte of the lock file.
        what: is done, for the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, ordered = folder / SHARES_LOCK, sorted(numbers)  # in one order: none waits for one that waits for it
    is_logged = False
    while True:
        with open(path, "ab") as file:
            for number in ordered:
                while not lock_range(file, number, 1):
                    if not is_logged:
                        logger.info("another process is at work on the %s in %s; waiting until it ends", what, folder)
                        is_logged = True
                    time.sleep(POLL_SECONDS)
            if not is_current(file, path):
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    if lock_range(file):  # all of it: nobody else is at work or waits for a part
                        path.unlink()
            return
