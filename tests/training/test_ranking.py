import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import ndtri
from sklearn.metrics import roc_curve

from training.detection_figure import detection_figure
from training.metrics import MAX_CURVES, evaluate_scores
from training.ranking import GRID, Ranking


def operating_points(scores, positive):
    """Rates of false alarms and misses, as fractions, with nothing detected and from each distinct score on."""
    points = [(math.inf, Fraction(0), Fraction(1))]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        detected = scores >= threshold
        false_alarms = Fraction(int((detected & ~positive).sum()), int((~positive).sum()))
        points.append((threshold, false_alarms, Fraction(int((~detected & positive).sum()), int(positive.sum()))))
    return points


def slow_equal_error_rate(scores, positive):
    """Where a straight line between neighbouring points crosses the diagonal, exactly."""
    for (_, x0, y0), (_, x1, y1) in itertools.pairwise(operating_points(scores, positive)):
        if x0 < y0 and x1 >= y1:
            share = (y0 - x0) / ((y0 - x0) + (x1 - y1))
            return x0 + share * (x1 - x0)
    raise AssertionError


def distance_to_line(point, x, y):
    """The distance of a point to a line through others."""
    corners = np.stack([x, y], axis=1)
    starts, ways = corners[:-1], np.diff(corners, axis=0)
    lengths = np.maximum((ways**2).sum(axis=1), 1e-30)
    shares = np.clip(((point - starts) * ways).sum(axis=1) / lengths, 0, 1)
    return np.hypot(*(starts + shares[:, None] * ways - point).T).min()


def random_class(seed, n_clips=50, distinct=1000, separation=1.0, prevalence=0.3):
    rng = np.random.default_rng(seed)
    positive = rng.random(n_clips) < prevalence
    positive[:2] = True, False
    return np.round(rng.standard_normal(n_clips) + separation * positive, 9 if distinct > 9 else 0), positive


@pytest.mark.parametrize("distinct", [3, 1000])
@pytest.mark.parametrize("separation", [-1.0, 0.0, 1.0, 4.0])
def test_the_equal_error_rate_is_where_the_roc_curve_crosses_the_diagonal_also_with_ties(separation, distinct):
    for seed in range(15):
        scores, positive = random_class(seed, distinct=distinct, separation=separation)
        rate, threshold = Ranking.of(scores, positive).equal_error_rate()
        assert rate == pytest.approx(float(slow_equal_error_rate(scores, positive)), abs=1e-12)
        assert distance_to_line((rate, 1 - rate), *roc_curve(positive, scores)[:2]) < 1e-12
        # no other score has rates that are nearer to each other
        apart = {score: abs(x - y) for score, x, y in operating_points(scores, positive)[1:]}
        assert apart[threshold] == min(apart.values())


@pytest.mark.parametrize(
    ("scores", "rate", "threshold"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.0, 3.0),  # the lowest score that misses nothing
        ([1.0, 2.0, 3.0, 4.0], 1.0, 3.0),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 1.0),
        ([4.0, 2.0, 3.0, 1.0], 0.5, 3.0),
    ],
    ids=["perfect", "inverted", "constant", "half"],
)
def test_equal_error_rates_worked_out_by_hand(scores, rate, threshold):
    positive = np.array([True, True, False, False])
    assert Ranking.of(np.array(scores), positive).equal_error_rate() == (rate, threshold)


def test_the_threshold_of_a_float32_score_detects_that_very_clip():
    scores = np.array([0.9, 0.7, 0.1], np.float32)
    _, threshold = Ranking.of(scores, np.array([True, True, False])).equal_error_rate()
    assert (scores >= threshold).tolist() == [True, True, False]


