"""Checks of stored targets: what a store's files may hold, compared before it is used.

A store may come from another machine or another person, and a wrong index or a NaN in one row of a million changes a
student without a word. Metadata are checked when a store is opened, values when they are read.

Letters: N chunks, K stored targets per chunk.
"""

from typing import Annotated, Any, NamedTuple, Self

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


class RowFault(NamedTuple):
    """What is wrong with a row, in a clause that follows its name."""

    row: int
    what: str


def find_faulty_row(rows: pd.DataFrame, chunk_seconds: float) -> RowFault | None:
    """Find the first fault in the rows of a part.

    Args:
        rows: `filename`, `start`, `end`, and `n_reference` where the store has it.
        chunk_seconds: length of a chunk.
    """
    start, end = (rows[key].to_numpy(np.float64) for key in ("start", "end"))
    is_valid = np.isfinite(end) & (start >= 0) & (end > start) & (start < chunk_seconds * MAX_CHUNKS)
    if (row := _find_first(~is_valid)) >= 0:
        found = f"{start[row]:g} to {end[row]:g} s"
        return RowFault(row, f"is from {found}; expected seconds from 0, the end after the start")
    seconds = end - start
    step = np.spacing(rows["end"].to_numpy(np.float32))  # published seconds are single precision
    if (row := _find_first(seconds > chunk_seconds * 1.01 + step)) >= 0:
        return RowFault(row, f"has {seconds[row]:g} s; expected chunks of at most {chunk_seconds:g} s")
    if "n_reference" in rows:
        n_reference = rows["n_reference"].to_numpy(np.float64)
        is_wrong = (n_reference < 1) | (np.abs(n_reference - seconds * REFERENCE_RATE) > 2 + step * REFERENCE_RATE)
        if (row := _find_first(is_wrong)) >= 0:
            expected = f"{seconds[row] * REFERENCE_RATE:.0f}, its {seconds[row]:g} s at {REFERENCE_RATE} Hz"
            return RowFault(row, f"has n_reference {n_reference[row]:.0f}; expected {expected}")
    return None


def find_faulty_seed(seeds: np.ndarray) -> RowFault | None:
    """Find a seed of (N,) that no generator takes."""
    if int(seeds.min(initial=0)) >= 0 and int(seeds.max(initial=0)) < 1 << 63:
        return None
    row = _find_first((seeds < 0) | (seeds >= 1 << 63))
    return RowFault(row, f"has the seed {seeds[row]}; expected a whole number from 0")


def find_faulty_probability(values: np.ndarray) -> RowFault | None:
    """Find a value of (N,K) that is no probability."""
    # In half precision, the order of the bits is that of positive numbers, and negative ones and NaN come after 1.
    if values.dtype == np.float16 and int(values.view(np.uint16).max(initial=0)) <= _HALF_ONE:
        return None
    values = values.astype(np.promote_types(values.dtype, np.float32))
    is_valid = (values >= 0) & (values <= 1)
    if (row := _find_first(~is_valid.all(axis=1))) < 0:
        return None
    return RowFault(row, f"has the value {values[row][~is_valid[row]][0]:g}; expected probabilities from 0 to 1")


def find_faulty_class(indexes: np.ndarray, num_classes: int | None) -> RowFault | None:
    """Find a class of (N,K) that there is not, or that a row has twice."""
    lowest, highest = int(indexes.min(initial=0)), int(indexes.max(initial=0))
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        found = lowest if lowest < 0 else highest
        expected = "numbers from 0" if num_classes is None else f"0 to {num_classes - 1}"
        row = _find_first(np.equal(indexes, found).any(axis=1))
        return RowFault(row, f"has the class {found}; expected {expected}")
    row = _find_repetition(indexes)
    return RowFault(row, f"has a class twice: {indexes[row].tolist()[:40]}") if row >= 0 else None


def find_non_finite(values: np.ndarray) -> RowFault | None:
    """Find an embedding of (N,E) with a value that is infinite or NaN."""
    if values.dtype == np.float16:
        # As unsigned numbers, the bits of negative infinity and NaN are the highest; as signed ones, of positive ones.
        negative, positive = int(values.view(np.uint16).max(initial=0)), int(values.view(np.int16).max(initial=0))
        if negative < 0x8000 + _HALF_INF and positive < _HALF_INF:
            return None
    row = _find_first(~np.isfinite(values).all(axis=1))
    return (
        RowFault(row, "has values that are not finite (the largest in half precision is 65504)") if row >= 0 else None
    )


def _find_first(found: Any) -> int:
    """Return the first position of (N,) that is true, or -1."""
    return int(np.argmax(found)) if found.any() else -1


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
