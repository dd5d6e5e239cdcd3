"""Temporary folders that do not stay for ever when a process is killed."""

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from common.files import reserve_partial

LONGEST = 50  # bytes of TMPDIR; the path of a socket may have 107, of which the names below it take up to 57


@contextmanager
def temporary_folder(parent: str | None = None) -> Iterator[Path]:
    """Yield an empty folder; it is removed at the end, or by the next process if this one is killed.

    Args:
        parent: where it is made; None for TMPDIR.
    """
    with reserve_partial(Path(parent or tempfile.gettempdir(), "ced")) as folder:
        folder.mkdir(mode=0o700)
        yield folder


@cache
def process_folder() -> Path:
    """Return a temporary folder for the rest of this process, and for the sockets of processes that it forks.

    Where TMPDIR is too long for the path of a socket, with which loader processes would wait for ever, it is in /tmp.
    """
    is_long = len(os.fsencode(tempfile.gettempdir())) > LONGEST
    stack = ExitStack()
    atexit.register(stack.close)  # a process that is forked inherits it, and `reserve_partial` lets it remove nothing
    return stack.enter_context(temporary_folder("/tmp" if is_long else None))
