"""Running statistics of self-supervised training, and what they say: have the embeddings collapsed?

A network that learns from its own moving average can make its loss small by an output that does not depend on the
input. The variance of its normalised embeddings then falls to 0; a distribution over classes falls to one class, or to
the same distribution for all tokens.

Letters: B clips, K visible tokens, D width, C classes, G groups.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.objectives.masking import average_tokens
from models.base import Encoded
from models.vit import SpectrogramTransformer

MIN_VARIANCE = 1e-3  # of normalised tokens among clips
MIN_ENTROPY = 0.1  # of the classes of all tokens, in units of log C; 1 where all are equally frequent
MAX_UNCERTAINTY = 0.99  # mean entropy of a token's classes, in units of log C; 1 where all are equally probable
VARIANCE, ENTROPY, UNCERTAINTY = "token_variance", "class_entropy", "class_uncertainty"  # among the losses
WATCHED = (VARIANCE, ENTROPY, UNCERTAINTY)


class RunningMean(nn.Module):
    """Exponential moving average of the means of groups of vectors.

    `add` collects the vectors of a step, `update` moves the means after it; in between the trainer adds the sums of all
    processes.

    Args:
        width: of the vectors.
        momentum: weight of the earlier mean in an update.
        groups: G, number of groups.

    Attributes:
        mean: (G, width), initially 0.
        total: (G, width + 1), sums of the vectors of a step, and their number.
        weight: (G,), sum of the weights of all updates, 1 after many.
    """

    mean: Tensor
    total: Tensor
    weight: Tensor

    def __init__(self, width: int, momentum: float, groups: int = 1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(groups, width))
        self.register_buffer("total", torch.zeros(groups, width + 1))
        self.register_buffer("weight", torch.zeros(groups))

    @torch.no_grad()
    def add(self, vectors: Tensor, is_counted: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add vectors.

        Args:
            vectors: (..., width).
            is_counted: (...) bool, which ones; None for all.
            group: (...) int, of each; None for 0.
        """
        vectors = vectors.flatten(0, -2).float()
        counted = vectors.new_ones(len(vectors)) if is_counted is None else is_counted.flatten().float()
        rows = torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1) * counted[:, None]
        if group is None:
            self.total[0] += rows.sum(0)
        else:
            self.total.index_add_(0, group.flatten(), rows)

    @torch.no_grad()
    def update(self) -> None:
        """Move the means towards those of the vectors added since the last update.

        That of a group without any, or with one that is not finite, stays as it is.
        """
        count = self.total[:, -1]
        is_good = self.total.isfinite().all(1) & (count > 0)
        share = torch.where(is_good, 1 - self.momentum, 0.0)
        new = torch.where(is_good[:, None], self.total[:, :-1] / count.clamp(min=1)[:, None], self.mean)
        self.mean.lerp_(new, share[:, None])
        self.weight.lerp_(torch.ones_like(share), share)
        self.total.zero_()

    def value(self) -> Tensor:
        """Return the means (G, width), without the share of their initial zeros."""
        return self.mean / self.weight.clamp(min=1e-12)[:, None]


class TokenVariance(nn.Module):
    """Variance of a student's normalised tokens among clips, at each position of the grid.

    From 0, where tokens depend on their position alone, to 1, where those at a position have no common direction.
    Positions are distinguished because the tokens of each clip are at other ones.

    Args:
        student: whose tokens are measured.
    """

    def __init__(self, student: SpectrogramTransformer) -> None:
        super().__init__()
        rows, self.columns = student.grid(student.target_length)
        self.running = RunningMean(student.width, 0.99, rows * self.columns)

    @torch.no_grad()
    def measure(self, encoded: Encoded, is_counted: Tensor | None) -> Tensor:
        """Add tokens (B,K,D) of the places `kept`, and return the variance of the steps before; 1 before the first.

        Args:
            encoded: of the student, `tokens`, `kept` and `grid` are used.
            is_counted: (B,K), None for all.
        """
        assert encoded.tokens is not None
        assert encoded.kept is not None
        weight = self.running.weight
        common = (self.running.value().square().sum(1) * weight).sum() / weight.sum().clamp(min=1e-12)
        width = encoded.grid[1]
        place = encoded.kept // width * self.columns + encoded.kept % width
        self.running.add(F.normalize(encoded.tokens.float(), dim=-1), is_counted, place)
        return 1 - common


def measure_classes(mean: Tensor, probabilities: Tensor, is_target: Tensor) -> dict[str, Tensor]:
    """Return the entropy of all tokens' classes, and the mean entropy of a token's, both in units of log C.

    Args:
        mean: (C,) running mean of the probabilities; 0 before the first step, whose entropy is 1: no collapse is known.
        probabilities: (B,M,C) of tokens.
        is_target: (B,M), which of them count.
    """
    largest = math.log(probabilities.shape[-1])
    total = mean.sum()
    entropy = torch.special.entr(mean / total.clamp(min=1e-12)).sum() / largest
    uncertainty = average_tokens(torch.special.entr(probabilities.float()).sum(-1), is_target) / largest
    return {ENTROPY: torch.where(total > 0, entropy, 1.0), UNCERTAINTY: uncertainty}


def describe_collapse(means: Mapping[str, float]) -> str | None:
    """Return what has collapsed, from the means of an epoch; None if nothing has."""
    if means.get(VARIANCE, 1.0) < MIN_VARIANCE:
        return (
            f"the tokens of all clips are nearly the same: their variance among clips is {means[VARIANCE]:.2g}, "
            f"expected above {MIN_VARIANCE:g}"
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
