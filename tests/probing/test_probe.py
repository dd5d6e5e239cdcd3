"""Heads on embeddings: how they are fitted, what may influence them, and how sure their figures are."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from audio.dataset import Pack
from common.errors import Faults
from common.options import read_options
from probing.baseline import fit_baselines
from probing.data import ProbeSet
from probing.fit import Examples, FitSettings, compute_statistics, fit, predict
from probing.options import ProbeOptions
from probing.pictures import MAX_BARS, draw_probe
from probing.scores import bootstrap_interval, compute_score, draw_weights, wilson_interval
from probing.trials import run_trials
from tests.training.test_automatic import noise, write_pack
from training.holdout import hold_out
from training.metrics import evaluate_scores

CPU = torch.device("cpu")
LABELS = ["a", "b", "c", "d"]
QUICK = FitSettings(epochs=30, patience=5, lr=1e-2)


def clouds(n, seed, spread=1.5, width=16):
    """Clips of four kinds, each a gaussian cloud that overlaps the others; dimensions of very different size."""
    centres = np.random.default_rng(7).standard_normal((4, width))
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 4
    embeddings = centres[kinds] + spread * rng.standard_normal((n, width))
    embeddings = 5 + embeddings * np.geomspace(0.01, 100, width)
    names = [f"{seed}/{index}.wav" for index in range(n)]
    return Examples(names, embeddings.astype(np.float32), np.eye(4, dtype=np.float32)[kinds])


def fitted(train, valid=None, how=QUICK, single=True):
    return fit(train, valid, LABELS, single, how, CPU)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_linear_head_is_as_good_as_logistic_regression():
    train, test = clouds(400, 0), clouds(400, 1)
    held = hold_out(train.names, [np.array([kind]) for kind in train.targets.argmax(1)], 4, 0.2)
    head = fitted(train.take(~held), train.take(held), FitSettings(epochs=100, lr=1e-2, patience=10)).head
    kinds = test.targets.argmax(1)
    found = (predict(head, test).argmax(1) == kinds).mean()
    mean, scale = compute_statistics(train.embeddings)
    other = LogisticRegression().fit((train.embeddings - mean) / scale, train.targets.argmax(1))
    expected = other.score((test.embeddings - mean) / scale, kinds)
    assert 0.5 < expected < 0.95
    assert found == pytest.approx(expected, abs=0.03)
    probabilities = predict(head, test)
    by_hand = F.linear(torch.from_numpy((test.embeddings - head.mean.numpy()) / head.scale.numpy()),
                       head.layers[0].weight, head.layers[0].bias).softmax(1)  # fmt: skip
    np.testing.assert_allclose(probabilities, by_hand.detach().numpy(), atol=1e-5)


def test_any_number_of_labels_gives_probabilities_of_each():
    train, test = clouds(240, 0, spread=0.3), clouds(80, 1, spread=0.3)
    both = [Examples(e.names, e.embeddings, np.maximum(e.targets, np.roll(e.targets, 1, 1))) for e in (train, test)]
    head = fitted(both[0], how=FitSettings(hidden_sizes=(8,), epochs=40, lr=1e-2), single=False).head
    found = predict(head, both[1])
    assert head.activation == "sigmoid"
    assert [layer.out_features for layer in head.layers if hasattr(layer, "out_features")] == [8, 4]
    assert ((found > 0.5) == (both[1].targets > 0.5)).mean() > 0.97


def test_the_best_epoch_is_kept_and_patience_ends_a_fit():
    train, valid = clouds(60, 0), clouds(60, 1)
    one = fitted(train, valid, FitSettings(epochs=200, lr=0.03, patience=7))
    assert one.n_epochs == one.best_epoch + 7 < 200
    with torch.no_grad():
        logits = one.head(torch.from_numpy(valid.embeddings))
    loss = F.cross_entropy(logits, torch.from_numpy(valid.targets.argmax(1)))
    assert float(loss) == pytest.approx(one.valid_loss, rel=1e-5)
    shorter = fitted(train, None, FitSettings(epochs=one.best_epoch, lr=0.03))
    assert same(shorter.head, one.head)
    assert (shorter.valid_loss, shorter.best_epoch, shorter.n_valid) == (None, one.best_epoch, 0)


def test_the_same_seed_gives_the_same_head_and_leaves_the_global_state_alone():
    train, valid = clouds(60, 0), clouds(20, 1)
    how = {"epochs": 3, "hidden_sizes": (5,), "dropout": 0.3}
    torch.manual_seed(1)
    heads = [fitted(train, valid, FitSettings(seed=seed, **how)).head for seed in (3, 3, 4)]
    drawn = torch.rand(1)
    assert same(heads[0], heads[1])
    # beyond rounding: all clips fit into one batch, so that their order alone changes little
    assert (heads[0].layers[0].weight - heads[2].layers[0].weight).abs().max() > 0.05
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(1)))


def test_only_clips_that_are_learned_from_standardise():
    train, valid = clouds(60, 0), clouds(20, 1)
    train.embeddings[:, 3] = 2.5
    head = fitted(train, valid).head
    np.testing.assert_allclose(head.mean.numpy(), train.embeddings.mean(0), rtol=1e-5)
    expected = train.embeddings.std(0)
    expected[3] = 1
    np.testing.assert_allclose(head.scale.numpy(), expected, rtol=1e-4)


def folds_of(data):
    folds = np.array([f"{index}" for index in np.random.default_rng(0).integers(8, 11, len(data))])
    return ProbeSet({}, {"data": data.targets}, LABELS, folds), folds


def test_every_clip_is_tested_once_and_never_by_a_head_that_it_could_influence():
    data = clouds(90, 0)
    clips, folds = folds_of(data)
    trials, kept = run_trials({"data": data}, clips, 0.2, QUICK, CPU)
    assert [trial.name for trial in trials] == ["8", "9", "10"]
    assert sorted(np.concatenate([trial.rows for trial in trials])) == list(range(90))
    for trial in trials:
        assert (folds[trial.rows] == trial.name).all()
        assert trial.fitted.n_train + trial.fitted.n_valid + len(trial.rows) == 90
        np.testing.assert_array_equal(trial.scores, predict(trial.fitted.head, data.take(trial.rows)))
    assert kept.n_train + kept.n_valid == 90

    spoilt = Examples(data.names, data.embeddings.copy(), data.targets.copy())
    spoilt.embeddings[folds == "9"] *= -1000
    spoilt.targets[folds == "9"] = np.roll(spoilt.targets[folds == "9"], 1, axis=1)
    others, _ = run_trials({"data": spoilt}, clips, 0.2, QUICK, CPU)
    assert [same(a.fitted.head, b.fitted.head) for a, b in zip(trials, others, strict=True)] == [False, True, False]
    assert others[1].fitted.best_epoch == trials[1].fitted.best_epoch


def test_a_test_part_influences_nothing_and_a_validation_part_only_when_to_stop():
    train, valid, test = clouds(60, 0), clouds(30, 1), clouds(30, 2)
    clips = ProbeSet({}, {"train": train.targets}, LABELS, None)
    how = FitSettings(epochs=60, lr=0.03, patience=60)
    (one,), kept = run_trials({"train": train, "valid": valid, "test": test}, clips, 0.2, how, CPU)
    assert kept is one.fitted
    (two,), _ = run_trials({"train": train, "valid": valid, "test": clouds(9, 3)}, clips, 0.2, how, CPU)
    assert same(one.fitted.head, two.fitted.head)
    wrong = Examples(valid.names, valid.embeddings, np.roll(valid.targets, 1, 1))
    (three,), _ = run_trials({"train": train, "valid": wrong, "test": test}, clips, 0.2, how, CPU)
    assert three.fitted.best_epoch < one.fitted.best_epoch
    assert torch.equal(three.fitted.head.mean, one.fitted.head.mean)
    held_out, _ = run_trials({"train": train, "test": test}, clips, 0.2, how, CPU)
    assert (held_out[0].fitted.n_train, held_out[0].fitted.n_valid) == (48, 12)


@pytest.mark.parametrize(("right", "n"), [(80, 80), (0, 80), (9, 10), (79, 80), (1, 1), (300, 1000)])
def test_an_accuracy_has_wilsons_interval(right, n):
    low, high = wilson_interval(right, n)
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert high - low > 0.04


def test_clips_that_are_all_right_leave_an_interval():
    targets = np.eye(4)[np.arange(80) % 4]
    found = compute_score(targets + 0.1, targets, LABELS, "accuracy", 0)
    assert found.value == 1
    assert found.interval == (pytest.approx(0.9542, abs=1e-4), 1.0)


def test_the_interval_of_map_is_that_of_sets_drawn_one_by_one():
    rng = np.random.default_rng(0)
    targets = np.eye(4)[rng.choice(4, 30, p=[0.5, 0.3, 0.15, 0.05])]  # in some draws a class does not occur
    scores = (targets + rng.normal(0, 0.8, (30, 4))).round(1)  # with equal scores
    values = []
    for weights in draw_weights(30, 50, seed=5):
        for column in weights.T:
            rows = np.repeat(np.arange(30), column.astype(int))
            values.append(evaluate_scores(scores[rows], targets[rows]).mAP)
    assert len(values) == 50
    assert bootstrap_interval(scores, targets, 5, 50) == pytest.approx(np.percentile(values, [2.5, 97.5]))
    assert bootstrap_interval(scores, targets, 6, 50) != pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_draws_are_with_replacement_and_come_in_blocks(monkeypatch):
    whole = np.concatenate(list(draw_weights(40, 30, seed=1)), axis=1)
    assert whole.shape == (40, 30)
    assert (whole.sum(axis=0) == 40).all()
    assert 0.3 < (whole == 0).mean() < 0.44  # 1/e of the clips are not drawn
    monkeypatch.setattr("probing.scores.BLOCK", 280)
    blocks = list(draw_weights(40, 30, seed=1))
    assert [block.shape[1] for block in blocks] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


def test_chance_is_what_a_deaf_head_reaches():
    targets = np.eye(3)[[0, 0, 0, 1]]
    scores = np.random.default_rng(0).random((4, 3))
    assert compute_score(scores, targets, ["x", "y", "z"], "accuracy", 0, 10).chance == 0.75
    assert compute_score(scores, targets, ["x", "y", "z"], "mAP", 0, 10).chance == 0.5


def test_the_picture_tells_classes_and_of_very_many_the_best_and_the_worst():
    rng = np.random.default_rng(0)
    for n_classes, metric, n_names in ((4, "accuracy", 4), (4, "mAP", 4), (90, "mAP", MAX_BARS)):
        targets = np.eye(n_classes)[np.arange(180) % n_classes]
        labels = [f"class {index:02d} $x$" for index in range(n_classes)]
        result = compute_score(targets + rng.normal(0, 0.3, targets.shape), targets, labels, metric, 0, 10)
        axis = draw_probe(result, labels, "title").axes[0]
        names = [tick.get_text() for tick in axis.get_yticklabels()]
        assert len(names) == n_names
        assert axis.get_title().startswith("title")
        if metric == "mAP":
            order = result.metrics.per_class.sort_values("AP", ascending=False, kind="stable")["label"].tolist()
            assert names[0].startswith(order[0])
            assert names[-1].startswith(order[-1])


def test_every_fault_of_the_options_is_reported_at_once():
    faults = Faults("the probe")
    given = {"model": "mn04_as", "embeddings": "a,b", "epoch": 3, "lr": -1, "hidden_sizes": "5,6", "name": "x/y"}
    read_options(ProbeOptions, given | {"data": "a.tsv", "test_data": "b.tsv"}, faults)
    text = "\n".join(faults.sentences)
    for part in (
        "--epoch (did you mean 'epochs'?)",
        "--lr is -1",
        "--name is 'x/y'",
        "STORE, not both",
        "for --head mlp",
    ):
        assert part in text
    assert "drop it, or --train_data" in text
    assert len(faults.sentences) == 6
    mended = read_options(
        ProbeOptions, {"embeddings": "a,b", "head": "mlp", "hidden_sizes": (5, 6), "data": "x", "name": 7}, Faults("")
    )
    assert (mended.embeddings, mended.fitting(1).hidden_sizes, mended.name) == (["a", "b"], (5, 6), "7")


def test_clips_that_stop_the_training_are_of_other_groups(tmp_path, monkeypatch):
    pack = Pack.open(write_pack(tmp_path, [noise(0.1, 16000, i) for i in range(40)], ["a", "b"] * 20))
    pack.table["speaker"] = [f"s{index // 4}" for index in range(40)]
    targets = np.eye(2, dtype=np.float32)[np.arange(40) % 2]
    seen = []

    def spy(train, valid, *rest):
        seen.append((train, valid))
        return fit(train, valid, *rest)

    monkeypatch.setattr("probing.trials.fit", spy)
    clips = ProbeSet({"train": pack}, {"train": targets}, ["a", "b"], None)
    few = np.arange(2)
    whole = Examples(pack.names, targets, targets)
    run_trials({"train": whole, "test": whole.take(few)}, clips, 0.2, QUICK, CPU)
    ((train, valid),) = seen
    speaker = dict(zip(pack.names, pack.table["speaker"], strict=True))
    assert len(valid) == 8
    assert not {speaker[name] for name in train.names} & {speaker[name] for name in valid.names}


def test_the_baseline_of_a_probe_is_that_of_its_clips(tmp_path):
    pitches = [300, 600, 1200]
    sounds = [
        np.sin(np.arange(4000) * 2 * np.pi * pitches[i % 3] / 16000) * 0.3 + noise(0.25, 16000, i) for i in range(36)
    ]
    pack = Pack.open(write_pack(tmp_path, sounds, ["a", "b", "c"] * 12))
    targets = np.eye(3, dtype=np.float32)[np.arange(36) % 3]
    folds = np.repeat(["1", "2", "3"], 12)
    labels = ["a", "b", "c"]
    assert fit_baselines(ProbeSet({"data": pack}, {"data": targets}, labels, folds)) == 1.0
    shuffled = targets[np.random.default_rng(0).permutation(36)]
    assert fit_baselines(ProbeSet({"data": pack}, {"data": shuffled}, labels, folds)) < 0.7
    parts = {"train": pack.subset(np.arange(24)), "test": pack.subset(np.arange(24, 36))}
    parted = {"train": targets[:24], "test": targets[24:]}
    assert fit_baselines(ProbeSet(parts, parted, labels, None)) == 1.0
