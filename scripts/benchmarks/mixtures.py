"""Mixtures of clips as a transfer set for distillation.

What a teacher knows beyond the labels of a few hundred clips is its output for other sounds: whether a bark is still a
bark in rain, or at another speed. A mixture of labelled clips has no such label. (Hinton, Vinyals, Dean, "Distilling
the knowledge in a neural network", 2015, for transfer sets; Beyer et al., "Knowledge distillation: a good teacher is
patient and consistent", CVPR 2022, for mixtures. The way of mixing is this project's own choice.)

Letters: S samples.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from audio.dataset import Pack
from audio.labels import SEPARATOR, split_labels
from audio.shard_writer import ShardWriter
from common.files import write_text

MIXED = 0.7  # share of mixtures of two clips; the others are one clip at another speed
OCTAVES = 0.4  # speeds are between 2^-OCTAVES and 2^OCTAVES
QUIETER_DB = 15.0  # the second clip is up to this much quieter
FULL_SCALE = 32767


def mix_clips(clips: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Add one or two clips, each at a speed of its own, repeated from a start of its own, the second one quieter.

    Args:
        clips: (S,) each, full scale at 1.0; the length of the first one is that of the mixture.
        rng: draws speeds, starts and the level.

    Returns:
        int16 (S,), scaled down where it would clip.
    """
    n_samples = len(clips[0])
    mixture = np.zeros(n_samples)
    for number, clip in enumerate(clips):
        speed, start = 2 ** rng.uniform(-OCTAVES, OCTAVES), rng.integers(len(clip))
        places = (start + speed * np.arange(n_samples)) % len(clip)
        level = 10 ** (-rng.uniform(0, QUIETER_DB) / 20) if number else 1.0
        mixture += level * np.interp(places, np.arange(len(clip)), clip, period=len(clip))
    peak = np.abs(mixture).max(initial=1.0)
    return np.rint(mixture * (FULL_SCALE / peak)).astype(np.int16)


def write_mixtures(pack: Pack, n_mixtures: int, seed: int, path: Path, negative: str) -> Path:
    """Write mixtures of a pack's clips as a shard, and a list of the pack's clips and of the mixtures.

    A mixture has the labels of its clips, without `negative` beside others.

    Args:
        pack: with the column `labels`.
        n_mixtures: number of mixtures.
        seed: of all draws.
        path: of the list to write; the shard is beside it.
        negative: the label of clips without an event.

    Returns:
        The path of the list.
    """
    rng, rows = np.random.default_rng(seed), []
    shard_path = path.with_suffix(".h5").resolve()
    with ShardWriter(shard_path, pack.sample_rate) as shard:
        for number in range(n_mixtures):
            chosen = rng.choice(len(pack), 2 if rng.random() < MIXED else 1, replace=False).tolist()
            name = f"mixture_{number}"
            shard.append(name, mix_clips([pack.read(row) for row in chosen], rng))
            labels = {label for row in chosen for label in split_labels(str(pack.table["labels"].iloc[row]))}
            labels = (labels - {negative}) or {negative}
            rows.append({"filename": name, "labels": SEPARATOR.join(sorted(labels)), "hdf5path": str(shard_path)})
    table = pd.concat([pack.table, pd.DataFrame(rows)])[["filename", "labels", "hdf5path"]]
    write_text(path, table.to_csv(sep="\t", index=False))
    return path
