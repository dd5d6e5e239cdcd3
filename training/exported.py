"""Predictions of exported models for packs, with any runtime.

Letters: N clips, C classes.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tqdm import tqdm

from audio.dataset import Pack
from audio.io import resample


class ExportedTagger(Protocol):
    """Interface of an exported model in a runtime, see `tagging.engines.Engine`.

    Attributes:
        labels: names of the C classes.
        sample_rate: of its input, in hertz.
        max_samples: length of the longest input, None for any length.
        batch_size: recommended number of clips a call.
    """

    labels: list[str]
    sample_rate: int
    max_samples: int | None
    batch_size: int

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Tag clips, float32 (S,) each and of any length: probabilities, float32 (B,C)."""


def predict_exported(tagger: ExportedTagger, pack: Pack) -> np.ndarray:
    """Return the probabilities (N,C) of every clip of `pack`, whole clips, in its order.

    Clips that are too long for the model are cut, and the parts are averaged, weighted by their lengths.
    """
    results = np.zeros((len(pack), len(tagger.labels)))
    order = np.argsort(pack.n_samples, kind="stable")  # clips of one length are computed together
    with tqdm(total=len(pack), desc="evaluate", unit="clip", leave=False, mininterval=_interval()) as progress:
        for start in range(0, len(pack), tagger.batch_size):
            rows = order[start : start + tagger.batch_size]
            clips = [resample(pack.read(int(row)), pack.sample_rate, tagger.sample_rate) for row in rows]
            parts = [part for clip in clips for part in _cut(clip, tagger.max_samples)]
            owners = np.repeat(rows, [len(_cut(clip, tagger.max_samples)) for clip in clips])
            lengths = np.array([len(part) for part in parts], np.float64)
            shares = lengths / np.bincount(owners, lengths)[owners]
            np.add.at(results, owners, tagger.predict(parts) * shares[:, None])
            progress.update(len(rows))
    return results.astype(np.float32)


def _cut(clip: np.ndarray, longest: int | None) -> list[np.ndarray]:
    longest = longest or max(len(clip), 1)
    return [clip[start : start + longest] for start in range(0, len(clip), longest)]


def _interval() -> float:
    return 0.1 if sys.stderr.isatty() else 30
