"""States: checkpoints with everything that a run needs to be resumed exactly.

A state is a file of tensors and plain values and a small JSON beside it with its size and SHA-256, written in this
order and atomically: a state is valid only if the JSON is there and matches.
"""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, some
from common.files import sha256, whole_file, write_json
from common.parsing import load_json

logger = logging.getLogger(__name__)


class States:
    """The states of one run.

    Args:
        folder: folder of the states.
        n: number of states to keep; the previous one is a fallback if the newest one is damaged.
    """

    def __init__(self, folder: Path, n: int = 2) -> None:
        self.folder, self.n = folder, n

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove the oldest, and those of later steps, which are outdated."""
        path = self.folder / f"step={step:09d}.pt"
        seal = path.with_suffix(".json")
        seal.unlink(missing_ok=True)
        with whole_file(path) as file:
            torch.save(state, file)
            file.finish()
            facts = {"step": step, "bytes": file.path.stat().st_size, "sha256": sha256(file.path)}
        write_json(seal, facts)
        later = [p for p in self._paths() if p.name > path.name]
        for old in later + [p for p in self._paths() if p.name <= path.name][self.n :]:
            _remove(old)

    def load(self, path: Path | None = None) -> dict[str, Any] | None:
        """Read the newest valid state, or the one at `path`; None if none was ever written completely.

        Raises:
            UserError: there are states and none of them is valid, or the one given is not.
        """
        paths = [path] if path else self._paths()
        if path and _find_fault(path) is None:
            for later in [p for p in self._paths() if p.name > path.name]:
                _remove(later)  # its steps are repeated, and the journal is truncated to this state
        if all(p.name == "step=000000000.pt" and not p.with_suffix(".json").is_file() for p in paths):
            return None
        for candidate in paths:
            fault = _find_fault(candidate)
            if fault is None:
                try:
                    return torch.load(candidate, map_location="cpu", weights_only=True)
                except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                    fault = f"{type(error).__name__}: {error}"
            logger.warning("CHECKPOINT DAMAGED: %s: %s", candidate, fault)
        raise UserError(
            f"{self.folder}: none of the checkpoints {some(p.name for p in paths)} is valid; restore one of them, or "
            "start a new run with --resume never"
        )

    def check(self, path: Path) -> None:
        """Raise `UserError` if a state is not valid."""
        if fault := _find_fault(path):
            raise UserError(f"{path}: {fault}")

    def clear(self) -> None:
        """Remove all states, after the run has finished."""
        for path in self._paths():
            _remove(path)
        for partial in self.folder.glob(".*.partial*"):  # the folder has no other writer
            partial.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        """Return the files of all states, newest first."""
        return sorted(self.folder.glob("step=*.pt"), reverse=True)


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)  # first: without it the state is not valid
    path.unlink()


def _find_fault(path: Path) -> str | None:
    """Return why a state is not valid, or None."""
    if not path.with_suffix(".json").is_file():
        return "it was not written completely"
    try:
        facts = load_json(path.with_suffix(".json"))
        expected_size, expected_hash = int(facts["bytes"]), str(facts["sha256"])
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its checksum cannot be read ({error})"
    if size != expected_size:
        return f"it has {size} bytes, expected {expected_size}"
    return None if sha256(path) == expected_hash else "its content has changed (SHA-256 differs)"
