"""Areas and equal error rates of pooled folds, and their paired bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from common.errors import UserError
from scripts.benchmarks.detection import (
    Interval,
    System,
    compute_auc,
    compute_eer,
    compute_mean_rates,
    describe_systems,
    draw_clips,
    list_comparisons,
    pool_folds,
)
from training.ranking import Ranking


def make_clips(n=40, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    return np.round(rng.normal(positive, 1.0), 1), positive  # rounded: some scores are equal


def slow_eer(scores, positive):
    """Walk along the ROC curve in small steps."""
    alarms, hits, _ = roc_curve(positive, scores, drop_intermediate=False)
    steps = np.linspace(0, len(alarms) - 1, 1_000_001)
    points = np.arange(len(alarms))
    alarms, misses = np.interp(steps, points, alarms), 1 - np.interp(steps, points, hits)
    return alarms[np.argmin(np.abs(alarms - misses))]


def test_rates_of_weighted_clips_are_those_of_repeated_clips():
    scores, positive = make_clips()
    weights = draw_clips(len(scores), seed=1, n_draws=5)
    for draw, auc, eer in zip(
        weights.T, compute_auc(scores, positive, weights), compute_eer(scores, positive, weights), strict=True
    ):
        rows = np.repeat(np.arange(len(scores)), draw.astype(int))
        assert auc == pytest.approx(roc_auc_score(positive[rows], scores[rows]))
        assert eer == pytest.approx(slow_eer(scores[rows], positive[rows]), abs=1e-5)
        evaluated = Ranking.of(scores[rows], positive[rows])  # as in run.py evaluate
        assert eer == pytest.approx(evaluated.equal_error_rate()[0])


@pytest.mark.parametrize(
    ("scores", "auc", "eer"),
    [([4, 3, 2, 1], 1.0, 0.0), ([1, 2, 3, 4], 0.0, 1.0), ([1, 1, 1, 1], 0.5, 0.5), ([4, 2, 3, 1], 0.75, 0.5)],
)
def test_rates_of_four_clips_by_hand(scores, auc, eer):
    scores, positive = np.array(scores, float), np.array([True, True, False, False])
    assert compute_auc(scores, positive, np.ones((4, 1)))[0] == auc
    assert compute_eer(scores, positive, np.ones((4, 1)))[0] == eer


def test_means_are_over_seeds_and_events():
    scores = np.array([[[4, 1], [3, 2], [2, 3], [1, 4]], [[1, 1], [1, 1], [1, 1], [1, 1]]], float)  # (S,N,E)
    positive = np.array([[True, True], [True, True], [False, False], [False, False]])
    rates = compute_mean_rates(scores, positive, np.ones((4, 1)))
    assert rates["AUC"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert rates["EER"] == pytest.approx((0 + 1 + 0.5 + 0.5) / 4)


def test_folds_are_pooled_in_the_order_of_the_list():
    parts = [(["b", "d"], np.array([[2.0], [4.0]])), (["a", "c"], np.array([[1.0], [3.0]]))]
    assert pool_folds(parts, ["a", "b", "c", "d"])[:, 0].tolist() == [1, 2, 3, 4]
    for clips in (["a"], ["a", "b"], ["a", "x"]):
        with pytest.raises(UserError, match="each of the 4 clips once"):
            pool_folds([parts[0], (clips, np.zeros((len(clips), 1)))], ["a", "b", "c", "d"])


def test_an_interval_of_a_difference_is_paired():
    scores, positive = make_clips(200)
    systems = [System("alone", scores[None, :, None]), System("distilled", scores[None, :, None] * 2)]
    text, csv = describe_systems(systems, positive[:, None])
    assert "distilled | alone         | +0.00 (+0.00 to +0.00)" in text
    assert 'distilled,alone,"EER, points",0,0,0' in csv
    single = Interval.of(compute_auc(scores, positive, draw_clips(200, seed=0)))
    assert single.low < single.value < single.high
    assert single.value == pytest.approx(roc_auc_score(positive, scores))


def test_joint_training_is_compared_with_what_it_started_from_and_with_quantization_after():
    found = list_comparisons(["alone", "distilled", "continued", "joint4", "after4", "joint2"])
    assert found == [
        ("distilled", "alone"),
        ("continued", "distilled"),
        ("joint4", "distilled"),
        ("joint4", "continued"),
        ("joint4", "after4"),
        ("joint2", "distilled"),
        ("joint2", "continued"),
    ]
