"""The best checkpoints of a run, and their average."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import AudioTagger, save_checkpoint


@dataclass
class BestCheckpoints:
    """Keeps the checkpoints with the highest scores on disk.

    Args:
        folder: where they are written.
        n: how many.
    """

    folder: Path
    n: int
    saved: list[tuple[float, Path]] = field(default_factory=list)  # highest first

    def offer(self, model: AudioTagger, score: float, epoch: int) -> bool:
        """Save the model if it is among the best n; return whether it is the best so far."""
        best = not self.saved or score > self.saved[0][0]
        if len(self.saved) < self.n or score > self.saved[-1][0]:
            path = self.folder / f"best_epoch={epoch:04d}_mAP={score:.4f}.pt"
            save_checkpoint(path, model, {"epoch": epoch, "mAP": score})
            self.saved = sorted([*self.saved, (score, path)], key=lambda entry: -entry[0])
            for _, worst in self.saved[self.n :]:
                worst.unlink()
            self.saved = self.saved[: self.n]
        return best

    def average(self, model: AudioTagger) -> Path:
        """Load the average of the saved weights into `model` and write it to `averaged.pt`.

        Floating-point tensors are averaged, counters are those of the best checkpoint.
        """
        states = [_weights(path) for _, path in self.saved]
        model.load_state_dict(average_states(states))
        target = self.folder / "averaged.pt"
        save_checkpoint(target, model, {"averaged": [path.name for _, path in self.saved]})
        return target

    def restore_best(self, model: AudioTagger) -> Path:
        """Load the best saved weights into `model`; return their path."""
        model.load_state_dict(_weights(self.saved[0][1]))
        return self.saved[0][1]


def _weights(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def average_states(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the element-wise mean of state dicts; integer tensors are those of the first."""
    mean = dict(states[0])
    for key, value in states[0].items():
        if value.is_floating_point():
            mean[key] = torch.stack([state[key].double() for state in states]).mean(dim=0).to(value.dtype)
    return mean
