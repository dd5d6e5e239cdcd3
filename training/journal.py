"""What a run writes down as it goes: a line of JSON at a time, and the same figures for TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError

NOT_FIGURES = ("kind", "step", "epoch", "best", "learns")  # of an entry; everything else is drawn


class Journal:
    """The file `metrics.jsonl` of a run and its event files, in `tensorboard/`.

    A run that resumes hands in the position its checkpoint was saved at. The lines behind it are of steps that will be
    done again, so they are cut off: the file has neither gaps nor repeats, however the run ended.

    Args:
        folder: of the run.
        position: how many bytes of `metrics.jsonl` count; 0 starts it anew.

    Raises:
        UserError: when `metrics.jsonl` is shorter than `position`, or what counts of it is not whole lines of JSON.
    """

    def __init__(self, folder: Path, position: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which only training should wait for

        self.path = Path(folder) / "metrics.jsonl"
        kept = _kept(self.path, position)  # read before anything is cut
        self._file = open(self.path, "ab")  # noqa: SIM115 - open as long as the run
        self._file.truncate(position)
        # TensorBoard drops what earlier event files hold from this step on.
        purge_step = kept[-1]["step"] + 1 if kept else 0
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge_step, flush_secs=30)

    def record(self, entry: dict[str, Any]) -> None:
        """Append one entry and hand it to the operating system, so that a crash of the run does not lose it.

        Args:
            entry: `kind` ("step" or "epoch"), `step`, `epoch` and figures by name.
        """
        self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        for name, value in entry.items():
            if name not in NOT_FIGURES:
                self._board.add_scalar(_tag(entry["kind"], name), value, entry["step"])

    def position(self) -> int:
        """Bring everything to the disk and return how many bytes `metrics.jsonl` has; a checkpoint keeps it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()
        return os.fstat(self._file.fileno()).st_size

    def entries(self) -> list[dict[str, Any]]:
        """Return every entry recorded so far, those from before a resume included."""
        return _parse(self.path, self.path.read_bytes())

    def close(self) -> None:
        """Close the files; nothing can be recorded afterwards."""
        self._file.close()
        self._board.close()


def _tag(kind: str, name: str) -> str:
    """Return TensorBoard's name of a figure: train/loss, epoch/loss, valid/mAP."""
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return f"{'train' if kind == 'step' else kind}/{name}"


def _kept(path: Path, position: int) -> list[dict[str, Any]]:
    """Return the entries of the first `position` bytes; raise when there are fewer."""
    content = path.read_bytes() if position and path.exists() else b""
    if len(content) < position:
        raise UserError(
            f"{path} has {len(content)} bytes; it had {position} when the checkpoint to resume from was saved. "
            "Put back the file that belongs to the checkpoint, or start a new run"
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
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {line[:80]!r} is not a whole entry (JSON with kind, step and epoch). "
                "Put back the file as the run wrote it, or start a new run"
            ) from error
        entries.append(entry)
    return entries
