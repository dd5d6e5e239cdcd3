"""The figure of a head on test clips, with a confidence interval.

Letters: N clips, C classes, R draws of a bootstrap.
"""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from training.baseline import Metric, get_value
from training.metrics import Metrics, evaluate_scores

N_DRAWS = 1000
COVERAGE = 0.95  # of the interval
BLOCK = 10_000_000  # weights of a bootstrap that are in memory at once


@dataclass(frozen=True)
class Score:
    """The figure of a set of clips.

    Attributes:
        metric: of the figure.
        value: the figure.
        interval: of coverage `COVERAGE`: Wilson's for accuracy, a bootstrap's for mAP.
        chance: figure of a head without input: accuracy of always predicting the most frequent class; mAP of random
            scores, which is the mean prevalence of the classes that occur.
        metrics: all other figures.
    """

    metric: Metric
    value: float
    interval: tuple[float, float]
    chance: float
    metrics: Metrics


def compute_score(
    scores: np.ndarray, targets: np.ndarray, labels: list[str], metric: Metric, seed: int, n_draws: int = N_DRAWS
) -> Score:
    """Evaluate scores, with an interval.

    Args:
        scores: (N,C), the higher the likelier.
        targets: (N,C) of 0 and 1.
        labels: the C class names.
        metric: accuracy requires exactly one label a clip.
        seed: of the bootstrap.
        n_draws: R, for mAP.

    Raises:
        UserError: see `training.metrics.evaluate_scores`.
    """
    metrics = evaluate_scores(scores, targets, labels)
    prevalence = targets.mean(axis=0)
    chance = prevalence.max() if metric == "accuracy" else prevalence[prevalence > 0].mean()
    value = get_value(metrics, metric)
    if metric == "accuracy":
        interval = wilson_interval(round(value * len(scores)), len(scores))
    else:
        interval = bootstrap_interval(scores, targets, seed, n_draws)
    return Score(metric, value, interval, float(chance), metrics)


def wilson_interval(n_right: int, n_clips: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (1927, without continuity correction).

    Unlike a bootstrap's, which is 100 to 100 % if 80 of 80 clips are correct, its width is never zero.

    Args:
        n_right: clips with a correct prediction.
        n_clips: all clips.
    """
    z = NormalDist().inv_cdf((1 + COVERAGE) / 2)
    share, squared = n_right / n_clips, z * z / n_clips
    centre = (share + squared / 2) / (1 + squared)
    half = z / (1 + squared) * math.sqrt((share * (1 - share) + squared / 4) / n_clips)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap_interval(
    scores: np.ndarray, targets: np.ndarray, seed: int, n_draws: int = N_DRAWS
) -> tuple[float, float]:
    """Return the percentile interval of mAP: of R sets, each N clips drawn from the N with replacement.

    A clip that is drawn twice has weight two: a draw is a column of weights, and each class is sorted only once.

    Args:
        scores: (N,C).
        targets: (N,C) of 0 and 1.
        seed: of the draws.
        n_draws: R.
    """
    values = np.concatenate(
        [_compute_maps(scores, targets, weights) for weights in draw_weights(len(scores), n_draws, seed)]
    )
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def draw_weights(n_clips: int, n_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each clip is drawn, float32 (N, draws), all R draws in blocks of limited size."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // n_clips)
    for first in range(0, n_draws, block):
        n = min(block, n_draws - first)
        drawn = rng.integers(0, n_clips, (n, n_clips))
        yield np.stack([np.bincount(row, minlength=n_clips).astype(np.float32) for row in drawn], axis=1)


def _compute_maps(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return mAP (draws,) of sets in which each clip occurs `weights` (N, draws) times."""
    positive = targets == 1
    classes = np.flatnonzero(positive.any(axis=0))
    precisions = np.stack([_average_precision(scores[:, c], positive[:, c], weights) for c in classes])
    with warnings.catch_warnings():  # a draw without any label, which is possible for few clips, is NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        values = np.nanmean(precisions, axis=0)
    return values[np.isfinite(values)]


def _average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the average precision (draws,) of one class over weighted clips; NaN without positive clips.

    Clips of equal scores are one step of the curve.
    """
    order = np.argsort(-scores, kind="stable")
    new_score = np.diff(scores[order], prepend=np.nan) != 0  # the first clip of each distinct score
    step = np.cumsum(new_score) - 1  # (N,) number of the distinct score of each clip
    ends = np.append(np.flatnonzero(new_score)[1:], len(scores))
    ranks = np.flatnonzero(positive[order])  # of the positives
    first = np.flatnonzero(np.diff(step[ranks], prepend=-1))  # the first positive of each step
    hits = np.cumsum(_sum_ranges(weights, order[ranks], np.append(first[1:], len(ranks))), axis=0)
    above = np.cumsum(_sum_ranges(weights, order, ends[step[ranks[first]]]), axis=0)
    new_hits = np.diff(hits, axis=0, prepend=0)
    n_positive = hits[-1]
    total = (new_hits * (hits / np.maximum(above, 1))).sum(axis=0)
    return np.where(n_positive > 0, total / np.maximum(n_positive, 1), np.nan)


def _sum_ranges(weights: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum weights (N, draws) over ranges of `rows` that end before each of `ends`: float64 (ranges, draws).

    Adding whole rows is several times as fast as `np.add.reduceat`, which adds column by column.
    """
    ranges = itertools.pairwise([0, *ends.tolist()])
    return np.stack([weights[rows[start:end]].sum(axis=0) for start, end in ranges]).astype(np.float64)
