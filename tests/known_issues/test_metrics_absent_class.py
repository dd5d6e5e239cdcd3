"""scikit-learn gives a class without positives an average precision of 0.0, which a plain mean then counts."""

import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from training.metrics import evaluate_scores


def test_classes_that_do_not_occur_do_not_pull_the_mean_down():
    rng = np.random.default_rng(0)
    targets = rng.random((200, 12)) < 0.2
    targets[:, [2, 5, 6, 11]] = False
    scores = 0.6 * targets + rng.random((200, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_absent = average_precision_score(targets, scores, average=None)
    present = targets.any(axis=0)
    assert (with_absent[~present] == 0).all()  # the trap is still there

    metrics = evaluate_scores(scores, targets)
    assert metrics.mAP == pytest.approx(with_absent[present].mean())
    assert metrics.mAP == pytest.approx(with_absent.mean() * 12 / 8)  # what the plain mean would have lost
    assert (metrics.n_classes_scored, metrics.n_classes_absent) == (8, 4)
    # a set with all classes, or with the absent columns cut out, has the same figure
    assert evaluate_scores(scores[:, present], targets[:, present]).mAP == pytest.approx(metrics.mAP)
