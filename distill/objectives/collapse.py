"""Running statistics of self-supervised training, and what they say: have the embeddings collapsed?

A network that learns from its own moving average can make its loss small by an output that does not depend on the
input. The variance of its normalised embeddings then falls to 0; a distribution over classes falls to one class, or to
the same distribution for all tokens.

Letters: B clips, M tokens of each, D width, C classes.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

MIN_VARIANCE = 1e-3  # of normalised embeddings; 1 where they have no common direction
MIN_ENTROPY = 0.1  # of the classes of all tokens, in units of log C; 1 where all are equally frequent
MAX_UNCERTAINTY = 0.99  # mean entropy of a token's classes, in units of log C; 1 where all are equally probable
VARIANCE, ENTROPY, UNCERTAINTY = "embedding_variance", "class_entropy", "class_uncertainty"  # among the losses
WATCHED = (VARIANCE, ENTROPY, UNCERTAINTY)


class RunningMean(nn.Module):
    """Exponential moving average of the mean of vectors, over all processes: `add` in a step, `update` after it.

    Args:
        width: of the vectors.
        momentum: weight of the earlier mean in an update.
    """

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        for name, size in (("mean", width), ("total", width + 1)):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def add(self, vectors: Tensor, is_counted: Tensor | None = None) -> None:
        """Add vectors (..., width); `is_counted` (...) selects some, None all."""
        vectors = vectors.float()
        count = vectors.new_tensor(vectors[..., 0].numel()) if is_counted is None else is_counted.sum()
        if is_counted is not None:
            vectors = vectors * is_counted[..., None]
        self._buffer("total").add_(torch.cat([vectors.flatten(0, -2).sum(0), count.view(1)]))

    @torch.no_grad()
    def update(self) -> None:
        """Update the mean with the vectors added since the last update.

        Without any, or with one that is not finite, it stays as it is.
        """
        total = self._buffer("total")
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        is_good = total.isfinite().all() & (total[-1] > 0)
        share = torch.where(is_good, 1 - self.momentum, 0.0)
        new = (total[:-1] / total[-1].clamp(min=1)).nan_to_num(0.0, 0.0, 0.0)
        self._buffer("mean").lerp_(new, share)
        self._buffer("weight").lerp_(torch.ones_like(share), share)
        total.zero_()

    def value(self) -> Tensor:
        """Return the mean (width,), without the share of its initial zeros."""
        return self._buffer("mean") / self._buffer("weight").clamp(min=1e-12)

    def _buffer(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))


class EmbeddingVariance(RunningMean):
    """Variance of normalised embeddings: 1 - |mean|^2, from 0 (all the same) to 1 (no common direction)."""

    def measure(self, embeddings: Tensor) -> Tensor:
        """Add embeddings (B,D) and return the variance of those of the steps before; 1 before the first."""
        variance = 1 - self.value().square().sum()
        self.add(F.normalize(embeddings.detach().float(), dim=-1))
        return variance


def measure_classes(mean: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Return the entropy of all tokens' classes, and the mean entropy of a token's, both in units of log C.

    Args:
        mean: (C,) running mean of the probabilities.
        probabilities: (..., C) of tokens.
    """
    most = math.log(probabilities.shape[-1])
    entropy = torch.special.entr(mean / mean.sum().clamp(min=1e-12)).sum()
    uncertainty = torch.special.entr(probabilities.float()).sum(-1).mean()
    return {ENTROPY: entropy / most, UNCERTAINTY: uncertainty / most}


def describe_collapse(means: Mapping[str, float]) -> str | None:
    """Return what has collapsed, from the means of an epoch; None if nothing has."""
    if means.get(VARIANCE, 1.0) < MIN_VARIANCE:
        return (
            f"all clips have nearly the same embedding: the variance of the normalised embeddings is "
            f"{means[VARIANCE]:.2g}, expected above {MIN_VARIANCE:g}"
        )
    if means.get(ENTROPY, 1.0) < MIN_ENTROPY:
        return (
            f"nearly all tokens are in one class: the entropy of their classes is {means[ENTROPY]:.2g} of the largest "
            f"possible one, expected above {MIN_ENTROPY:g}"
        )
    if means.get(UNCERTAINTY, 0.0) > MAX_UNCERTAINTY:
        return (
            f"all tokens have nearly the same probability for every class: their mean entropy is "
            f"{means[UNCERTAINTY]:.4f} of the largest possible one, expected below {MAX_UNCERTAINTY:g}"
        )
    return None
