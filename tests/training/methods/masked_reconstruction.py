"""A method in one file: a student that sees some of the tokens predicts what its moving average computes of the others.

After Baevski et al., "data2vec", ICML 2022, as far as a test needs it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from distill.objectives import Needs, Objective, register_objective


@dataclass(frozen=True)
class Settings:
    """Share of the tokens that are hidden, and what the moving average keeps at each step."""

    hidden: float = 0.6
    decay: float = 0.9


@register_objective("masked_reconstruction")
class MaskedReconstruction(Objective):
    """Needs neither labels nor a teacher: an unlabelled pack is enough."""

    Settings = Settings

    def __init__(self, settings, student, facts):
        super().__init__(settings, student, facts)
        self.seed = facts.seed
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.places = nn.Embedding(1024, student.embed_dim)
        self.predictor = nn.Sequential(nn.LayerNorm(student.embed_dim), nn.Linear(student.embed_dim, student.embed_dim))

    @classmethod
    def needs(cls, settings):
        return Needs("none")

    def forward(self, student, batch):
        encoded = student.encode(batch.mel, batch.n_frames, keep=lambda f, t, valid: self.choose(batch, f * t))
        with torch.no_grad():
            target = self.average.encode(batch.mel, batch.n_frames).tokens.flatten(1, 2)  # (B,N,D)
        is_hidden = (
            torch.ones(target.shape[:2], dtype=torch.bool).scatter(1, encoded.kept.cpu(), False).to(target.device)
        )
        context = encoded.tokens.mean(1, keepdim=True)  # (B,1,D)
        predicted = self.predictor(context + self.places.weight[: target.shape[1]])  # (B,N,D)
        error = (predicted - target).square().mean(2)[is_hidden].mean()
        return {"loss": error, "target_deviation": target.std(dim=(0, 1)).mean()}

    def choose(self, batch, n_tokens):
        """Places of the tokens that each clip shows: a function of the run's seed, the epoch and the item alone."""
        noise = []
        for epoch, item in zip(batch.epoch.tolist(), batch.item.tolist(), strict=True):
            generator = torch.Generator().manual_seed(hash((self.seed, epoch, item)) % 2**63)
            noise.append(torch.rand(n_tokens, generator=generator))
        n_kept = max(1, round((1 - self.settings.hidden) * n_tokens))
        return torch.stack(noise).argsort(1)[:, :n_kept].sort(1).values.to(batch.item.device)

    def after_step(self, student, step, n_steps):
        decay = min(self.settings.decay, step / (step + 1))
        with torch.no_grad():
            for own, value in zip(self.average.parameters(), student.parameters(), strict=True):
                own.lerp_(value, 1 - decay)
            for own, value in zip(self.average.buffers(), student.buffers(), strict=True):
                own.copy_(value)
