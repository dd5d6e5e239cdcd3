"""The ranking of clips by the score of one class: average precision, ROC curve and equal error rate.

Shapes: N clips, D distinct scores, P points of a curve.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """Counts of clips at each distinct score; at a threshold, clips with this score or a higher one are detected.

    Attributes:
        thresholds: (D,) the distinct scores, descending.
        hits: (D,) int, positive clips that are detected at each of them.
        false_alarms: (D,) int, negative clips that are detected.
    """

    thresholds: np.ndarray
    hits: np.ndarray
    false_alarms: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, positive: np.ndarray) -> "Ranking":
        """Sort the clips.

        All measures follow from this one sort, and checks are made once rather than for each class: 20,000 clips of
        527 classes take less than a second, with scikit-learn's functions 6.

        Args:
            scores: (N,) finite.
            positive: (N,) bool with at least one True.
        """
        order = np.argsort(-scores)
        ranked = scores[order]
        ends = np.append(np.flatnonzero(np.diff(ranked)), len(scores) - 1)  # the last clip of each distinct score
        hits = np.cumsum(positive[order])[ends]
        return cls(ranked[ends], hits, ends + 1 - hits)

    @property
    def has_both(self) -> bool:
        """Whether there are negative clips as well."""
        return bool(self.false_alarms[-1])

    def average_precision(self) -> float:
        """Return the precision averaged over the steps of recall, as scikit-learn's `average_precision_score`."""
        new_hits = np.diff(self.hits, prepend=0)
        return float((new_hits * (self.hits / (self.hits + self.false_alarms))).sum() / self.hits[-1])

    def auc(self) -> float:
        """Return the area under the ROC curve, as scikit-learn's `roc_auc_score`; NaN without negatives."""
        if not self.has_both:
            return math.nan
        # a pair of a positive and a negative counts 1 in the right order and 1/2 when equal
        pairs = (np.diff(self.false_alarms, prepend=0) * (self.hits - np.diff(self.hits, prepend=0) / 2)).sum()
        return float(pairs / (self.hits[-1] * self.false_alarms[-1]))

    def equal_error_rate(self) -> tuple[float, float]:
        """Return the equal error rate and its threshold; NaN without negatives.

        The rate is where the ROC curve, its points joined by straight lines, has as many false alarms among the
        negatives as misses among the positives. Equal scores are one step, as in the area: scores that are all equal
        give 0.5. (The convex hull of the curve, which is also in use, gives the same or less.)

        Returns:
            The rate; the score at which the two rates are nearest to each other, the higher one of equals.
        """
        if not self.has_both:
            return math.nan, math.nan
        n_positive, n_negative = int(self.hits[-1]), int(self.false_alarms[-1])
        # false-alarm rate - miss rate, times the number of pairs: ascending in whole numbers, 0 where they are equal
        difference = self.false_alarms * n_positive + (self.hits - n_positive) * n_negative
        after = int(np.searchsorted(difference, 0))
        before = after - 1  # -1: nothing is detected, no false alarms and all missed
        low = int(difference[before]) if after else -n_positive * n_negative
        high, start = int(difference[after]), int(self.false_alarms[before]) if after else 0
        false_alarms = start + (int(self.false_alarms[after]) - start) * -low / (high - low)
        nearest = before if after and -low <= high else after
        return false_alarms / n_negative, float(self.thresholds[nearest])

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ROC curve from no detection to all: rates of false alarms and of misses, (P,) each.

        Points on a straight line between others are left out.
        """
        hits, false_alarms = np.append(0, self.hits), np.append(0, self.false_alarms)
        up, right = np.diff(hits), np.diff(false_alarms)
        turns = np.append(True, np.append(up[1:] * right[:-1] != up[:-1] * right[1:], True))
        return false_alarms[turns] / false_alarms[-1], 1 - hits[turns] / hits[-1]


@dataclass(frozen=True)
class Curve:
    """A ROC curve for a plot.

    Attributes:
        name: of the class, or what the curve is a mean of.
        false_alarms: (P,) share of the negatives that are detected, ascending.
        misses: (P,) share of the positives that are not.
        eer: equal error rate; None for a mean, where it is not the mean of the classes' rates.
    """

    name: str
    false_alarms: np.ndarray
    misses: np.ndarray
    eer: float | None


# Rates of false alarms at which curves of many classes are averaged: dense where they are low.
GRID = np.concatenate([[0.0], np.geomspace(1e-4, 0.1, 61), np.linspace(0.1, 1, 91)[1:]])


def misses_on_grid(ranking: Ranking) -> np.ndarray:
    """Return the rate of misses at each rate of `GRID`."""
    false_alarms = np.append(0, ranking.false_alarms) / ranking.false_alarms[-1]
    return np.interp(GRID, false_alarms, 1 - np.append(0, ranking.hits) / ranking.hits[-1])
