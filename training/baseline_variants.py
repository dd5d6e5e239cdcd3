"""The variants of the baseline: combinations of features and scikit-learn models.

Letters: N clips, C classes, D features.
"""

import warnings
from dataclasses import dataclass
from itertools import product

import numpy as np

from training.baseline_features import PARTS, SPECTRA

REGRESSION, SVM = "logistic regression", "RBF SVM"
# Clips times classes up to which a variant is used. Measured on one core with 4,000 clips: an SVM takes 3 s for 50
# classes; a binary logistic regression 6 ms on whole clips and 15 ms on four parts, and multi-label sets need one a
# class.
MAX_SVM_WORK = {True: 200_000, False: 20_000}  # by whether each clip has one label
MAX_FOUR_PARTS_WORK = 500_000


@dataclass(frozen=True)
class Variant:
    """Features and a model.

    Attributes:
        spectrum: "log-mel" or "MFCC".
        parts: 1 for statistics of the whole clip, 4 for those of each quarter.
        model: the scikit-learn model.
    """

    spectrum: str
    parts: int
    model: str

    def __str__(self) -> str:
        where = "the whole clip" if self.parts == 1 else "each quarter of the clip"
        return f"{self.model} on {self.spectrum} statistics of {where}"


# The simplest first: it is chosen among equals.
VARIANTS = tuple(Variant(*parts) for parts in product(SPECTRA, PARTS, (REGRESSION, SVM)))


def affordable_variants(n_clips: int, n_classes: int, single: bool) -> list[Variant]:
    """Return the variants that can be fitted in seconds.

    Args:
        n_clips: number of clips for fitting.
        n_classes: C.
        single: whether each clip has exactly one label, so that one model is fitted for all classes.
    """
    work = n_clips * n_classes
    return [
        variant
        for variant in VARIANTS
        if (variant.model == REGRESSION or work <= MAX_SVM_WORK[single])
        and (variant.parts == 1 or work <= MAX_FOUR_PARTS_WORK)
    ]


def class_scores(
    variant: Variant, features: np.ndarray, targets: np.ndarray, others: np.ndarray, *, single: bool
) -> np.ndarray:
    """Fit a variant and return its scores for other clips.

    Args:
        variant: the variant.
        features: (N,D) for fitting.
        targets: (N,C) of 0 and 1.
        others: (N',D) features of the other clips.
        single: whether each clip has exactly one label: one model for all classes; otherwise one for each class.

    Returns:
        (N',C): probabilities of a logistic regression, decision values of an SVM; lower than all of these for classes
        without clips in `targets`.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    features, others = scaler.transform(features), scaler.transform(others)
    scores = np.full((len(others), targets.shape[1]), np.nan)
    if single:
        classes, of_clips = np.unique(targets.argmax(axis=1), return_inverse=True)
        scores[:, classes] = _fitted_scores(variant.model, features, of_clips, others)
    else:
        for index in np.flatnonzero(targets.any(axis=0)):
            scores[:, index] = _fitted_scores(variant.model, features, targets[:, index].astype(int), others)[:, -1]
    return np.nan_to_num(scores, nan=np.nanmin(scores) - 1)


def _fitted_scores(name: str, features: np.ndarray, classes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Fit a model to classes 0 to k-1 (N,) and return the scores (N',k) of other clips."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    if (classes == classes[0]).all():  # a single class
        return np.ones((len(others), 1))
    model = LogisticRegression(max_iter=1000) if name == REGRESSION else SVC(C=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # good enough for a baseline
        model.fit(features, classes)
    if name == REGRESSION:
        probabilities: np.ndarray = model.predict_proba(others)
        return probabilities
    decision: np.ndarray = model.decision_function(others)
    return decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)
