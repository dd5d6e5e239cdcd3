"""Checks that losses and gradients are finite, without making every step wait for the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError, some
from training.parallel import Ranks


class FiniteCheck:
    """Holds the losses and gradient norms of steps on the device until they are checked.

    Args:
        name_item: returns the name of the clip of an item.
        ranks: the processes of the run; they stop together.
        check_norms: whether a gradient that is not finite is an error; under float16 overflows are normal.
    """

    def __init__(self, name_item: Callable[[int], str], ranks: Ranks, *, check_norms: bool) -> None:
        self.name_item, self.ranks, self.check_norms = name_item, ranks, check_norms
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # items, loss and norm of each

    def add(self, items: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Add a step: this rank's items (B,), loss and gradient norm; does not wait for the device."""
        self.steps.append((items, loss, norm))

    def raise_if_not_finite(self, step: int) -> None:
        """Check all steps since the last call; every rank calls this.

        Args:
            step: the number of steps made so far.

        Raises:
            UserError: a loss or a gradient is not finite; names the clips of the first such step.
        """
        steps, self.steps = self.steps, []
        if not steps:
            return
        losses, norms = (torch.stack(values) for values in list(zip(*steps, strict=True))[1:])
        is_bad = ~losses.isfinite() | (~norms.isfinite() if self.check_norms else False)
        bad = is_bad.nonzero()[:, 0].tolist()
        found = self.ranks.gather((bad[0], losses[bad[0]].item(), norms[bad[0]].item()) if bad else None)
        if not any(found):
            return
        first, loss, norm = min(entry for entry in found if entry)
        names = self.ranks.gather([self.name_item(int(item)) for item in steps[first][0]])
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise UserError(
            f"{what} in step {step - len(steps) + first + 1}; training stops here. Clips of that batch: "
            f"{some((name for of_rank in names for name in of_rank), 64)}. Check these clips, or lower the learning "
            "rate or set grad_clip, which starts a new run"
        )
