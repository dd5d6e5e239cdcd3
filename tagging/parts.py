"""Processes that share one output: locks, and the base class of outputs, whose last process joins all parts."""

import atexit
import fcntl
import glob
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import UserError
from common.files import remove_dead_partials, write_text
from common.locks import is_current, lock_range
from tagging.files import TaggedFile


class Share(NamedTuple):
    """One process's share of the work.

    Attributes:
        rank: from 0.
        world_size: number of processes.
        start: identifies the processes that were started together.
    """

    rank: int = 0
    world_size: int = 1
    start: str = ""

    @classmethod
    def from_torchrun(cls) -> "Share":
        """Read the share from torchrun's environment variables; without them there is a single process.

        Raises:
            UserError: WORLD_SIZE is above 1 without torchrun, so that one start cannot be distinguished from the next.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun has not started this process: "
                "start several processes with torchrun, or unset RANK and WORLD_SIZE for a single one"
            )
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        start = [os.environ.get(name, "") for name in names]
        if "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            start.append(str(os.getppid()))  # all processes are children of one torchrun
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), " ".join(start))

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


SINGLE_PROCESS = Share()
LOCK_TIMEOUT = 1.0  # seconds; a process that was just killed may hold its locks for a moment


def check_provenance(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that an existing output was made with the same settings.

    Raises:
        UserError: the settings differ; the text lists the differences.
    """
    differing = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
    if differing:
        was = ", ".join(f"{key} {found.get(key)}" for key in differing)
        now = ", ".join(f"{key} {settings.get(key)}" for key in differing)
        raise UserError(f"{path} was made with {was}; now it is {now}: write elsewhere, or give --overwrite")


# One handle per file: POSIX releases all locks of a process on a file as soon as the process closes any handle of it.
_LOCKS: dict[Path, IO[bytes]] = {}


def lock(path: Path, share: Share) -> None:
    """Lock an output until `unlock` or the end of this process; may be repeated.

    Processes that share an output lock one byte each, a single process locks the whole range. Partial files of killed
    processes are removed from the output's folder.

    Raises:
        UserError: another process holds the lock.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    length, first = (0, 0) if share.world_size == 1 else (1, share.rank)  # length 0: the whole range
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        if path not in _LOCKS:
            _LOCKS[path] = open(_lock_path(path), "ab")  # noqa: SIM115 - open as long as the output
        if _try_lock(path, length, first):
            remove_dead_partials(path.parent)
            return
        _LOCKS.pop(path).close()
        if time.monotonic() > deadline:
            raise UserError(f"{path} is being written by another process: wait for its end, or write elsewhere")
        time.sleep(LOCK_TIMEOUT / 20)


@atexit.register
def unlock_all() -> None:
    """Release all outputs: an error or a stop has ended the command before it could."""
    for path in list(_LOCKS):
        with suppress(OSError):
            unlock(path)


def unlock(path: Path) -> None:
    """Release an output; the last process to do so removes the lock file."""
    path = path.absolute()
    if path in _LOCKS:
        # Released before the whole range is tried: of two processes that unlock at once, one must get it.
        fcntl.lockf(_LOCKS[path], fcntl.LOCK_UN)
        if _try_lock(path, 0, 0):
            _lock_path(path).unlink()
        _LOCKS.pop(path).close()


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.taken")


def _try_lock(path: Path, length: int, first: int) -> bool:
    """Lock bytes of a lock file; False where another process holds them, or has removed the file meanwhile."""
    return lock_range(_LOCKS[path], first, length) and is_current(_LOCKS[path], _lock_path(path))


def find_marks(path: Path) -> list[Path]:
    """Find the files with which processes have marked themselves as finished, see `Output.close`."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.end-*-of-*"))


class Output:
    """Base class of what is written of tagged files; a subclass implements `write`, and `flush` and `join` if needed.

    Args:
        path: the target, which is locked.
        settings: the provenance of what is written.
        share: this process's share of the work.

    Attributes:
        done: names of the files that the target, or a part of any process, holds.
        faults: name → reason for files that could not be read.
        warnings: name → text for files with warnings, see `tagging.rows.describe_warnings`; tables alone keep them.

    Raises:
        UserError: the target is locked by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        self.path, self.settings, self.share = path, dict(settings), share
        self.done: set[str] = set()
        self.faults: dict[str, str] = {}
        self.warnings: dict[str, str] = {}
        lock(path, share)
        self._mark(share.rank).unlink(missing_ok=True)

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless the output holds it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what is held in memory; by default nothing is."""

    def join(self, paths: Iterable[Path]) -> None:
        """Join the parts of all processes in the order of `paths`; by default there are none."""

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish this process's share; the last process joins all parts.

        Args:
            paths: all files, in the order of the output.

        Returns:
            Whether this is the last process, whose `faults` are then those of all.
        """
        self.flush()
        barrier = self.path.with_name(f".{self.path.name}.lock")
        with open(barrier, "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # one process at a time, also while it joins parts
            write_text(self._mark(self.share.rank), json.dumps({"start": self.share.start, "faults": self.faults}))
            marks = [mark for mark in map(self._mark, range(self.share.world_size)) if mark.exists()]
            contents = [json.loads(mark.read_text(encoding="utf-8")) for mark in marks]
            # A process of an earlier start does not count as finished: it may have been restarted.
            finished = [content["faults"] for content in contents if content["start"] == self.share.start]
            is_last = len(finished) == self.share.world_size
            if is_last:
                for faults in finished:
                    self.faults |= faults
                self.join(paths)
                for mark in (*find_marks(self.path), barrier):
                    mark.unlink(missing_ok=True)
        unlock(self.path)
        return is_last

    def _mark(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.end-{Share(rank, self.share.world_size)}")
