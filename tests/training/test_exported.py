"""Exported models on labelled packs."""

from types import SimpleNamespace

import numpy as np
import pytest

from audio.dataset import Pack
from tests.training.test_automatic import noise, write_pack
from training.exported import predict_exported


def test_clips_are_cut_and_weighed_by_length(tmp_path):
    lengths = (4000, 1000, 2600, 1000, 3000)
    sounds = [noise(length / 16000, 16000, length) for length in lengths]
    pack = Pack.open(write_pack(tmp_path, sounds, ["a"] * 5))
    seen = []

    def predict(clips):
        seen.append([len(clip) for clip in clips])
        return np.array([[np.abs(clip).mean(), len(clip)] for clip in clips], np.float32)

    tagger = SimpleNamespace(labels=["a", "b"], sample_rate=16000, max_samples=1500, batch_size=2, predict=predict)
    found = predict_exported(tagger, pack)
    for row in range(5):
        assert found[row, 0] == pytest.approx(np.abs(pack.read(row)).mean(), rel=1e-5)
    assert found[:, 1] == pytest.approx([(1500**2 * 2 + 1000**2) / 4000, 1000, (1500**2 + 1100**2) / 2600, 1000, 1500])
    assert sum(map(len, seen)) == 9
    assert max(max(lengths) for lengths in seen) <= 1500
