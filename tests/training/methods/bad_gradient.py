"""An objective whose loss is finite, and whose gradient is not for one item from an epoch on."""

from dataclasses import dataclass

import torch

from distill.objectives import Needs, Objective, register_objective


@dataclass(frozen=True)
class Settings:
    """The item, and the epoch from which its gradient is infinite."""

    item: int = 5
    epoch: int = 2


@register_objective("bad_gradient")
class BadGradient(Objective):
    """Mean squared output."""

    Settings = Settings

    def __init__(self, settings, student, facts):
        super().__init__(settings, student, facts)
        self.settings = settings

    @classmethod
    def needs(cls, settings):
        return Needs("classes", output="logits")

    def forward(self, student, batch):
        output = student.forward_spectrogram(batch.mel, batch.n_frames)
        is_bad = (batch.item == self.settings.item) & (batch.epoch >= self.settings.epoch)
        factor = torch.where(is_bad, torch.inf, 1.0)[:, None]
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)
        return {"loss": (output - batch.target).square().mean()}
