"""Metrics of classification: mAP, mAUC, EER, d-prime, lwlrap, accuracies, for multi-label and single-label sets.

Shapes: N clips, C classes.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from common.columns import align_columns
from common.errors import UserError, some
from training.ranking import GRID, Curve, Ranking, misses_on_grid

MAX_CURVES = 12  # classes whose ROC curves are readable in one plot, and whose measures in one summary
AUC_MARGIN = 1e-6  # AUCs are clipped to [margin, 1 - margin], which keeps d-prime within +-6.72


@dataclass(frozen=True)
class Metrics:
    """The metrics of one evaluation; those that are undefined for the data are None.

    Attributes:
        mAP: mean over the classes that occur (at least one positive clip) of the average precision.
        n_classes_scored: number of these classes.
        n_classes_absent: number of classes without a positive clip, which are left out.
        mAUC: mean area under the ROC curve over the classes with both positive and negative clips.
        mEER: mean equal error rate over the same classes, see `Ranking.equal_error_rate`.
        d_prime: sqrt(2) times the normal quantile of mAUC, which is first clipped to [1e-6, 1 - 1e-6].
        lwlrap: label-weighted label-ranking average precision: the mean over all labels of all clips of the precision
            of the clip's ranking at that label.
        top1: share of the clips whose highest score is their label; None unless every clip has exactly one.
        hit1_among_present: share of the labelled clips whose highest score, among the classes that occur in the set,
            is one of their labels.
        n_clips: number of clips.
        per_class: one row a class: index, label, n_positive, AP, AUC, EER and its threshold (NaN where undefined).
        curves: ROC curves of the classes with both positive and negative clips; of more than `MAX_CURVES`, their mean
            and those of the lowest, the median and the highest equal error rate.
        confusion: (C, C) counts of clips, rows the true class, columns the class with the highest score; None unless
            every clip has exactly one label.
    """

    mAP: float  # noqa: N815 - the field's own spelling
    n_classes_scored: int
    n_classes_absent: int
    mAUC: float | None  # noqa: N815
    mEER: float | None  # noqa: N815
    d_prime: float | None
    lwlrap: float
    top1: float | None
    hit1_among_present: float
    n_clips: int
    per_class: pd.DataFrame
    curves: list[Curve]
    confusion: np.ndarray | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics without the tables and curves, for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("per_class", "curves", "confusion")}

    def summary(self) -> str:
        """Return a table of two aligned columns, metric and value, and of few classes a table with a row a class.

        Undefined metrics are left out.
        """
        absent = f" ({self.n_classes_absent} absent from the set, not counted)" if self.n_classes_absent else ""
        rows = [("clips", str(self.n_clips)), ("classes scored", f"{self.n_classes_scored}{absent}")]
        for name in ("mAP", "mAUC", "mEER", "d_prime", "lwlrap", "top1", "hit1_among_present"):
            value = getattr(self, name)
            if value is not None:
                rows.append((name.replace("_", " "), f"{value:.4f}"))
        if len(self.per_class) > MAX_CURVES:
            return align_columns(rows)
        classes: list[tuple[str, ...]] = [("class", "clips", "AP", "AUC", "EER", "threshold")]
        for row in self.per_class.itertuples():
            texts = ["-" if math.isnan(value) else f"{value:.4f}" for value in (row.AP, row.AUC, row.EER)]
            classes.append((str(row.label), str(row.n_positive), *texts, format_threshold(row.EER_threshold)))
        return f"{align_columns(rows)}\n\n{align_columns(classes, '<>')}"


def format_threshold(threshold: float) -> str:
    """Return a threshold of four digits that is not above it, so that a score equal to it is still detected."""
    if math.isnan(threshold) or threshold <= 0:
        return "-" if math.isnan(threshold) else "0"
    digit = 10.0 ** (math.floor(math.log10(threshold)) - 3)
    text = f"{math.floor(threshold / digit) * digit:.4g}"
    return text if float(text) <= threshold else f"{(math.floor(threshold / digit) - 1) * digit:.4g}"


def d_prime(auc: float) -> float:
    """Return sqrt(2) * z(auc), z the quantile of the standard normal; finite because auc is clipped by 1e-6."""
    return math.sqrt(2) * NormalDist().inv_cdf(min(max(auc, AUC_MARGIN), 1 - AUC_MARGIN))


def evaluate_scores(scores: Any, targets: Any, labels: list[str] | None = None) -> Metrics:
    """Compare scores with the labels.

    Args:
        scores: (N, C), higher means more likely; only their order matters, so logits and probabilities are equivalent.
        targets: (N, C) of 0 and 1, or (N,) integers: the one class of each clip.
        labels: the C class names for the per-class table; the indices stand in when absent.

    Returns:
        The `Metrics` of the set.

    Raises:
        UserError: for shapes that do not fit, scores that are NaN or infinite, targets that are neither 0 nor 1, or
            a set without any label.
    """
    scores = np.asarray(scores)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)  # unsigned integers cannot be negated for sorting
    if scores.ndim != 2 or scores.size == 0:
        raise UserError(f"expected scores of clips by classes, got the shape {scores.shape}")
    positive = _as_table(np.asarray(targets), scores.shape)  # (N, C) bool
    _check_finite(scores)
    n_clips, n_classes = scores.shape
    if labels is not None and len(labels) != n_classes:
        raise UserError(f"there are {n_classes} columns of scores and {len(labels)} class names")

    n_positive = positive.sum(axis=0)  # (C,)
    if not n_positive.any():
        raise UserError(f"none of the {n_clips} clips has a label, so no metric is defined")
    names = [str(index) for index in range(n_classes)] if labels is None else labels
    per_class, curves = _evaluate_classes(scores, positive, names)

    n_labels = positive.sum(axis=1)  # (N,)
    labelled, present = n_labels > 0, np.flatnonzero(n_positive)
    best_present = present[scores[:, present].argmax(axis=1)]  # (N,)
    hits = positive[np.arange(n_clips), best_present][labelled]
    confusion = _confusion(positive, scores) if (n_labels == 1).all() else None
    has_both = bool(per_class["AUC"].notna().any())
    mean_area = float(per_class["AUC"].mean()) if has_both else None
    return Metrics(
        mAP=float(per_class["AP"].mean()),
        n_classes_scored=len(present),
        n_classes_absent=n_classes - len(present),
        mAUC=mean_area,
        mEER=float(per_class["EER"].mean()) if has_both else None,
        d_prime=None if mean_area is None else d_prime(mean_area),
        lwlrap=_lwlrap(scores, positive),
        top1=None if confusion is None else float(confusion.trace() / n_clips),
        hit1_among_present=float(hits.mean()),
        n_clips=n_clips,
        per_class=per_class,
        curves=curves,
        confusion=confusion,
    )


def _evaluate_classes(scores: np.ndarray, positive: np.ndarray, names: list[str]) -> tuple[pd.DataFrame, list[Curve]]:
    """Return the measures of each class and the curves to draw, see `Metrics`; absent classes are NaN."""
    n_classes = len(names)
    values = np.full((n_classes, 4), np.nan)  # not 0, which would lower the mean
    few, total, curves = n_classes <= MAX_CURVES, np.zeros(len(GRID)), []
    n_positive = positive.sum(axis=0)
    for index in np.flatnonzero(n_positive):
        ranking = Ranking.of(scores[:, index], positive[:, index])
        values[index] = ranking.average_precision(), ranking.auc(), *ranking.equal_error_rate()
        if few and ranking.has_both:
            curves.append(Curve(names[index], *ranking.curve(), float(values[index, 2])))
        elif ranking.has_both:
            total += misses_on_grid(ranking)
    table = pd.DataFrame({"index": range(n_classes), "label": names, "n_positive": n_positive})
    table[["AP", "AUC", "EER", "EER_threshold"]] = values
    both = np.flatnonzero(np.isfinite(values[:, 2]))
    if few or not len(both):
        return table, curves
    curves.append(Curve(f"mean of {len(both)} classes", GRID, total / len(both), None))
    order = both[np.argsort(values[both, 2], kind="stable")]
    for index in dict.fromkeys([order[0], order[len(order) // 2], order[-1]]):
        ranking = Ranking.of(scores[:, index], positive[:, index])
        curves.append(Curve(names[index], *ranking.curve(), float(values[index, 2])))
    return table, curves


def _as_table(targets: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return targets as (N, C) bool; raise if their shape or values are invalid."""
    n_clips, n_classes = shape
    if targets.shape == (n_clips,) and np.issubdtype(targets.dtype, np.integer):
        wrong = targets[(targets < 0) | (targets >= n_classes)]
        if len(wrong):
            raise UserError(f"labels outside 0..{n_classes - 1}: {some(map(str, np.unique(wrong)))}")
        return targets[:, None] == np.arange(n_classes)
    if targets.shape != shape:
        raise UserError(f"targets of shape {targets.shape} do not fit scores of shape {shape}")
    positive = targets == 1
    if not (positive | (targets == 0)).all():
        raise UserError("targets must be 0 or 1; these hold other values (soft targets cannot be evaluated)")
    return positive


def _check_finite(scores: np.ndarray) -> None:
    """Raise if a score is NaN or infinite."""
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise UserError(
            f"the scores of {len(bad)} of {len(scores)} clips are NaN or infinite, at rows {some(map(str, bad))}: "
            "check these sounds, and whether the model has diverged"
        )


def _confusion(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Count (C, C) the clips of each true class by the class with the highest score; one label a clip."""
    n_classes = scores.shape[1]
    cells = positive.argmax(axis=1) * n_classes + scores.argmax(axis=1)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes).astype(np.int64, copy=False)


def _lwlrap(scores: np.ndarray, positive: np.ndarray, block: int = 4096) -> float:
    """Label-weighted LRAP; equal scores share the worst of their ranks, as in scikit-learn."""
    clips, classes = np.nonzero(positive)  # one entry a label
    total = 0.0
    for start in range(0, len(clips), block):
        rows = clips[start : start + block]
        at_or_above = scores[rows] >= scores[rows, classes[start : start + block]][:, None]
        total += float(((at_or_above & positive[rows]).sum(axis=1) / at_or_above.sum(axis=1)).sum())
    return total / len(clips)
