"""Mixtures of clips as a transfer set."""

import numpy as np
import pandas as pd

from audio.dataset import Pack
from scripts.benchmarks import mixtures
from scripts.benchmarks.mixtures import mix_clips, write_mixtures


def slow_mixture(clips, rng):
    mixture = [0.0] * len(clips[0])
    for number, clip in enumerate(clips):
        speed, start = 2 ** rng.uniform(-0.4, 0.4), rng.integers(len(clip))
        level = 10 ** (-rng.uniform(0, 15) / 20) if number else 1.0
        for place in range(len(mixture)):
            whole, part = divmod((start + speed * place) % len(clip), 1)
            after = clip[(int(whole) + 1) % len(clip)]
            mixture[place] += level * ((1 - part) * clip[int(whole)] + part * after)
    return np.array(mixture)


def test_a_mixture_is_the_sum_of_repeated_clips_at_their_speeds_and_levels():
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, 300), rng.normal(0, 0.1, 200)]
    expected = slow_mixture(clips, np.random.default_rng(1))
    assert np.abs(expected).max() < 1
    mixed = mix_clips(clips, np.random.default_rng(1))
    assert mixed.dtype == np.int16
    assert np.abs(mixed / 32767 - expected).max() < 1e-4


def test_a_loud_mixture_is_scaled_down_to_full_scale():
    mixed = mix_clips([np.full(100, 0.9), np.full(100, 0.9)], np.random.default_rng(0))
    assert abs(mixed.max()) == 32767


def test_mixtures_have_the_labels_of_their_clips_and_no_other_beside_an_event(tone_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "MIXED", 1.0)
    table = pd.read_csv(tone_pack, sep="\t").astype({"labels": str})
    table["labels"] = table["labels"].where(table["labels"].isin(sorted(set(table["labels"]))[:4]), "other")
    table.to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    source = Pack.open(str(tmp_path / "train.tsv"))
    path = write_mixtures(source, 40, 3, tmp_path / "mixed.tsv", "other")
    pack = Pack.open(str(path))
    assert len(pack) == len(source) + 40
    assert pack.names[: len(source)] == source.names
    labels = list(pack.table["labels"].astype(str))[len(source) :]
    assert {label for label in labels if "other" in label} == {"other"}
    assert any(";" in label for label in labels)
    first = pack.read(len(source)).copy()
    write_mixtures(source, 40, 3, tmp_path / "again.tsv", "other")
    again = Pack.open(str(tmp_path / "again.tsv"))
    assert np.array_equal(again.read(len(source)), first)
