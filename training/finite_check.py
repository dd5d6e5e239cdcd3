"""Whether losses and gradients are finite, read when something else waits for the device anyway."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError, some
from training.parallel import Ranks


class FiniteCheck:
    """Keeps the losses and gradient norms of steps on the device until they are looked at.

    Args:
        name_of: the name of the clip that an item is of.
        ranks: the processes that train together; they stop together.
        norms: whether a gradient that is not finite is a fault; under float16 overflows are normal.
    """

    def __init__(self, name_of: Callable[[int], str], ranks: Ranks, *, norms: bool) -> None:
        self.name_of, self.ranks, self.norms = name_of, ranks, norms
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # items, loss and norm of each

    def add(self, items: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Take in a step: this rank's items (B,), and two scalars; nothing waits for the device."""
        self.steps.append((items, loss, norm))

    def raise_if_not(self, step: int) -> None:
        """Look at all steps since the last time, on every rank.

        Args:
            step: the number of steps made so far.

        Raises:
            UserError: a loss or a gradient is not finite; it names the clips of the first such step.
        """
        steps, self.steps = self.steps, []
        if not steps:
            return
        losses, norms = (torch.stack(values) for values in list(zip(*steps, strict=True))[1:])
        is_bad = ~losses.isfinite() | (~norms.isfinite() if self.norms else False)
        bad = is_bad.nonzero()[:, 0].tolist()
        found = self.ranks.of_all((bad[0], losses[bad[0]].item(), norms[bad[0]].item()) if bad else None)
        if not any(found):
            return
        first, loss, norm = min(entry for entry in found if entry)
        held = self.ranks.of_all([self.name_of(int(item)) for item in steps[first][0]])
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise UserError(
            f"{what} in step {step - len(steps) + first + 1}; training stops here. That batch held "
            f"{some((name for names in held for name in names), 64)}. Look at those clips, or lower the learning rate "
            "or set grad_clip, which begins a new run"
        )
