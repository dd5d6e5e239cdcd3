"""Checks of stored targets: what a store's files may hold, compared before it is used.

A store may come from another machine or another person, and a wrong index or a NaN in one row of a million changes a
student without a word. Metadata are checked when a store is opened, values when they are read.

Letters: N chunks, K stored targets per chunk.
"""

from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.replay import REFERENCE_RATE

MAX_PARTS = 1 << 16  # of an epoch
MAX_CLASSES = 1 << 15  # they are stored as 16-bit integers
MAX_CHUNKS = 1 << 32  # per clip; combines clip and chunk in one number
_BLOCK = 4096  # rows compared at once, which stay in the processor's cache
_HALF_ONE, _HALF_INF = 0x3C00, 0x7C00  # bits of 1 and of infinity in half precision

Count = Annotated[int, Field(ge=1, le=MAX_PARTS)]


class StoreConfig(BaseModel):
    """The settings of a store that its readers use; others are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    chunk_length: float = Field(default=10.0, gt=0, le=1e6)  # seconds
    epochs: int | None = Field(default=None, ge=0)
    model: str | list[str] | None = None


class StoreMeta(BaseModel):
    """The content of meta.json; published stores lack most of it."""

    model_config = ConfigDict(extra="allow", strict=True)

    wavtransforms: dict[str, dict[str, Any] | None] = {}
    spectransforms: list[dict[str, dict[str, Any] | None]] = []
    mask_fill: str = "0dB"
    parts: Count | None = None
    world_size: Count | None = None
    num_classes: int | None = Field(default=None, ge=1, le=MAX_CLASSES)
    labels: list[str] | None = None
    activation: str | None = None
    topk: int | None = Field(default=None, ge=1)
    pack_rate: int | None = Field(default=None, ge=1)
    weights_sha256: str | None = None
    config: StoreConfig = StoreConfig()

    @model_validator(mode="after")
    def _compare_classes(self) -> Self:
        if self.labels is not None and self.num_classes not in (None, len(self.labels)):
            raise ValueError(f"{len(self.labels)} labels for num_classes {self.num_classes}")
        return self


def find_faulty_row(rows: pd.DataFrame, chunk_seconds: float) -> str:
    """Return what is wrong with the rows of a part, in a clause; "" where nothing is.

    Args:
        rows: `filename`, `start`, `end`, and `n_reference` where the store has it.
        chunk_seconds: length of a chunk.
    """
    start, end = (rows[key].to_numpy(np.float64) for key in ("start", "end"))
    invalid = ~(np.isfinite(end) & (start >= 0) & (end > start) & (start < chunk_seconds * MAX_CHUNKS))
    if invalid.any():
        row = int(np.argmax(invalid))
        return f"row {row} is from {start[row]:g} to {end[row]:g} s; expected seconds from 0, the end after the start"
    seconds = end - start
    step = np.spacing(rows["end"].to_numpy(np.float32))  # published seconds are single precision
    if (longer := seconds > chunk_seconds * 1.01 + step).any():
        row = int(np.argmax(longer))
        return f"row {row} has {seconds[row]:g} s; expected chunks of at most {chunk_seconds:g} s"
    if "n_reference" in rows:
        n_reference = rows["n_reference"].to_numpy(np.float64)
        wrong = (n_reference < 1) | (np.abs(n_reference - seconds * REFERENCE_RATE) > 2 + step * REFERENCE_RATE)
        if wrong.any():
            row = int(np.argmax(wrong))
            return (
                f"row {row} has n_reference {n_reference[row]:.0f}; expected {seconds[row] * REFERENCE_RATE:.0f}, its "
                f"{seconds[row]:g} s at {REFERENCE_RATE} Hz"
            )
    return ""


def find_faulty_seed(seeds: np.ndarray) -> str:
    """Return what is wrong with seeds (N,), in a clause; "" where nothing is."""
    lowest = int(seeds.min(initial=0))
    return f"a seed is {lowest}; expected whole numbers from 0" if lowest < 0 else ""


def find_faulty_probability(values: np.ndarray) -> str:
    """Return what is wrong with probabilities (N,K), in a clause; "" where nothing is."""
    if values.dtype == np.float16:
        if int(values.view(np.uint16).max(initial=0)) <= _HALF_ONE:  # the order of bits is that of positive numbers
            return ""
        values = values.astype(np.float32)
    invalid = ~((values >= 0) & (values <= 1))
    if not invalid.any():
        return ""
    row, column = np.argwhere(invalid)[0]
    return f"row {row} has the value {values[row, column]:g}; expected probabilities from 0 to 1"


def find_faulty_class(indexes: np.ndarray, num_classes: int | None) -> str:
    """Return what is wrong with the classes (N,K) of stored values, in a clause; "" where nothing is."""
    lowest, highest = int(indexes.min(initial=0)), int(indexes.max(initial=0))
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        found = lowest if lowest < 0 else highest
        row = int(np.argmax((indexes == found).any(axis=1)))
        expected = "numbers from 0" if num_classes is None else f"0 to {num_classes - 1}"
        return f"row {row} has the class {found}; expected {expected}"
    row = _find_repetition(indexes)
    return f"row {row} has a class twice: {indexes[row].tolist()[:40]}" if row >= 0 else ""


def _find_repetition(indexes: np.ndarray) -> int:
    """Return the first row of (N,K) in which a number is there twice, or -1."""
    for first in range(0, len(indexes), _BLOCK):
        columns = np.ascontiguousarray(indexes[first : first + _BLOCK].T)  # (K,n): whole columns are compared
        distances = range(1, len(columns))
        if len(columns) > 64:  # to compare each pair would take longer than sorting
            columns, distances = np.sort(columns, axis=0), range(1, 2)
        for distance in distances:
            equal = columns[distance:] == columns[:-distance]
            if equal.any():
                return first + int(np.argmax(equal.any(axis=0)))
    return -1


def find_non_finite(values: np.ndarray) -> str:
    """Return which row of embeddings (N,E) has a value that is no number, in a clause; "" where none has."""
    if values.dtype == np.float16:
        # As unsigned numbers, the bits of negative infinity and NaN are the highest; as signed ones, of positive ones.
        negative, positive = int(values.view(np.uint16).max(initial=0)), int(values.view(np.int16).max(initial=0))
        if negative < 0x8000 + _HALF_INF and positive < _HALF_INF:
            return ""
    invalid = ~np.isfinite(values).all(axis=1)
    return f"row {int(np.argmax(invalid))} has values that are not finite" if invalid.any() else ""
