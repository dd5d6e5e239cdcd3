"""The best checkpoints of a run, and their average."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models import AudioTagger, save_checkpoint
from training.averaging import average_states


@dataclass
class BestCheckpoints:
    """Keeps the checkpoints with the highest scores on disk.

    Args:
        folder: where they are written.
        n: how many.
        writes: whether this process does; the others keep count only.
    """

    folder: Path
    n: int
    writes: bool = True
    saved: list[tuple[float, str]] = field(default_factory=list)  # highest first: score, name of the file
    needed: set[str] = field(default_factory=set)  # by the states that a run may go on from

    def offer(self, model: AudioTagger, score: float, epoch: int) -> bool:
        """Save the model if it is among the best n; return whether it is the best so far."""
        best = not self.saved or score > self.saved[0][0]
        if len(self.saved) < self.n or score > self.saved[-1][0]:
            name = f"best_epoch={epoch:04d}_mAP={score:.4f}.pt"
            if self.writes:
                save_checkpoint(self.folder / name, model, {"epoch": epoch, "mAP": score})
            self.saved = sorted([*self.saved, (score, name)], key=lambda entry: -entry[0])[: self.n]
        return best

    def prune(self) -> None:
        """Remove what is no longer among the best, save what the state before this one still speaks of."""
        names = {name for _, name in self.saved}
        if self.writes:
            for path in self.folder.glob("best_epoch=*.pt"):
                if path.name not in names | self.needed:
                    path.unlink()
        self.needed = names

    def average(self, model: AudioTagger) -> Path:
        """Load the average of the saved weights into `model` and write it to `averaged.pt`.

        Floating-point tensors are averaged, counters are those of the best checkpoint.
        """
        model.load_state_dict(average_states([_weights(self.folder / name) for _, name in self.saved]))
        target = self.folder / "averaged.pt"
        save_checkpoint(target, model, {"averaged": [name for _, name in self.saved]})
        return target

    def restore_best(self, model: AudioTagger) -> Path:
        """Load the best saved weights into `model`; return their path."""
        path = self.folder / self.saved[0][1]
        model.load_state_dict(_weights(path))
        return path


def _weights(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)["model"]
