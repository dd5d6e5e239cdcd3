"""Moving averages, the teachers of self-supervised objectives, with decays for runs of any length."""

from typing import Any

import torch
from torch import nn

from common.errors import UserError
from distill.objectives.numbers import read_number


def read_decay(value: Any) -> tuple[float, float] | None:
    """Read the decay of a moving average: one number, or two, at the start and at the end of the run; None by default.

    Raises:
        UserError: something else.
    """
    if value is None:
        return None
    given = value if isinstance(value, list | tuple) else [value]
    decays = [read_number("decay", each, lambda d: 0 <= d <= 1, "a number from 0 to 1, or two") for each in given]
    if len(decays) not in (1, 2):
        raise UserError(f"decay is {value!r}; expected one number, or two: at the start and at the end")
    return decays[0], decays[-1]


def shorten_decay(decay: float, published_steps: int, n_steps: int) -> float:
    """Return a decay whose horizon is the same share of a run as the published one's of its run.

    The horizon of a decay d is 1 / (1 - d) steps; that of a longer run is not extended.
    """
    return max(0.0, 1 - (1 - decay) * max(1.0, published_steps / n_steps))


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move an average towards a module: decay * average + (1 - decay) * module; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for buffer, new in zip(average.buffers(), module.buffers(), strict=True):
        buffer.copy_(new)
