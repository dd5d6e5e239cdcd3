"""Soft-target stores with given values."""

from pathlib import Path

import numpy as np
import pandas as pd

from distill.targets import SoftTargetStore


def write_epoch(
    folder: Path, epoch: int, rank: int, rows: pd.DataFrame, values: np.ndarray, indexes: np.ndarray, seeds: np.ndarray
) -> None:
    """Write one epoch of one rank, whole or not at all.

    Args:
        folder: of the store.
        epoch: counts from 1.
        rank: of the process that made it.
        rows: `filename`, `start`, `end` (seconds), `n_reference` (samples) of the N chunks.
        values: (N, K) probabilities, highest first.
        indexes: (N, K) their classes.
        seeds: (N,) augmentation seeds.
    """
    SoftTargetStore.write(folder, epoch, rank, rows, topk_values=values, topk_indexes=indexes, seeds=seeds)
