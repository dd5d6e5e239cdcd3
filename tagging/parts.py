"""What several runs or processes that write one output must agree on: what it is made with, and who finishes it."""

import fcntl
import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import write_json, write_text


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
        """This process among those that torchrun has started; alone where it has not."""
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        start = [os.environ.get(name, "") for name in names]
        if "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            start.append(str(os.getppid()))  # all are children of one torchrun
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), " ".join(start))

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


ALONE = Share()


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
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: write elsewhere, or give --overwrite")
    write_json(note, dict(settings))


def marks_of(path: Path) -> list[Path]:
    """Find what `LastOne` has left for an output, and what was killed while it was written."""
    name = glob.escape(path.name)
    return [mark for dots in (".", "..") for mark in path.parent.glob(f"{dots}{name}.end-*-of-*")]


class LastOne:
    """Finds out which of several processes is the last to finish, and tells it what all of them could not read.

    Args:
        path: the output that they share.
        share: this process's part.
    """

    def __init__(self, path: Path, share: Share) -> None:
        self.path, self.share = path, share
        path.parent.mkdir(parents=True, exist_ok=True)
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
                return
            yield {name: fault for of_one in everyones for name, fault in of_one.items()}
            for mark in (*marks_of(self.path), lock):
                mark.unlink(missing_ok=True)

    def _told(self, mark: Path) -> dict[str, str] | None:
        """What a process could not read; None where it is not through, or was in an earlier start alone."""
        if not mark.exists():
            return None
        content = json.loads(mark.read_text(encoding="utf-8"))
        return dict(content["faults"]) if content["start"] == self.share.start else None

    def _mark(self, share: Share) -> Path:
        return self.path.with_name(f".{self.path.name}.end-{share}")
