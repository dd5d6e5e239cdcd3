"""Sums on the device that are read rarely: of losses over steps, of targets over clips."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives import Objective
from training.parallel import Ranks


class Sums:
    """Named sums of tensors, in float64; each rank adds up its own share."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add_to(self, name: str, value: Tensor) -> None:
        """Add to one of them, without waiting for the device."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over_ranks(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return the sums over all ranks, on the CPU."""
        return {name: ranks.sum(value).cpu() for name, value in self.sums.items()}

    def restore(self, sums: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> None:
        """Restore what `over_ranks` returned: rank 0 has the sums, the others zeros."""
        self.sums = {name: value.to(device) * (1.0 if ranks.is_main else 0.0) for name, value in sums.items()}


class Tally(Sums):
    """The mean of each loss over the steps since the last reset."""

    steps = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step."""
        self.steps += 1
        for name, value in losses.items():
            self.add_to(name, value)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean of each loss over steps, summed over ranks (each has its share)."""
        if not self.steps:
            return {}
        sums = ranks.sum(torch.stack(list(self.sums.values()))) / self.steps
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def reset(self) -> None:
        """Set everything to zero."""
        self.steps, self.sums = 0, {}

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return the sums over all ranks and the number of steps."""
        return {"steps": self.steps, "sums": self.over_ranks(ranks)}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks, device: torch.device) -> None:
        """Restore what `state_dict` returned."""
        self.steps = state["steps"]
        self.restore(state["sums"], ranks, device)


CLIPS = "clips"  # among the sums of targets


class TargetTally(Sums):
    """Sums over clips of an objective's target statistics, for the loss of a constant output.

    Args:
        objective: the objective of the run.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add the clips of a batch with the `target` and `labels` of the loss: after mixup."""
        for name, mean in self.objective.target_statistics(batch).items():
            self.add_to(name, mean.double() * len(batch))
        self.add_to(CLIPS, torch.full((), float(len(batch)), dtype=torch.float64, device=batch.target.device))

    def constant_loss(self, ranks: Ranks) -> float | None:
        """Return the loss of the best constant output for the clips of all ranks; None if it is not known."""
        if CLIPS not in self.sums:
            return None
        sums = self.over_ranks(ranks)
        n_clips = sums.pop(CLIPS)
        return self.objective.constant_loss({name: value / n_clips for name, value in sums.items()})

    def reset(self) -> None:
        """Set everything to zero."""
        self.sums = {}