@pytest.mark.parametrize("distinct", [3, 1000])
def test_curves_are_those_of_scikit_learn_without_points_on_straight_lines(distinct):
    scores, positive = random_class(3, distinct=distinct)
    false_alarms, misses = Ranking.of(scores, positive).curve()
    assert (false_alarms[0], misses[0], false_alarms[-1], misses[-1]) == (0, 1, 1, 0)
    x, y, _ = roc_curve(positive, scores, drop_intermediate=False)
    assert all(np.hypot(x - a, y - b).min() < 1e-12 for a, b in zip(false_alarms, 1 - misses, strict=True))
    assert all(distance_to_line(point, false_alarms, 1 - misses) < 1e-12 for point in zip(x, y, strict=True))
    corners = np.stack([false_alarms, misses], axis=1)
    for a, b, c in zip(corners, corners[1:], corners[2:], strict=False):
        assert abs(np.cross(np.append(b - a, 0), np.append(c - b, 0))[2]) > 1e-12


def test_classes_without_positives_or_negatives_have_no_rate_and_no_curve():
    scores = np.random.default_rng(0).random((20, 3))
    positive = np.zeros((20, 3), bool)
    positive[:5, 0] = positive[:, 1] = True
    metrics = evaluate_scores(scores, positive, ["some", "all", "none"])
    table = metrics.per_class
    assert table[["EER", "EER_threshold"]].isna().all(axis=1).tolist() == [False, True, True]
    assert table["AUC"].isna().tolist() == [False, True, True]
    assert metrics.mEER == table["EER"][0]
    assert [curve.name for curve in metrics.curves] == ["some"]
    assert evaluate_scores(scores[:, 1:2], positive[:, 1:2]).mEER is None
    assert metrics.summary().splitlines()[-1].split() == ["none", "0", "-", "-", "-", "-"]


def test_of_many_classes_the_mean_and_three_examples_are_drawn():
    rng = np.random.default_rng(0)
    positive = rng.random((400, MAX_CURVES + 3)) < 0.3
    scores = rng.standard_normal(positive.shape) + positive * np.linspace(0, 3, MAX_CURVES + 3)
    metrics = evaluate_scores(scores, positive)
    ranked = metrics.per_class.sort_values("EER")["label"].tolist()
    mean, *examples = metrics.curves
    assert [curve.name for curve in examples] == [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    assert mean.eer is None
    expected = np.zeros(len(GRID))
    for index in range(positive.shape[1]):
        points = operating_points(scores[:, index], positive[:, index])
        x, y = np.array([[float(x), float(y)] for _, x, y in points]).T
        expected += np.interp(GRID, x, y) / positive.shape[1]
    assert mean.misses == pytest.approx(expected, abs=1e-12)


def test_a_det_plot_has_normal_deviate_axes_and_the_equal_error_rates_on_its_diagonal():
    rng = np.random.default_rng(0)
    positive = np.arange(4000) < 2000
    scores = rng.standard_normal(4000) + 2 * positive
    metrics = evaluate_scores(scores[:, None], positive[:, None], ["$a$ tone_1"])
    figure = detection_figure(metrics.curves)
    roc, det = figure.axes
    line, dot = det.lines[1:]
    x, y = line.get_xdata(), line.get_ydata()
    inside = (np.abs(x) < 2) & (np.abs(y) < 2)
    assert x[inside] + y[inside] == pytest.approx(-2, abs=0.15)  # variances of 1: a straight line at 45 degrees
    rate = metrics.per_class["EER"][0]
    assert rate == pytest.approx(0.1587, abs=0.02)  # of the normal distribution beyond 1
    assert dot.get_xdata()[0] == dot.get_ydata()[0] == pytest.approx(ndtri(rate))
    assert [text.get_text() for text in det.get_xticklabels()][:3] == ["0.1", "0.2", "0.5"]
    assert det.get_xticks()[:3] == pytest.approx(ndtri([0.001, 0.002, 0.005]))
    assert (roc.lines[2].get_xdata()[0], roc.lines[2].get_ydata()[0]) == (rate, 1 - rate)
    (legend,) = figure.legends
    (text,) = legend.get_texts()
    assert text.get_text() == f"$a$ tone_1 (EER {rate:.1%})"
    assert not text.get_parse_math()
