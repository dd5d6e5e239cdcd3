"""The baseline: features against a slow reference, an honest choice, any data, and its place beside a run's figures."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from audio.dataset import Pack
from audio.io import read_audio, to_int16
from audio.shard_writer import ShardWriter
from common.errors import UserError
from tests.training.test_loop import settings, train
from training import baseline as baseline_module
from training import baseline_features
from training.baseline import (
    add_baseline,
    compare_with_baseline,
    fit_baseline,
    fits_in_seconds,
    limit_seconds,
    thin_out,
    training_packs,
)
from training.baseline_features import LogMel, compute_features, compute_log_mel, compute_statistics, frame_ranges
from training.baseline_variants import REGRESSION, SVM, VARIANTS, affordable_variants
from training.holdout import find_groups
from training.labelled import LabelledPack
from training.metrics import evaluate_scores
from training.report import write_report
from training.run_folder import run_identity


def pack_of(folder, clips, sample_rate=8000, name="clips", **columns):
    """Pack clips, float in [-1, 1] or int16."""
    shard = folder / f"{name}.h5"
    names = [f"{name}_{index:03d}.wav" for index in range(len(clips))]
    with ShardWriter(shard, sample_rate) as writer:
        for clip_name, clip in zip(names, clips, strict=True):
            writer.append(clip_name, clip if clip.dtype == np.int16 else to_int16(clip))
    manifest = folder / f"{name}.tsv"
    table = {"filename": names, "hdf5path": [str(shard)] * len(names), **columns}
    pd.DataFrame(table).to_csv(manifest, sep="\t", index=False)
    return Pack.open(manifest)


def labelled(pack, labels, num_classes):
    indices = [np.atleast_1d(np.array(label, dtype=np.int64)) for label in labels]
    return LabelledPack(pack, indices, num_classes)


def tones(folder, labels, name, seconds=0.4, sample_rate=8000, seed=0, noise=0.05, num_classes=4, **columns):
    """A pack of noisy tones; the labels of a clip are its pitches."""
    rng = np.random.default_rng([seed, *name.encode()])
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    clips = []
    for label in labels:
        pitches = [200 * 1.6**kind * rng.uniform(0.97, 1.03) for kind in np.atleast_1d(label)]
        sound = sum(0.2 * np.sin(2 * np.pi * pitch * time) for pitch in pitches)
        clips.append(sound + noise * rng.standard_normal(len(time)))
    return labelled(pack_of(folder, clips, sample_rate, name, **columns), labels, num_classes)


SINGLE = [0, 1, 2, 3] * 6
SEVERAL = [[0], [1, 2], [3], [0, 2], [1], [2, 3]] * 5


def slow_log_mel(sound, sample_rate):
    """One frame, one frequency, one band after the other: Hann window of 32 ms, hop of 10 ms, HTK mels to Nyquist."""
    window, hop = round(0.032 * sample_rate), round(0.01 * sample_rate)
    n_fft = 2 ** math.ceil(math.log2(window))
    half = n_fft // 2
    sound = [*sound, *[0.0] * (half + 1 - len(sound))]
    mel_top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    corners = [700 * (10 ** (mel_top * i / 41 / 2595) - 1) for i in range(42)]
    bins = [k * sample_rate / n_fft for k in range(half + 1)]
    frames = []
    for centre in range(0, len(sound) + 1, hop):
        windowed = np.zeros(n_fft)
        for n in range(window):
            place = centre - half + (n_fft - window) // 2 + n
            place = abs(place)
            place = 2 * (len(sound) - 1) - place if place >= len(sound) else place
            windowed[(n_fft - window) // 2 + n] = sound[place] * (0.5 - 0.5 * math.cos(2 * math.pi * n / window))
        power = [
            abs(np.sum(windowed * np.exp(-2j * np.pi * k * np.arange(n_fft) / n_fft))) ** 2 for k in range(half + 1)
        ]
        bands = []
        for low, mid, high in zip(corners, corners[1:], corners[2:], strict=False):
            total = 0.0
            for hertz, value in zip(bins, power, strict=True):
                total += value * max(0.0, min((hertz - low) / (mid - low), (high - hertz) / (high - mid)))
            bands.append(10 * math.log10(total + 1e-6))
        frames.append(bands)
    return frames


def slow_statistics(frames, n_parts):
    found = []
    for part in range(n_parts):
        own = frames[part * len(frames) // n_parts : (part + 1) * len(frames) // n_parts]
        means = [sum(column) / len(own) for column in zip(*own, strict=True)]
        found += means
        columns = zip(zip(*own, strict=True), means, strict=True)
        found += [math.sqrt(sum((x - mean) ** 2 for x in column) / len(own)) for column, mean in columns]
    return found


def slow_cepstra(frames):
    out = []
    for frame in frames:
        n = len(frame)
        row = []
        for k in range(20):
            total = sum(x * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for i, x in enumerate(frame))
            row.append(total * math.sqrt((1 if k == 0 else 2) / n))
        out.append(row)
    return out


@pytest.mark.parametrize(("sample_rate", "seconds"), [(8000, 0.05), (16000, 0.07), (44100, 0.05), (96000, 0.03)])
def test_features_are_those_of_plain_loops(tmp_path, sample_rate, seconds):
    rng = np.random.default_rng(sample_rate)
    clip = to_int16(0.3 * rng.standard_normal(round(seconds * sample_rate)))
    pack = pack_of(tmp_path, [clip, np.zeros(sample_rate // 10, np.int16)], sample_rate)
    found = compute_features(pack, 600.0)
    frames = slow_log_mel((clip / 32768).tolist(), sample_rate)
    assert {key: table.shape for key, table in found.items()} == {
        ("log-mel", 1): (2, 80),
        ("log-mel", 4): (2, 320),
        ("MFCC", 1): (2, 40),
        ("MFCC", 4): (2, 160),
    }
    for spectrum, expected in (("log-mel", frames), ("MFCC", slow_cepstra(frames))):
        for parts in (1, 4):
            assert np.allclose(found[spectrum, parts][0], slow_statistics(expected, parts), atol=2e-3), (
                spectrum,
                parts,
            )
    assert np.allclose(found["log-mel", 1][1], [-60.0] * 40 + [0.0] * 40)  # silence


def test_a_clip_that_is_computed_in_blocks_is_one_that_is_computed_at_once(tmp_path, monkeypatch):
    pack = pack_of(tmp_path, [0.1 * np.random.default_rng(0).standard_normal(8000 * 12 + 77)])
    front_end = LogMel(8000)
    whole = compute_log_mel(pack, 0, front_end, 600.0)
    assert whole.shape == (12 * 100 + 1, 40)
    monkeypatch.setattr(baseline_features, "BLOCK_FRAMES", 5000)
    assert np.allclose(compute_log_mel(pack, 0, front_end, 600.0), whole, atol=1e-4)
    monkeypatch.setattr(baseline_features, "BLOCK_FRAMES", 1)
    assert np.allclose(compute_log_mel(pack, 0, front_end, 600.0), whole, atol=1e-4)


def test_a_long_clip_is_read_in_stretches_from_all_over_it(tmp_path):
    pack = pack_of(tmp_path, [0.1 * np.random.default_rng(0).standard_normal(8000 * 61)])
    whole, part = (compute_log_mel(pack, 0, LogMel(8000), seconds) for seconds in (600.0, 4.0))
    assert len(part) == 400
    places = [0, 2000, 4001, 6001]
    for index, place in enumerate(places):
        assert np.allclose(part[100 * index : 100 * index + 100], whole[place : place + 100], atol=1e-4)
    hours = 30 * 360_000
    ranges = list(frame_ranges(hours, 1000))
    assert (ranges[0], ranges[-1]) == ((0, 100), (hours - 100, hours))
    assert sum(end - first for first, end in ranges) == 1000
    assert list(frame_ranges(2000, 2000)) == [(0, 1024), (1024, 2000)]


def test_fewer_frames_than_parts_serve_in_several():
    frames = np.array([[1.0], [5.0]])
    assert compute_statistics(frames, 4).tolist() == [1, 0, 1, 0, 5, 0, 5, 0]
    assert compute_statistics(frames, 1).tolist() == [3, 2]


def test_esc10_fold_1_is_what_other_code_reaches(shared, tmp_path):
    """79.8 % over the five folds, 77.5 % on the first, by a logistic regression on log-mels of whole clips."""
    folder = shared / "data" / "esc10"
    table = pd.read_csv(folder / "esc10.tsv", sep="\t", dtype=str)
    labels = sorted(table.category.unique())
    parts = {}
    for name, rows in (("train", table[table.fold != "1"]), ("test", table[table.fold == "1"])):
        clips = [read_audio(folder / path, 16000)[0] for path in rows.filename]
        pack = pack_of(tmp_path, clips, 16000, name, fold=rows.fold.tolist())
        parts[name] = labelled(pack, [labels.index(label) for label in rows.category], 10)
    found = fit_baseline(parts["train"], parts["test"])
    assert str(found.variant) == "logistic regression on log-mel statistics of the whole clip"
    assert found.value == pytest.approx(0.775, abs=0.02)
    assert found.metrics.mAP == pytest.approx(0.817, abs=0.02)
    assert found.n_fitted == 320
    assert "79.8" not in found.sentence
    assert f"{100 * found.value:.1f} %" in found.sentence
    assert "fitted to 320 clips in " in found.sentence
    assert "4-fold cross-validation of the training clips, each `fold` in one fold" in found.sentence


def noisy(folder, **columns):
    """Tones in so much noise that the variants differ."""
    labels = [0, 1, 2, 3] * 8
    return (
        tones(folder, labels, "train", noise=2.0, **columns),
        tones(folder, labels, "test", noise=2.0),
        tones(folder, labels, "valid", noise=2.0),
    )


@pytest.mark.parametrize("with_valid", [False, True])
def test_the_choice_does_not_see_the_labels_of_the_test_clips(tmp_path, with_valid):
    train_part, test, valid = noisy(tmp_path)
    honest = fit_baseline(train_part, test, valid if with_valid else None)
    assert len({round(value, 9) for _, value in honest.choices}) > 2
    on_test = []  # what a choice by the test clips would have taken
    for variant in VARIANTS:
        only = pytest.MonkeyPatch()
        only.setattr(baseline_module, "affordable_variants", lambda *_, variant=variant: [variant])
        on_test.append(fit_baseline(train_part, test, valid if with_valid else None).value)
        only.undo()
    assert honest.value == on_test[VARIANTS.index(honest.variant)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(test.labels))
        shuffled = LabelledPack(test.pack, [test.labels[row] for row in order], 4)
        other = fit_baseline(train_part, shuffled, valid if with_valid else None)
        assert other.variant == honest.variant
        assert other.choices == honest.choices
        assert np.array_equal(other.scores, honest.scores)
        assert other.metrics.mAP != honest.metrics.mAP


def test_a_validation_pack_chooses_and_is_then_fitted_to(tmp_path):
    train_part, test, valid = noisy(tmp_path)
    found = fit_baseline(train_part, test, valid)
    assert found.n_fitted == 64
    values = [value for _, value in found.choices]
    assert found.variant == VARIANTS[int(np.argmax(values))]
    # of each variant: fitted to the training clips alone, judged on the validation clips
    alone = fit_baseline(train_part, valid)
    assert alone.value == dict(found.choices)[alone.variant]
    order = np.random.default_rng(0).permutation(32)
    other = fit_baseline(train_part, test, LabelledPack(valid.pack, [valid.labels[row] for row in order], 4))
    assert other.choices != found.choices
    assert "chosen of 8 variants on 32 validation clips, which are then used for fitting as well" in found.sentence


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL], ids=["one label", "several"])
def test_the_same_data_give_the_same_bits_with_any_number_of_threads(tmp_path, labels):
    train_part, test = tones(tmp_path, labels, "train", noise=1.0), tones(tmp_path, labels, "test", noise=1.0)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        np.random.seed(threads)  # noqa: NPY002 - the global state is no part of it
        found.append(fit_baseline(train_part, test))
    assert torch.get_num_threads() == 3  # what it set is set back
    torch.set_num_threads(before)
    for other in found[1:]:
        assert np.array_equal(other.scores, found[0].scores)
        assert other.choices == found[0].choices


def test_several_labels_are_evaluated_by_map(tmp_path):
    train_part, test = tones(tmp_path, SEVERAL, "train"), tones(tmp_path, SEVERAL, "test")
    found = fit_baseline(train_part, test)
    assert (found.metric, found.choice_metric) == ("mAP", "mAP")
    assert found.value == evaluate_scores(found.scores, test.multi_hot()).mAP
    assert found.value > 0.95
    assert found.scores.shape == (30, 4)
    assert f"mAP {found.value:.4f}, fitted to 30 clips" in found.sentence


@pytest.mark.parametrize("sample_rate", [8000, 22050, 96000])
def test_any_rate_and_any_length(tmp_path, sample_rate):
    train_part = tones(tmp_path, SINGLE, "train", sample_rate=sample_rate, num_classes=4)
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, sample_rate // 20, 3 * sample_rate]
    clips = [0.1 * rng.standard_normal(length) for length in lengths] + [np.zeros(sample_rate, np.int16)]
    test = labelled(pack_of(tmp_path, clips, sample_rate, "test"), [0, 1, 2, 3, 0, 1], 4)
    for first, second in ((train_part, test), (test, train_part)):
        found = fit_baseline(first, second)
        assert np.isfinite(found.scores).all()
    assert fit_baseline(train_part, tones(tmp_path, SINGLE, "own", sample_rate=sample_rate)).value == 1.0


def test_small_and_odd_sets_have_a_figure(tmp_path):
    test = tones(tmp_path, [0, 1, 2, 3], "test")
    one_class = fit_baseline(tones(tmp_path, [2] * 6, "one"), test)
    assert one_class.value == 0.25
    assert (one_class.scores.argmax(axis=1) == 2).all()
    few = fit_baseline(tones(tmp_path, [0, 1, 2], "few"), test)
    assert "too few clips to compare them" in few.sentence
    assert few.variant == VARIANTS[0]
    assert 3 not in few.scores.argmax(axis=1)  # in no training clip
    assert fit_baseline(tones(tmp_path, [1], "single"), test).value == 0.25
    assert fit_baseline(tones(tmp_path, [0, 0, 0, 1], "rare"), test).metric == "accuracy"
    present = fit_baseline(tones(tmp_path, SINGLE, "all"), tones(tmp_path, [1, 1, 3], "two"))
    assert (present.metrics.n_classes_scored, present.value) == (2, 1.0)
    silent = labelled(pack_of(tmp_path, [np.zeros(4000, np.int16)] * 8, name="silent"), [0, 1] * 4, 4)
    assert fit_baseline(silent, silent).value == 0.5
    everywhere = [[0, 1], [0, 2], [0, 3], [0]] * 3  # one class in all clips
    assert np.isfinite(fit_baseline(tones(tmp_path, everywhere, "every"), test).scores).all()
    mixed = fit_baseline(tones(tmp_path, SINGLE, "whole"), tones(tmp_path, SEVERAL, "several"))
    assert (mixed.choice_metric, mixed.metric) == ("accuracy", "mAP")


def test_packs_that_do_not_go_together_are_reported_in_a_sentence(tmp_path):
    train_part = tones(tmp_path, SINGLE, "train")
    with pytest.raises(UserError, match=r"same sample rate in Hz; found 8000 in .*train\.tsv, 16000 in .*test\.tsv"):
        fit_baseline(train_part, tones(tmp_path, SINGLE, "test", sample_rate=16000))
    with pytest.raises(UserError, match=r"same number of classes; found 4 in .*train\.tsv, 9 in .*other\.tsv"):
        fit_baseline(train_part, tones(tmp_path, SINGLE, "other", num_classes=9))


def test_many_clips_are_thinned_out_class_by_class_whatever_their_order(tmp_path, monkeypatch):
    labels = [0] * 40 + [1] * 20 + [2] * 2 + [3]
    data = tones(tmp_path, labels, "train", seconds=0.05)
    few = thin_out(data, 16)
    counts = np.bincount(np.concatenate(few.labels), minlength=4)
    assert counts.sum() == 16
    assert (counts[:2] == [9, 5]).all()
    assert (counts[2:] == 1).all()
    order = np.random.default_rng(0).permutation(63)
    shuffled = LabelledPack(data.pack.subset(order), [data.labels[row] for row in order], 4)
    assert sorted(thin_out(shuffled, 16).pack.names) == sorted(few.pack.names)
    for name, label in zip(few.pack.names, few.labels, strict=True):
        assert label.tolist() == [labels[data.pack.names.index(name)]]
    assert thin_out(data, 63) is data
    monkeypatch.setattr(baseline_module, "MAX_CLIPS", 16)
    found = fit_baseline(data, data)
    assert found.n_fitted == 16
    assert "16 of 63 training clips were used, chosen by the hash of their names" in found.sentence
    assert found.metrics.n_clips == 63  # all test clips are judged


@pytest.mark.parametrize("column", ["group", "speaker", "fold"])
def test_clips_of_a_group_are_never_on_both_sides(tmp_path, column):
    groups = [f"g{index % 7}" for index in range(22)] + ["", ""]
    data = tones(tmp_path, SINGLE, "train", **{column: groups})
    name, found = find_groups(data.pack, baseline_module.SPLIT_COLUMNS)
    folds = list(baseline_module._folds(data, found))
    assert name == column
    assert len(folds) == 5
    assert (np.sum(folds, axis=0) == 1).all()
    for fold in folds:
        assert not ({*np.array(groups)[fold]} & {*np.array(groups)[~fold]}) - {""}


def test_folds_without_groups_hold_every_class(tmp_path):
    data = tones(tmp_path, SINGLE, "train", group=["same"] * 24)
    name, groups = find_groups(data.pack, baseline_module.SPLIT_COLUMNS)
    folds = list(baseline_module._folds(data, groups))
    assert name is None
    assert (np.sum(folds, axis=0) == 1).all()
    for fold in folds:
        assert {int(data.labels[row][0]) for row in np.flatnonzero(fold)} == {0, 1, 2, 3}


def test_costly_variants_are_left_out_and_it_is_reported(tmp_path, monkeypatch):
    assert affordable_variants(4000, 50, single=True) == list(VARIANTS)
    assert affordable_variants(400, 50, single=False) == list(VARIANTS)
    assert {variant.model for variant in affordable_variants(4000, 50, single=False)} == {REGRESSION}
    many = affordable_variants(4000, 527, single=False)
    assert [(variant.spectrum, variant.parts, variant.model) for variant in many] == [
        ("log-mel", 1, REGRESSION),
        ("MFCC", 1, REGRESSION),
    ]
    assert SVM in {variant.model for variant in affordable_variants(4000, 10, single=True)}
    monkeypatch.setattr("training.baseline_variants.MAX_SVM_WORK", {True: 10, False: 10})
    data = tones(tmp_path, SEVERAL, "train", num_classes=500)  # of which four occur
    assert (
        "only logistic regression was fitted, since there are 4 classes of 30 clips"
        in fit_baseline(data, data).sentence
    )


def test_how_much_is_read_depends_on_how_much_there_is():
    assert limit_seconds(10) == 600
    assert limit_seconds(100) == 360
    assert limit_seconds(4000) == 10
    assert fits_in_seconds(320 + 80, 0.6)
    assert fits_in_seconds(4000 + 10_000, 36)
    assert not fits_in_seconds(4000 + 20_000, 66)
    assert not fits_in_seconds(4000 + 10_000, 36, sample_rate=32000)
    assert not fits_in_seconds(90_000, 1)


class BigPack:
    """The face of a pack of many clips, whose sounds must not be read."""

    manifest, sample_rate = "big.tsv", 16000

    def __init__(self, n_clips, seconds):
        self.names = [f"{index}.wav" for index in range(n_clips)]
        self.n_samples = np.full(n_clips, seconds * 16000)
        self.table = pd.DataFrame({"filename": self.names, "labels": "0"})

    def __len__(self):
        return len(self.names)


def test_data_of_the_size_of_audioset_are_skipped_before_anything_is_read():
    test = LabelledPack(BigPack(20_000, 10), [], 527)
    data = SimpleNamespace(pack=BigPack(22_000, 10), evaluation=test, valid=None, labels=["a"])
    with pytest.raises(UserError, match="22,000 training and 20,000 test clips are too many"):
        training_packs(data)


def read_report(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_ends_with_the_baseline_beside_its_figures_and_learns_the_same(tone_pack, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    short = {"epochs": 1, "valid_every": 1, "init_from_data": False}
    result, run = train(tmp_path / "with", settings(tone_pack, **short))
    stored = json.loads((tmp_path / "with" / "baseline.json").read_text())
    assert stored["metric"] == "accuracy"
    assert stored["clips_fitted"] == 28
    assert stored["value"] == 1.0
    assert len(stored["choices"]) == 8
    assert result["top1"] < 1.0
    assert stored["sentence"] in caplog.text
    message = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(line.startswith(f"the model is BELOW THE BASELINE: {100 * result['top1']:.1f} %,") for line in message)
    page = read_report(tmp_path / "with")
    assert stored["sentence"] in page
    assert "BELOW THE BASELINE" in page
    assert "<th>baseline</th>" in page
    assert f"<td>{result['top1']:.4f}</td><td>1.0000</td>" in page

    other, plain = train(tmp_path / "without", settings(tone_pack, baseline=False, **short))
    assert not (tmp_path / "without" / "baseline.json").exists()
    assert "<th>baseline</th>" not in read_report(tmp_path / "without")
    assert other | {"weights": ""} == result | {"weights": ""}
    weights = plain.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in run.model.state_dict().items())
    identities = [run_identity(settings(tone_pack, baseline=wanted), 1, {}) for wanted in (True, False)]
    assert identities[0] == identities[1]


def test_a_run_that_is_better_is_not_warned_of(tmp_path):
    data = tones(tmp_path, SINGLE, "train", noise=3.0)
    found = fit_baseline(data, tones(tmp_path, SINGLE, "test", noise=3.0))
    perfect = evaluate_scores(data.multi_hot(), data.multi_hot())
    assert found.value < 1
    assert compare_with_baseline(perfect, found) is None
    assert compare_with_baseline(found.metrics, found) is None
    page = write_report(
        tmp_path,
        title="t",
        facts={},
        config={},
        entries=[],
        results=perfect,
        results_name="r",
        selection="s",
        baseline=found,
    ).read_text(encoding="utf-8")
    assert f"<td>1.0000</td><td>{found.value:.4f}</td>" in page
    assert "BELOW" not in page


def test_a_baseline_that_cannot_be_or_fails_is_one_line_of_the_log(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    test = tones(tmp_path, SINGLE, "test")
    bare = SimpleNamespace(pack=pack_of(tmp_path, [np.ones(100, np.int16)], name="bare"), evaluation=test, valid=None)
    bare.labels = list("abcd")
    metrics = evaluate_scores(test.multi_hot(), test.multi_hot())
    assert add_baseline(bare, metrics, tmp_path) is None
    assert "no baseline: " in caplog.text
    assert "bare.tsv has no `labels` column" in caplog.text
    other = SimpleNamespace(
        pack=pack_of(tmp_path, [np.ones(100, np.int16)], name="o", labels=["z"]),
        evaluation=test,
        valid=None,
        labels=list("abcd"),
    )
    assert add_baseline(other, metrics, tmp_path) is None
    assert "o.tsv are not all classes of this run" in caplog.text

    def fail(*_):
        raise ValueError("numbers")

    monkeypatch.setattr(baseline_module, "fit_baseline", fail)
    good = SimpleNamespace(pack=tones(tmp_path, SINGLE, "good").pack, labels=list("abcd"))
    good.pack.table["labels"] = list("abcd") * 6
    good.evaluation, good.valid = test, None
    assert add_baseline(good, metrics, tmp_path) is None
    assert "no baseline: it failed (ValueError: numbers)" in caplog.text
    assert not (tmp_path / "baseline.json").exists()


def test_what_chose_the_checkpoint_chooses_the_baseline(tmp_path):
    train_part, test, valid = (tones(tmp_path, SINGLE, name) for name in ("train", "test", "valid"))
    train_part.pack.table["labels"] = list("abcd") * 6
    held = LabelledPack(train_part.pack.subset(np.arange(6)), train_part.labels[:6], 4)
    for given, expected in ((None, None), (test, None), (held, None), (valid, valid)):
        data = SimpleNamespace(pack=train_part.pack, evaluation=test, valid=given, labels=list("abcd"))
        found = training_packs(data)
        assert found[2] is expected
        assert len(found[0].pack) == 24
        assert found[1] is test
