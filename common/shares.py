"""Locks on shares of one piece of work, so that two processes do not do the same part twice."""

import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@contextmanager
def lock_shares(folder: Path, numbers: Iterable[int], what: str) -> Iterator[None]:
    """Keep the parts with these numbers to this process; wait, with a logged line, while another process has one.

    Each part is a byte of a file whose locks end with their process, however it ends. On a file system without locks,
    nothing is kept.

    Args:
        folder: of the work; the lock file is in it, and removed by the last process.
        numbers: of the parts.
        what: is done, for the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, ordered = folder / ".shares.lock", sorted(numbers)  # in one order: none waits for one that waits for it
    told = False
    while True:
        file = open(path, "ab")  # noqa: SIM115 - closed below, which would release the locks
        try:
            for number in ordered:
                while not _try_lock(file, number):
                    if not told:
                        logger.info("another process is at work on the %s in %s; waiting until it ends", what, folder)
                        told = True
                    time.sleep(POLL_SECONDS)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else the process that had it has removed the file meanwhile
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it: nobody else is at work or waits for a part
            path.unlink()
        file.close()


def _try_lock(file: IO[bytes], number: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True
