"""An objective whose loss is finite, and whose gradient is infinite for one item from an epoch on."""

import torch

from distill.objectives import Needs
from tests.objectives import define_objective


def compute(objective, student, batch):
    """Mean squared output, with an infinite gradient for `item` from `epoch` on."""
    output = student.forward_spectrogram(batch.mel, batch.n_frames)
    is_bad = (batch.item == objective.settings.item) & (batch.epoch >= objective.settings.epoch)
    factor = torch.where(is_bad, torch.inf, 1.0)[:, None]
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * factor)
    return {"loss": (output - batch.target).square().mean()}


define_objective("bad_gradient", Needs("classes", output="logits"), compute, item=5, epoch=2)
