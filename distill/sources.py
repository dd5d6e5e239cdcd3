"""Where the targets of training come from, behind one face.

A source knows its items (chunks of clips of one pack) and says, for an item in an epoch, which augmentation seed
belongs to it and what its target is. Labels are the simplest source; `distill.targets` holds stored soft targets.
"""

from typing import Protocol

import numpy as np

from distill.replay import REFERENCE_RATE, Replay, epoch_seeds


class TargetSource(Protocol):
    """What a dataset asks of its targets.

    Attributes:
        bounds: (M, 3) int64, one row an item: clip number in the pack, first sample, past-the-last sample.
        n_reference: (M,) int64, each item's length in samples at the reference rate of `distill.replay`.
        replay: the augmentation that the seeds are for.
    """

    bounds: np.ndarray
    n_reference: np.ndarray
    replay: Replay

    def seed(self, epoch: int, item: int) -> int:
        """Return the augmentation seed of `item` in `epoch` (epochs count from 1)."""

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the target of `item` in `epoch`, float32."""


def reference_lengths(bounds: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return how many samples each item of `bounds` (M, 3) at `sample_rate` has at the reference rate, at least 1."""
    n_samples = bounds[:, 2] - bounds[:, 1]
    return np.maximum(1, np.round(n_samples * (REFERENCE_RATE / sample_rate))).astype(np.int64)


class SeededItems:
    """Items with a fresh seed each epoch and no target of their own: what a teacher is shown.

    Args:
        bounds: (M, 3) items, see `TargetSource`.
        sample_rate: of the pack, in hertz.
        replay: the augmentation.
        seed: of the run; the seed of (epoch, item) is a pure function of it.
    """

    def __init__(self, bounds: np.ndarray, sample_rate: int, replay: Replay, seed: int) -> None:
        self.bounds = bounds
        self.n_reference = reference_lengths(bounds, sample_rate)
        self.replay = replay
        self.run_seed = seed
        self._epoch = -1
        self._seeds = np.empty(0, np.int32)

    def seeds(self, epoch: int) -> np.ndarray:
        """Return the seeds of every item in `epoch`, int32 (M,)."""
        if epoch != self._epoch:
            self._epoch, self._seeds = epoch, epoch_seeds(self.run_seed, epoch, len(self.bounds))
        return self._seeds

    def seed(self, epoch: int, item: int) -> int:
        """Return the augmentation seed of `item` in `epoch`."""
        return int(self.seeds(epoch)[item])

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return an empty target."""
        return np.empty(0, np.float32)


class LabelTargets(SeededItems):
    """Targets from the `labels` column: 1 for each class a clip is labelled with, 0 elsewhere.

    Args:
        bounds: (M, 3) items, see `TargetSource`.
        labels: class indices of each clip of the pack.
        num_classes: C, the length of a target.
        sample_rate: of the pack, in hertz.
        replay: the augmentation.
        seed: of the run.
    """

    def __init__(
        self,
        bounds: np.ndarray,
        labels: list[np.ndarray],
        num_classes: int,
        sample_rate: int,
        replay: Replay,
        seed: int,
    ) -> None:
        super().__init__(bounds, sample_rate, replay, seed)
        self.labels = labels
        self.num_classes = num_classes

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the multi-hot target (C,) of `item`, the same in every epoch."""
        target = np.zeros(self.num_classes, np.float32)
        target[self.labels[self.bounds[item, 0]]] = 1.0
        return target
