"""Temporary folders that do not stay for ever when a process is killed."""

import atexit
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from common.files import reserve_partial


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder below TMPDIR; it is removed at the end, or by the next process if this one is killed."""
    with reserve_partial(Path(tempfile.gettempdir(), "ced")) as folder:
        folder.mkdir(mode=0o700)
        yield folder


@cache
def process_folder() -> Path:
    """Return a `temporary_folder` for the rest of this process, and for processes that it forks from now on."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_folder())
