"""What chance gives on a labelled set: the same scores with the clips permuted, and the largest class every time."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, t

from training.metrics import average_precision_and_auc

MAX_PERMUTATIONS, MIN_PERMUTATIONS = 20, 3
MAX_CELLS = 20_000_000  # clips x classes x permutations: two seconds
ROUNDING = 1e-9  # of the means of equal figures
CONFIDENCE = 0.999  # a figure above the bound comes about by chance once in 1,000


@dataclass(frozen=True)
class Chance:
    """Figures that are not told from chance.

    Attributes:
        mAP: upper bound of the mAP of a model's own scores when the clips are permuted.
        top1: upper bound of the accuracy of the answer that is right most often, the largest class; None unless each
            clip has exactly one label.
    """

    mAP: float  # noqa: N815 - the field's own spelling
    top1: float | None

    def holds(self, mean_average_precision: float, top1: float | None) -> bool:
        """Whether neither figure is above what chance gives; False where the set is too small to tell."""
        if self.mAP >= 1:
            return False
        right_by_chance = top1 is None or self.top1 is None or top1 <= self.top1
        return mean_average_precision <= self.mAP + ROUNDING and right_by_chance


def compute_chance_bounds(scores: np.ndarray, targets: np.ndarray, seed: int) -> Chance:
    """Return the upper bounds of what chance gives.

    The bound of mAP is that of a prediction interval: the mean of permutations plus Student's t times their deviation.

    Args:
        scores: (N, C), finite.
        targets: (N, C) of 0 and 1.
        seed: of the permutations; large sets get fewer of them.
    """
    positive = np.asarray(targets) == 1
    n_clips, n_classes = positive.shape
    present = np.flatnonzero(positive.any(axis=0))
    n = int(np.clip(MAX_CELLS // (n_clips * n_classes), MIN_PERMUTATIONS, MAX_PERMUTATIONS))
    random = np.random.default_rng([seed, n_clips])
    figures = []
    for _ in range(n):
        order = random.permutation(n_clips)
        figures.append(np.mean([average_precision_and_auc(scores[:, c], positive[order, c])[0] for c in present]))
    bound = np.mean(figures) + t.ppf(CONFIDENCE, n - 1) * np.std(figures, ddof=1) * np.sqrt(1 + 1 / n)
    top1 = None
    if (positive.sum(axis=1) == 1).all():
        top1 = float(binom.ppf(CONFIDENCE, n_clips, positive.mean(axis=0).max()) / n_clips)
    return Chance(mAP=min(1.0, float(bound)), top1=top1)
