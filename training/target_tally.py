"""What constant answers would have cost: a running mean of the targets of an epoch, as they went into the loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives import Objective
from training.parallel import Ranks

CLIPS = "clips"  # among the sums


class TargetTally:
    """Sums of an objective's target statistics over clips; they stay on the device until they are read.

    Args:
        objective: of the run.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Count the clips of a batch whose `target`, and `labels`, are those that the loss sees: mixed, for one."""
        for name, mean in self.objective.target_statistics(batch).items():
            self._add(name, mean.double() * len(batch))
        self._add(CLIPS, torch.full((), float(len(batch)), dtype=torch.float64, device=batch.target.device))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def constant_loss(self, ranks: Ranks) -> float | None:
        """Return the loss of the best constant answer to the clips of all ranks; None where it is not known."""
        if CLIPS not in self.sums:
            return None
        sums = {name: ranks.sum(value).cpu() for name, value in self.sums.items()}
        n_clips = sums.pop(CLIPS)
        return self.objective.constant_loss({name: value / n_clips for name, value in sums.items()})

    def reset(self) -> None:
        """Begin again."""
        self.sums = {}

    def state_dict(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return what `load_state_dict` takes: the sums over all ranks."""
        return {name: ranks.sum(value).cpu() for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> None:
        """Go on from what `state_dict` returned; rank 0 carries the sums."""
        self.sums = {name: value.to(device) * (1.0 if ranks.is_main else 0.0) for name, value in state.items()}
