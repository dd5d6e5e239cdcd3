"""Predictions of exported models for packs, with any runtime.

Letters: N clips, C classes.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from audio.dataset import Pack
from audio.io import resample
from common.columns import align_columns
from common.progress import create_progress
from training.labelled import LabelledPack
from training.metrics import evaluate_scores


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
    with create_progress(total=len(pack), desc="evaluate", unit="clip") as progress:
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


def compare_engines(engines: Mapping[str, tuple[ExportedTagger, int]], data: LabelledPack) -> str:
    """Evaluate engines on a labelled pack, one clip at a time, and return a table of mAP, loss, size and time.

    Args:
        engines: name → engine and its size in bytes; losses are relative to the first.
        data: the clips; those that are too long for an engine are cut and averaged.
    """
    rows, reference = [("", "mAP", "loss", "MB", "ms/clip")], None
    for name, (engine, n_bytes) in engines.items():
        scores, seconds = np.zeros((len(data.pack), len(engine.labels)), np.float32), 0.0
        for row in range(len(data.pack)):
            clip = resample(data.pack.read(row), data.pack.sample_rate, engine.sample_rate)
            start = time.perf_counter()
            parts = _cut(clip, engine.max_samples)
            scores[row] = np.average(engine.predict(parts), axis=0, weights=[len(part) for part in parts])
            seconds += time.perf_counter() - start
        value = evaluate_scores(scores, data.multi_hot()).mAP
        loss = "" if reference is None else f"{100 * (reference - value):.2f}"
        reference = value if reference is None else reference
        rows.append((name, f"{value:.4f}", loss, f"{n_bytes / 1e6:.2f}", f"{1000 * seconds / len(scores):.1f}"))
    return (
        f"{align_columns(rows, '<>')}\n{len(data.pack)} clips of {data.pack.manifest}; loss: of mAP against "
        f"{next(iter(engines))}, in points of 0.01"
    )


def _cut(clip: np.ndarray, longest: int | None) -> list[np.ndarray]:
    longest = longest or max(len(clip), 1)
    return [clip[start : start + longest] for start in range(0, len(clip), longest)]
