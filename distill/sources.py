"""Sources of the targets of training: the common interface, and labels.

A source has items (chunks of the clips of one pack), and for an item in an epoch an augmentation seed and a target.
Stored soft targets are in `distill.targets`, embeddings in `distill.embeddings`.
"""

from typing import Protocol

import numpy as np

from audio.cutting import Chunks
from distill.replay import REFERENCE_RATE, Replay, draw_epoch_seeds


class TargetSource(Protocol):
    """Interface of the targets of a dataset.

    Attributes:
        chunks: M, one an item.
        n_reference: (M,) int64, each item's length in samples at the reference rate of `distill.replay`.
        replay: the augmentation that the seeds are for.
    """

    chunks: Chunks
    n_reference: np.ndarray
    replay: Replay

    def seed(self, epoch: int, item: int) -> int:
        """Return the augmentation seed of `item` in `epoch` (epochs count from 1)."""

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the target of `item` in `epoch`, float32."""


def compute_reference_lengths(chunks: Chunks) -> np.ndarray:
    """Return the number of samples of each chunk at the reference rate, at least 1: int64 (M,)."""
    return np.maximum(1, np.round(chunks.n_samples * (REFERENCE_RATE / chunks.sample_rate))).astype(np.int64)


class SeededItems:
    """Items with a new seed in each epoch and without targets, as the input of a teacher.

    Args:
        chunks: M, one an item.
        replay: the augmentation.
        seed: of the run; the seed of an item is a function of it, the epoch and the item.
    """

    def __init__(self, chunks: Chunks, replay: Replay, seed: int) -> None:
        self.chunks = chunks
        self.n_reference = compute_reference_lengths(chunks)
        self.replay = replay
        self.run_seed = seed
        self._epoch = -1
        self._seeds = np.empty(0, np.int32)

    def seeds(self, epoch: int) -> np.ndarray:
        """Return the seeds of every item in `epoch`, int32 (M,)."""
        if epoch != self._epoch:
            self._epoch, self._seeds = epoch, draw_epoch_seeds(self.run_seed, epoch, len(self.chunks))
        return self._seeds

    def seed(self, epoch: int, item: int) -> int:
        """Return the augmentation seed of `item` in `epoch`."""
        return int(self.seeds(epoch)[item])

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return an empty target."""
        return np.empty(0, np.float32)


class LabelTargets(SeededItems):
    """Targets from the `labels` column: 1 for each class of a clip, 0 elsewhere.

    Args:
        chunks: M, one an item.
        labels: class indices of each clip of the pack.
        num_classes: C, the length of a target.
        replay: the augmentation.
        seed: of the run.
    """

    def __init__(
        self,
        chunks: Chunks,
        labels: list[np.ndarray],
        num_classes: int,
        replay: Replay,
        seed: int,
    ) -> None:
        super().__init__(chunks, replay, seed)
        self.labels = labels
        self.num_classes = num_classes

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the multi-hot target (C,) of `item`, the same in every epoch."""
        target = np.zeros(self.num_classes, np.float32)
        target[self.labels[self.chunks.clip[item]]] = 1.0
        return target
