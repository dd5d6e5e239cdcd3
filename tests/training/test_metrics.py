import math
import time

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from common.errors import UserError
from training.metrics import d_prime, evaluate_scores, format_threshold
from training.ranking import Ranking


def slow_average_precision(scores, positive):
    """Precision at every distinct threshold, weighted by the recall that it adds."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        recall = sum(taken) / sum(positive)
        total += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    return total


def slow_auc(scores, positive):
    """The share of (positive, negative) pairs in the right order, equal ones a half."""
    wins = pairs = 0.0
    for i, is_positive in enumerate(positive):
        for j, other in enumerate(positive):
            if is_positive and not other:
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                pairs += 1
    return wins / pairs


def slow_lwlrap(scores, positive):
    precisions = []
    for row, truth in zip(scores, positive, strict=True):
        for score, is_label in zip(row, truth, strict=True):
            if is_label:
                above = [p for s, p in zip(row, truth, strict=True) if s >= score]
                precisions.append(sum(above) / len(above))
    return sum(precisions) / len(precisions)


def random_set(seed, n_clips=60, n_classes=9, distinct=8):
    """Scores with many ties, one class absent (8), one in every clip (7), some clips without any other label."""
    rng = np.random.default_rng(seed)
    positive = rng.random((n_clips, n_classes)) < 0.2
    positive[:, 8], positive[:, 7] = False, True
    return rng.integers(0, distinct, (n_clips, n_classes)) / distinct, positive


@pytest.mark.parametrize("distinct", [2, 8, 10**6])
def test_figures_equal_their_definitions_and_scikit_learn_also_with_ties(distinct):
    scores, positive = random_set(seed=distinct, distinct=distinct)
    metrics = evaluate_scores(scores, positive)
    table = metrics.per_class
    for index in range(8):
        precision, area = table.AP[index], table.AUC[index]
        assert precision == pytest.approx(slow_average_precision(scores[:, index], positive[:, index]), abs=1e-12)
        assert precision == pytest.approx(average_precision_score(positive[:, index], scores[:, index]), abs=1e-12)
        if index < 7:
            assert area == pytest.approx(slow_auc(scores[:, index], positive[:, index]), abs=1e-12)
            assert area == pytest.approx(roc_auc_score(positive[:, index], scores[:, index]), abs=1e-12)
    assert metrics.mAP == pytest.approx(table.AP[:8].mean())
    assert metrics.mAUC == pytest.approx(table.AUC[:7].mean())
    assert math.isnan(table.AUC[7])  # a class that is everywhere has no negatives
    assert math.isnan(table.AP[8])
    assert metrics.lwlrap == pytest.approx(slow_lwlrap(scores, positive), abs=1e-12)
    weights = positive.sum(axis=1)
    assert metrics.lwlrap == pytest.approx(
        label_ranking_average_precision_score(positive, scores, sample_weight=weights), abs=1e-12
    )
    assert table.n_positive.tolist() == positive.sum(axis=0).tolist()
    assert (metrics.n_classes_scored, metrics.n_classes_absent) == (8, 1)


def test_a_set_worked_out_by_hand():
    scores = np.array([[0.9, 0.8, 0.1], [0.6, 0.7, 0.2], [0.3, 0.4, 0.95]])
    targets = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]])
    metrics = evaluate_scores(scores, targets, ["a", "b", "c"])
    # a: the two positives lead: AP 1, AUC 1.  b: order is +, -, +: AP (1 + 2/3) / 2, AUC 1/2.  c: absent.
    assert metrics.per_class.AP[:2].tolist() == pytest.approx([1.0, 5 / 6])
    assert metrics.mAP == pytest.approx(11 / 12)
    assert metrics.mAUC == pytest.approx(0.75)
    # labels' precisions: clip 0: 1, 1; clip 1: its label ranks second, 1/2; clip 2: second, 1/2
    assert metrics.lwlrap == pytest.approx(3 / 4)
    assert metrics.d_prime == pytest.approx(math.sqrt(2) * 0.6744897501960817)  # the upper quartile of the normal
    assert metrics.top1 is None  # the first clip has two labels
    # among a and b: a for clip 0 (hit), b for clip 1 (miss), b for clip 2 (hit; c, the highest, does not occur)
    assert metrics.hit1_among_present == pytest.approx(2 / 3)
    assert metrics.per_class.label.tolist() == ["a", "b", "c"]
    assert metrics.n_clips == 3


def test_single_label_sets_have_a_top1_and_class_numbers_are_read_as_such():
    scores = np.array([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.1, 0.2, 0.7]])
    metrics = evaluate_scores(scores, np.array([1, 0, 1, 1]))
    assert metrics.top1 == 0.5
    assert metrics.hit1_among_present == 0.75  # clip 3: class 1 before class 0; clip 2: class 0 before class 1
    assert metrics.n_classes_absent == 1
    assert evaluate_scores(scores, np.eye(3)[[1, 0, 1, 1]]).as_dict() == metrics.as_dict()


def test_confusion_of_a_single_label_set_has_true_classes_as_rows_and_equals_scikit_learn():
    scores = np.array([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.1, 0.2, 0.7]])
    metrics = evaluate_scores(scores, np.array([1, 0, 1, 1]))
    assert metrics.confusion.tolist() == [[1, 0, 0], [0, 1, 2], [0, 0, 0]]
    assert "confusion" not in metrics.as_dict()
    assert "confusion" not in metrics.summary()
    rng = np.random.default_rng(4)
    scores, truth = rng.random((500, 12)), rng.integers(0, 11, 500)  # class 11 is absent
    metrics = evaluate_scores(scores, truth)
    assert metrics.confusion.dtype == np.int64
    assert np.array_equal(metrics.confusion, confusion_matrix(truth, scores.argmax(axis=1), labels=range(12)))
    assert metrics.top1 == metrics.confusion.trace() / 500


def test_sets_with_several_labels_or_none_on_a_clip_have_no_confusion():
    scores = np.array([[0.9, 0.8], [0.6, 0.7]])
    assert evaluate_scores(scores, np.array([[1, 1], [1, 0]])).confusion is None
    assert evaluate_scores(scores, np.array([[0, 0], [1, 0]])).confusion is None


def test_clips_without_labels_are_negatives_but_have_no_ranking_of_their_own():
    scores, targets = np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.3]]), np.array([[1, 0], [0, 1], [0, 0]])
    metrics = evaluate_scores(scores, targets)
    assert metrics.lwlrap == metrics.hit1_among_present == 1.0
    assert metrics.per_class.AP.tolist() == [0.5, 1.0]  # the unlabelled clip comes before the first class's only one
    assert metrics.top1 is None


def test_perfect_and_inverted_scores_keep_a_finite_d_prime():
    targets = np.eye(4)
    best, worst = evaluate_scores(targets, targets), evaluate_scores(1 - targets, targets)
    assert best.mAP == best.mAUC == best.lwlrap == best.top1 == 1.0
    assert best.d_prime == pytest.approx(math.sqrt(2) * 4.753424308, abs=1e-6)
    assert worst.d_prime == pytest.approx(-math.sqrt(2) * 4.753424308, abs=1e-6)
    assert worst.mAUC == 0.0
    assert d_prime(0.5) == 0.0


def test_published_d_prime_of_an_area_is_reproduced():
    assert d_prime(0.973) == pytest.approx(2.725, abs=1e-3)  # 1.9268 standard deviations times 1.41421


def test_areas_are_none_where_no_class_has_negatives():
    metrics = evaluate_scores(np.array([[0.3, 0.4]]), np.array([[1, 1]]))
    assert metrics.mAUC is metrics.d_prime is None
    assert metrics.mAP == 1.0


def test_order_of_the_clips_and_monotone_rescaling_change_nothing():
    scores, positive = random_set(seed=1)
    order = np.random.default_rng(2).permutation(len(scores))
    expected = evaluate_scores(scores, positive).as_dict()
    assert evaluate_scores(scores[order], positive[order]).as_dict() == pytest.approx(expected)
    assert evaluate_scores(10 * scores - 5, positive.astype(np.float32)).as_dict() == expected
    assert evaluate_scores((scores * 8).astype(np.uint8), positive.astype(np.int8)).as_dict() == expected


def test_summary_is_aligned_and_tells_of_absent_classes():
    scores, positive = random_set(seed=3)
    metrics = evaluate_scores(scores, positive)
    lines = metrics.summary().splitlines()
    assert f"mAP                 {metrics.mAP:.4f}" in lines
    assert "classes scored      8 (1 absent from the set, not counted)" in lines
    assert not any(line.startswith("top1") for line in lines)  # undefined, so left out


@pytest.mark.parametrize(
    ("scores", "targets", "sentence"),
    [
        (np.zeros(3), np.zeros(3), "clips by classes"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "clips by classes"),
        (np.zeros((2, 3)), np.ones((3, 2)), r"\(3, 2\) do not fit scores of shape \(2, 3\)"),
        (np.zeros((2, 3)), np.zeros((2, 3)), "none of the 2 clips has a label"),
        (np.zeros((2, 3)), np.full((2, 3), 0.3), "0 or 1"),
        (np.zeros((2, 3)), np.array([0, 3]), r"outside 0\.\.2: 3"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), np.ones((2, 2)), "1 of 2 clips are NaN or infinite, at rows 1"),
        (np.array([[0.0, np.inf], [0.0, 0.0]]), np.ones((2, 2)), "at rows 0"),
    ],
)
def test_faults_are_sentences(scores, targets, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate_scores(scores, targets)


def test_a_list_of_names_of_another_length_is_refused():
    with pytest.raises(UserError, match="2 columns of scores and 3 class names"):
        evaluate_scores(np.eye(2), np.eye(2), ["a", "b", "c"])


def test_one_class_at_chance_has_half_the_area():
    ranking = Ranking.of(np.zeros(10), np.arange(10) < 3)
    assert (ranking.average_precision(), ranking.auc()) == (pytest.approx(0.3), 0.5)


def test_the_size_of_audioset_takes_seconds():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((20_000, 527), dtype=np.float32), rng.random((20_000, 527)) < 0.005
    start = time.perf_counter()
    evaluate_scores(scores, targets)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("threshold", [0.5, 0.12345678, 1.0, 2.00009e-5, 0.99999, 0.3, 1e-12, 0.1])
def test_a_printed_threshold_detects_the_score_that_it_is(threshold):
    printed = float(format_threshold(threshold))
    assert 0.998 * threshold <= printed <= threshold
    assert format_threshold(math.nan) == "-"
