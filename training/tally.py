"""Sums of losses that stay on the device until somebody reads them."""

from typing import Any

import torch
from torch import Tensor

from training.parallel import Ranks


class Tally:
    """The mean of each loss over the steps since the last reset."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count one step; nothing waits for the device."""
        self.steps += 1
        for name, value in losses.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean of each loss over steps, summed over ranks (each of which counted its share)."""
        if not self.steps:
            return {}
        sums = ranks.sum(torch.stack(list(self.sums.values()))) / self.steps
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def reset(self) -> None:
        """Begin again."""
        self.steps, self.sums = 0, {}

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return what `load_state_dict` takes: the sums over all ranks."""
        return {"steps": self.steps, "sums": {name: ranks.sum(value).cpu() for name, value in self.sums.items()}}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks, device: torch.device) -> None:
        """Go on from what `state_dict` returned; rank 0 carries the sums."""
        self.steps = state["steps"]
        share = 1.0 if ranks.is_main else 0.0
        self.sums = {name: value.to(device) * share for name, value in state["sums"].items()}
