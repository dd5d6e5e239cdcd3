"""Temporary folders that do not stay for ever when a process is killed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import reserve_partial


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder below TMPDIR; it is removed at the end, or by the next process if this one is killed."""
    with reserve_partial(Path(tempfile.gettempdir(), "ced")) as folder:
        folder.mkdir(mode=0o700)
        yield folder
