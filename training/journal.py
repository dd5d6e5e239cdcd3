"""The journal of a run: `metrics.jsonl`, one line of JSON an entry, and the same values for TensorBoard."""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import append_bytes, explain_write_errors

NOT_FIGURES = ("kind", "step", "epoch", "best", "learns")  # of an entry; all other values go to TensorBoard


class Journal:
    """The file `metrics.jsonl` of a run and its event files, in `tensorboard/`.

    A resumed run passes the position at which its state was saved. Lines after it are of steps that are repeated, so
    they are cut off: the file has neither gaps nor duplicates, however the run was stopped.

    Args:
        folder: folder of the run.
        position: number of bytes of `metrics.jsonl` to keep; 0 starts a new file.

    Raises:
        UserError: `metrics.jsonl` is shorter than `position`, or that part of it is not whole lines of JSON.
    """

    def __init__(self, folder: Path, position: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.path = Path(folder) / "metrics.jsonl"
        entries = _read_entries(self.path, position)  # before the file is cut
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._file.truncate(position)
        # TensorBoard drops values of earlier event files from this step on.
        purge_step = entries[-1]["step"] + 1 if entries else 0
        self._events = self.path.parent / "tensorboard"
        self._board = SummaryWriter(str(self._events), purge_step=purge_step, flush_secs=30)
        threading.excepthook = _print_unless_of_disk

    def record(self, entry: dict[str, Any]) -> None:
        """Append one entry, so that it survives a crash of the run.

        Args:
            entry: `kind` ("step" or "epoch"), `step`, `epoch` and values by name.

        Raises:
            UserError: the disk is full or has failed.
        """
        append_bytes(self._file, (json.dumps(entry, ensure_ascii=False) + "\n").encode())
        with explain_write_errors(self._events):
            for name, value in entry.items():
                if name not in NOT_FIGURES:
                    self._board.add_scalar(_tag(entry["kind"], name), value, entry["step"])

    def position(self) -> int:
        """Write everything to the disk and return the size of `metrics.jsonl` in bytes, for a state."""
        with explain_write_errors(self.path):
            os.fsync(self._file.fileno())
        with explain_write_errors(self._events):
            self._board.flush()
        return os.fstat(self._file.fileno()).st_size

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries so far, including those before a resume."""
        return _parse(self.path, self.path.read_bytes())

    def close(self) -> None:
        """Close the files; an error is not raised, since `position` has written everything that a state refers to."""
        self._file.close()
        with suppress(OSError):
            self._board.close()


def _print_unless_of_disk(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread; an error of TensorBoard's is raised by the next call, with the path."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _tag(kind: str, name: str) -> str:
    """Return the TensorBoard tag of a value: train/loss, epoch/loss, valid/mAP."""
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return f"{'train' if kind == 'step' else kind}/{name}"


def _read_entries(path: Path, position: int) -> list[dict[str, Any]]:
    """Return the entries of the first `position` bytes; raise if there are fewer."""
    content = path.read_bytes() if position and path.exists() else b""
    if len(content) < position:
        raise UserError(
            f"{path} has {len(content)} bytes; it had {position} when the checkpoint to resume from was saved. "
            "Restore the file that belongs to the checkpoint, or start a new run"
        )
    return _parse(path, content[:position])


def _parse(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Return the entries of whole lines."""
    entries = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            if not (line.endswith(b"\n") and isinstance(entry, dict) and {"kind", "step", "epoch"} <= entry.keys()):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: {line[:80]!r} is not a whole entry (JSON with kind, step and epoch). "
                "Restore the file as the run wrote it, or start a new run"
            ) from error
        entries.append(entry)
    return entries
