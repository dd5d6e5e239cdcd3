"""Fits of heads on layers, of neighbours and of prototypes: what they store, learn, and do with few clips."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from common.errors import UserError
from probing.data import ProbeSet
from probing.fit import ChunkRows, Examples, FitSettings, compute_statistics, fit, predict
from probing.trials import count_training_clips, run_trials
from tests.probing.test_probe import CPU, LABELS, clouds, folds_of, same

KNN = FitSettings(kind="knn", neighbours=5)
ON_STEPS = FitSettings(kind="prototypes", prototypes=5, steps=4, epochs=20, lr=2e-2, patience=20)


def events(n, seed, n_steps=4, width=16, chunks=(1, 3)):
    """Clips of noise, with a step of their kind and its opposite in one of several chunks: their mean is nothing."""
    centres = np.random.default_rng(7).standard_normal((4, width)) * 3
    rng = np.random.default_rng(seed)
    kinds, counts = np.arange(n) % 4, rng.integers(chunks[0], chunks[1] + 1, n)
    starts = np.concatenate([[0], np.cumsum(counts)])
    steps = rng.standard_normal((starts[-1], n_steps, width))
    shares = np.concatenate([np.full(count, 1 / count) for count in counts])
    for clip, kind in enumerate(kinds):
        chunk, (one, other) = rng.integers(starts[clip], starts[clip + 1]), rng.permutation(n_steps)[:2]
        steps[chunk, one] += centres[kind]
        steps[chunk, other] -= centres[kind]
    names = [f"{seed}/{clip}.wav" for clip in range(n)]
    values = steps.reshape(len(steps), -1).astype(np.float16)
    return Examples(names, values, np.eye(4, dtype=np.float32)[kinds], ChunkRows(starts, shares))


def test_neighbours_are_those_of_scikit_learn():
    train, test = clouds(120, 0), clouds(60, 1)
    fitted = fit(train, None, LABELS, True, KNN, CPU)
    assert (fitted.n_train, fitted.best_epoch, fitted.valid_loss) == (120, 0, None)
    mean, scale = compute_statistics(train.embeddings)
    reference = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    reference.fit((train.embeddings - mean) / scale, train.targets.argmax(1))
    expected = reference.predict_proba((test.embeddings - mean) / scale)
    np.testing.assert_allclose(predict(fitted.head, test), expected, atol=2e-4)


def test_neighbours_hold_no_clip_out_and_vote_for_each_of_several_labels():
    data = clouds(40, 0)
    clips, folds = folds_of(data)
    trials, kept = run_trials({"data": data}, clips, 0.2, KNN, CPU)
    assert kept.n_train == 40
    for trial in trials:
        assert trial.fitted.n_train == (folds != trial.name).sum()
    both = Examples(data.names, data.embeddings, np.maximum(data.targets, np.roll(data.targets, 1, 1)))
    head = fit(both, None, LABELS, False, KNN, CPU).head
    assert ((predict(head, both) > 0.5) == (both.targets > 0.5)).mean() > 0.8


def test_a_class_of_one_clip_is_a_neighbour_of_it_alone():
    data = clouds(40, 0, spread=0.2)
    rows = np.flatnonzero((data.targets[:, 3] == 0) | (np.arange(40) == 3))
    head = fit(data.take(rows), None, LABELS, True, FitSettings(kind="knn", neighbours=1), CPU).head
    assert predict(head, data.take(np.array([3])))[0].argmax() == 3


def test_prototypes_find_an_event_in_any_chunk_and_a_mean_does_not():
    train, valid, test = (events(n, seed) for n, seed in ((160, 0), (40, 1), (100, 2)))
    kinds = test.targets.argmax(1)
    head = fit(train, valid, LABELS, True, ON_STEPS, CPU).head
    found = predict(head, test)
    assert (found.argmax(1) == kinds).mean() > 0.85
    alone = predict(head, test.take(np.array([5])))
    np.testing.assert_allclose(alone[0], found[5], atol=1e-6)

    def average(clips):
        steps = clips.embeddings.reshape(len(clips.embeddings), 4, -1).mean(1, dtype=np.float32)
        means = np.add.reduceat(steps * clips.chunks.shares[:, None], clips.chunks.starts[:-1])
        return Examples(clips.names, means.astype(np.float32), clips.targets)

    linear = fit(average(train), average(valid), LABELS, True, FitSettings(epochs=60, lr=1e-2), CPU).head
    assert (predict(linear, average(test)).argmax(1) == kinds).mean() < 0.5


def test_the_size_of_a_block_follows_from_the_clip_of_most_chunks(monkeypatch):
    examples = events(40, 1, chunks=(1, 30))
    head = fit(examples, None, LABELS, True, replace(ON_STEPS, epochs=1), CPU).head
    whole, reduce, sizes = predict(head, examples), head.reduce, []
    row = examples.embeddings.shape[1] // head.embed_dim * head.width
    monkeypatch.setattr("probing.fit.BLOCK", 40 * row)
    monkeypatch.setattr(head, "reduce", lambda chunks: sizes.append(len(chunks)) or reduce(chunks))
    np.testing.assert_allclose(predict(head, examples), whole, rtol=1e-5)
    assert max(sizes) <= 40


def test_the_chunks_of_a_clip_stay_together_in_any_choice_of_clips():
    data = events(12, 0)
    rows = np.array([7, 2, 9])
    taken = data.take(rows)
    for place, row in enumerate(rows):
        own = slice(*taken.chunks.starts[place : place + 2])
        there = slice(*data.chunks.starts[row : row + 2])
        np.testing.assert_array_equal(taken.embeddings[own], data.embeddings[there])
        np.testing.assert_array_equal(taken.chunks.shares[own], data.chunks.shares[there])
    assert taken.take(np.array([False, True, False])).names == ["0/2.wav"]


def test_the_weights_of_layers_turn_to_the_layer_that_tells_classes():
    width, rng = 16, np.random.default_rng(0)

    def beside_noise(clips):
        noise = rng.standard_normal((len(clips), 2, width)).astype(np.float32)
        layers = np.concatenate([noise[:, 0], clips.embeddings, noise[:, 1]], 1)
        return Examples(clips.names, layers, clips.targets)

    train, valid, test = (beside_noise(clouds(n, seed, spread=0.5)) for n, seed in ((200, 0), (60, 1), (100, 2)))
    how = FitSettings(epochs=60, lr=1e-2, layers=(0, 4, 9), widths=(width,) * 3)
    head = fit(train, valid, LABELS, True, how, CPU).head
    assert max(head.layer_weights, key=head.layer_weights.get) == 4
    assert (predict(head, test).argmax(1) == test.targets.argmax(1)).mean() > 0.9
    wider = FitSettings(epochs=60, lr=1e-2, layers=(0, 4), widths=(width, 2 * width))
    assert fit(train, valid, LABELS, True, wider, CPU).head.layers[0].in_features == 3 * width


@pytest.mark.parametrize("how", [FitSettings(epochs=3), KNN, ON_STEPS], ids=lambda how: how.kind)
def test_silence_gives_probabilities(how):
    width = 16 * max(how.steps, 1)
    silent = Examples(["a", "b", "c", "d", "e"], np.zeros((5, width), np.float32), np.eye(5, 4, dtype=np.float32))
    found = predict(fit(silent, None, LABELS, True, how, CPU).head, silent)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-4)


def test_the_same_seed_gives_the_same_prototypes():
    data = events(40, 0)
    heads = [fit(data, None, LABELS, True, ON_STEPS, CPU).head for _ in range(2)]
    assert same(*heads)


def test_more_neighbours_than_clips_are_refused():
    with pytest.raises(UserError, match="5 neighbours among 4 training clips"):
        fit(clouds(4, 0), None, LABELS, True, KNN, CPU)
    folds = np.array(["1"] * 7 + ["2"] * 3)
    assert count_training_clips(ProbeSet({}, {"data": np.eye(10)}, LABELS, folds)) == 3
    assert count_training_clips(ProbeSet({}, {"train": np.eye(4), "test": np.eye(9)}, LABELS, None)) == 4


def test_settings_that_only_some_heads_have_do_not_change_the_provenance_of_others():
    assert set(FitSettings().describe()) == {
        *("hidden_sizes", "epochs", "lr", "weight_decay", "dropout", "batch_size", "patience", "seed")
    }
    assert FitSettings(kind="knn", neighbours=3).describe() | {"kind": "knn", "neighbours": 3} == (
        FitSettings(kind="knn", neighbours=3).describe()
    )
