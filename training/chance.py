"""Chance level on a labelled set: the metrics of permuted scores, and of always predicting the largest class."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, t

from training.ranking import Ranking

MAX_PERMUTATIONS, MIN_PERMUTATIONS = 20, 3
MAX_CELLS = 20_000_000  # clips x classes x permutations: two seconds
ROUNDING = 1e-9  # of means of equal values
CONFIDENCE = 0.999  # a value above the bound occurs by chance once in 1,000 cases


@dataclass(frozen=True)
class Chance:
    """Upper bounds of the metrics that occur by chance.

    Attributes:
        mAP: upper bound of the mAP of the model's scores with permuted clips.
        top1: upper bound of the accuracy of always predicting the largest class; None unless each clip has exactly one
            label.
    """

    mAP: float  # noqa: N815 - the field's own spelling
    top1: float | None

    def holds(self, mean_average_precision: float, top1: float | None) -> bool:
        """Return whether neither metric is above the chance level; False if the set is too small for a bound."""
        if self.mAP >= 1:
            return False
        is_chance_top1 = top1 is None or self.top1 is None or top1 <= self.top1
        return mean_average_precision <= self.mAP + ROUNDING and is_chance_top1


def compute_chance_bounds(scores: np.ndarray, targets: np.ndarray, seed: int) -> Chance:
    """Return upper bounds of the metrics that occur by chance.

    The bound of mAP is that of a prediction interval: the mean of permutations plus Student's t times their deviation.

    Args:
        scores: (N, C), finite.
        targets: (N, C) of 0 and 1.
        seed: of the permutations; there are fewer of them for large sets.
    """
    positive = np.asarray(targets) == 1
    n_clips, n_classes = positive.shape
    present = np.flatnonzero(positive.any(axis=0))
    n = int(np.clip(MAX_CELLS // (n_clips * n_classes), MIN_PERMUTATIONS, MAX_PERMUTATIONS))
    random = np.random.default_rng([seed, n_clips])
    figures = []
    for _ in range(n):
        order = random.permutation(n_clips)
        figures.append(np.mean([Ranking.of(scores[:, c], positive[order, c]).average_precision() for c in present]))
    bound = np.mean(figures) + t.ppf(CONFIDENCE, n - 1) * np.std(figures, ddof=1) * np.sqrt(1 + 1 / n)
    top1 = None
    if (positive.sum(axis=1) == 1).all():
        top1 = float(binom.ppf(CONFIDENCE, n_clips, positive.mean(axis=0).max()) / n_clips)
    return Chance(mAP=min(1.0, float(bound)), top1=top1)
