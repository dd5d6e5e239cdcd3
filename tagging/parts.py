"""What several runs or processes that write one output must agree on: what it is made with, and who finishes it."""

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import UserError
from common.files import remove_dead_partials, write_json, write_text
from tagging.files import TaggedFile


class Share(NamedTuple):
    """Which of the processes that share the work this is.

    Attributes:
        rank: from 0.
        world_size: how many there are.
        start: what processes that were started together have in common, and others have not.
    """

    rank: int = 0
    world_size: int = 1
    start: str = ""

    @classmethod
    def of_torchrun(cls) -> "Share":
        """This process among those that torchrun has started; alone where nothing says that there are several.

        Raises:
            UserError: there are several, and torchrun has not started them: nothing would tell one start from the next.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun has not started this process: "
                "several tag together when torchrun starts them; for one alone, unset RANK and WORLD_SIZE"
            )
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        start = [os.environ.get(name, "") for name in names]
        if "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            start.append(str(os.getppid()))  # all are children of one torchrun
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), " ".join(start))

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


ALONE = Share()
PATIENCE = 1.0  # seconds; who has just been stopped may take a moment


def check_made_with(path: Path, made_with: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to add to what was made otherwise.

    Raises:
        UserError: the settings differ; the text says in what.
    """
    differing = [key for key in {**settings, **made_with} if made_with.get(key) != settings.get(key)]
    if differing:
        was = ", ".join(f"{key} {made_with.get(key)}" for key in differing)
        now = ", ".join(f"{key} {settings.get(key)}" for key in differing)
        raise UserError(f"{path} was made with {was}; now it is {now}: write elsewhere, or give --overwrite")


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder of outputs, or check that what is in it was made with the same settings.

    Raises:
        UserError: it was not.
    """
    note = folder / "made_with.json"
    if note.exists():
        check_made_with(folder, json.loads(note.read_text(encoding="utf-8")), settings)
    elif folder.is_dir() and any(not path.name.startswith(".") and path != note for path in folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: write elsewhere")
    write_json(note, dict(settings))


class Record:
    """What an output holds.

    Attributes:
        done: names of the files that it, or another process's part of it, holds.
        faults: name → reason of those that could not be read.
        warnings: name → what is odd about those that are, see `tagging.rows.describe_warnings`; rows alone keep it.
    """

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.faults: dict[str, str] = {}
        self.warnings: dict[str, str] = {}

    def note(self, name: str, fault: str | None, warning: str | None) -> None:
        """Add a file, with why it could not be read and what is odd about it, None where there is nothing."""
        self.done.add(name)
        if fault is not None:
            self.faults[name] = fault
        if warning is not None:
            self.warnings[name] = warning


class Output(Record):
    """Takes tagged files."""

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what is held, so that nothing is lost if the session ends here; by default nothing is."""

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish; `paths` is the order wanted. False where other processes have not finished theirs.

        Where they have, this is the last process, and `faults` are then those of all.
        """
        raise NotImplementedError


_TAKEN: dict[Path, IO[bytes]] = {}  # by this process; each file once, since closing it gives up all its locks


def take(path: Path, share: Share) -> None:
    """Keep others from an output until `let_go` or the end of this process; may be done again.

    Processes that share an output have a byte of the lock each, one that is alone has all of it. What processes that
    were killed have been writing beside it is removed.

    Raises:
        UserError: another process has it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    place = (0, 0) if share.world_size == 1 else (1, share.rank)  # length, 0 for everything, and first
    latest = time.monotonic() + PATIENCE
    while True:
        if path not in _TAKEN:
            _TAKEN[path] = open(lock, "ab")  # noqa: SIM115 - open as long as the output
        if _lock(_TAKEN[path], *place) and _is_at(_TAKEN[path], lock):
            remove_dead_partials(path.parent)
            return
        _close(path)
        if time.monotonic() > latest:
            raise UserError(f"{path} is being written by another process: wait for its end, or write elsewhere")
        time.sleep(PATIENCE / 20)


def let_go(path: Path) -> None:
    """Let others have an output; the last one to do so removes what `take` has left beside it."""
    path = path.absolute()
    if path not in _TAKEN:
        return
    fcntl.lockf(_TAKEN[path], fcntl.LOCK_UN)  # first: of two who let go at once, one finds itself alone then
    if _lock(_TAKEN[path], 0, 0) and _is_at(_TAKEN[path], _lock_of(path)):
        _lock_of(path).unlink()
    _close(path)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.taken")


def _lock(file: IO[bytes], length: int, first: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_at(file: IO[bytes], lock: Path) -> bool:
    """Whether an open file has not been removed since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _close(path: Path) -> None:
    if path in _TAKEN:
        _TAKEN.pop(path).close()


def marks_of(path: Path) -> list[Path]:
    """Find what `LastOne` has left for an output."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.end-*-of-*"))


class LastOne:
    """Finds out which of several processes is the last to finish, and tells it what all of them could not read.

    Until then the output is taken, see `take`.

    Args:
        path: the output that they share.
        share: this process's part.

    Raises:
        UserError: another process has this part.
    """

    def __init__(self, path: Path, share: Share) -> None:
        self.path, self.share = path, share
        take(path, share)
        self._mark(share).unlink(missing_ok=True)

    @contextmanager
    def finish(self, faults: Mapping[str, str]) -> Iterator[dict[str, str] | None]:
        """Say that this process is through, and why it could not read which files.

        Yields:
            To the last process, which alone is let in until it is through, the faults of all; None to the others.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        with open(lock, "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            write_text(self._mark(self.share), json.dumps({"start": self.share.start, "faults": dict(faults)}))
            told = [self._told(self._mark(Share(rank, self.share.world_size))) for rank in range(self.share.world_size)]
            everyones = [of_one for of_one in told if of_one is not None]
            if len(everyones) < len(told):
                yield None
            else:
                yield {name: fault for of_one in everyones for name, fault in of_one.items()}
                for mark in (*marks_of(self.path), lock):
                    mark.unlink(missing_ok=True)
        let_go(self.path)

    def _told(self, mark: Path) -> dict[str, str] | None:
        """What a process could not read; None where it is not through, or was in an earlier start alone."""
        if not mark.exists():
            return None
        content = json.loads(mark.read_text(encoding="utf-8"))
        return dict(content["faults"]) if content["start"] == self.share.start else None

    def _mark(self, share: Share) -> Path:
        return self.path.with_name(f".{self.path.name}.end-{share}")
