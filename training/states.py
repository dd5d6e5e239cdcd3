"""Checkpoints to go on from: everything a run needs to continue as if it had never stopped.

A state is a file of tensors and plain values and a small JSON beside it with its size and SHA-256, written in this
order, each whole or absent: a state counts once the JSON is there and what it says is true.
"""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, some
from common.files import sha256, whole_file, write_json

logger = logging.getLogger(__name__)


class States:
    """The states of one run.

    Args:
        folder: of the states.
        n: how many to keep; the one before the newest is there for the day the newest is damaged.
    """

    def __init__(self, folder: Path, n: int = 2) -> None:
        self.folder, self.n = folder, n

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove the oldest, and any of a later step: it is being redone."""
        path = self.folder / f"step={step:09d}.pt"
        seal = path.with_suffix(".json")
        seal.unlink(missing_ok=True)
        with whole_file(path) as partial:
            torch.save(state, partial)
            facts = {"step": step, "bytes": partial.stat().st_size, "sha256": sha256(partial)}
        write_json(seal, facts)
        later = [p for p in self._paths() if p.name > path.name]
        for old in later + [p for p in self._paths() if p.name <= path.name][self.n :]:
            _remove(old)

    def load(self, path: Path | None = None) -> dict[str, Any] | None:
        """Read the newest state that is whole, or the one given; None where not even the first was ever finished.

        Raises:
            UserError: there are states and none of them is whole, or the one given is not.
        """
        paths = [path] if path else self._paths()
        if path and _fault(path) is None:
            for later in [p for p in self._paths() if p.name > path.name]:
                _remove(later)  # it is being redone, and what was written down after this one will be cut
        if all(p.name == "step=000000000.pt" and not p.with_suffix(".json").is_file() for p in paths):
            return None
        for candidate in paths:
            fault = _fault(candidate)
            if fault is None:
                try:
                    return torch.load(candidate, map_location="cpu", weights_only=True)
                except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                    fault = f"{type(error).__name__}: {error}"
            logger.warning("CHECKPOINT DAMAGED: %s: %s", candidate, fault)
        raise UserError(
            f"{self.folder}: none of the checkpoints {some(p.name for p in paths)} is whole, so there is nothing to go "
            "on from; start anew with --resume never, or bring one of them back"
        )

    def clear(self) -> None:
        """Remove all states, once the run is finished."""
        for path in self._paths():
            _remove(path)
        for rest in self.folder.glob(".*.partial*"):  # nobody else writes here
            rest.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step=*.pt"), reverse=True)


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)  # first: without it the state does not count
    path.unlink()


def _fault(path: Path) -> str | None:
    """Say what is wrong with a state, None where nothing is."""
    if not path.with_suffix(".json").is_file():
        return "it was not written to its end"
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        wanted_bytes, wanted = int(facts["bytes"]), str(facts["sha256"])
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its checksum cannot be read ({error})"
    if size != wanted_bytes:
        return f"it has {size} bytes, wanted {wanted_bytes}"
    return None if sha256(path) == wanted else "its content is not what was written (SHA-256 differs)"
