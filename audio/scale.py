"""Floating-point files whose full scale is not 1.0: integers that were stored without scaling.

S samples.
"""

import math
from collections.abc import Iterator

import numpy as np

from common.errors import UserError

LARGEST_SAMPLE = 1e10  # above integers of 32 bits; much larger values overflow in spectra
LOUDEST = 16.0  # 24 dB above full scale: floating-point recordings and mixes stay below
_OVERSHOOT = 1.25  # by which resampling may exceed the largest integer
_MAX_HELD_SECONDS = 60.0  # of values that may be integers or not
_WIDTHS = (16, 24, 32)  # bits


class ScaleError(UserError):
    """The full scale of samples is ambiguous.

    Attributes:
        reason: in a few words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ScaleRestorer:
    """Divides integers that are stored as floating-point values by their full scale.

    Whole numbers alone, some of them beyond 1, are integers; so are values of which most are beyond full scale and the
    largest by more than 24 dB (resampled integers, for example). Their width is 16 bits unless the values are larger.
    Anything else has full scale 1.0, also where single samples exceed it. While all values are -1, 0 or 1, which is
    ambiguous, blocks are held back.

    Attributes:
        full_scale: of the file, 1.0 for sound; None while it is unknown.
    """

    def __init__(self) -> None:
        self.full_scale: float | None = None
        self._seconds = 0.0

    def restore(self, blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield blocks of float32 (S, channels) with full scale 1.0, and their sample rates.

        Raises:
            ScaleError: the full scale of the values is ambiguous, or changes.
        """
        held: list[tuple[np.ndarray, int]] = []
        n_seconds = 0.0
        for block, rate in blocks:
            if self.full_scale is None:
                if not held and not block.any():  # silence has no scale, and a stream may begin with a long one
                    self._seconds += len(block) / rate
                    yield block, rate
                    continue
                held.append((block, rate))
                n_seconds += len(block) / rate
                self.full_scale = _find_full_scale(block)
                if self.full_scale is None and n_seconds < _MAX_HELD_SECONDS:
                    continue
                self.full_scale = self.full_scale or 1.0
                yield from ((self._divide(one), its_rate) for one, its_rate in held)
                held = []
            else:
                self._check(block)
                yield self._divide(block), rate
            self._seconds += len(block) / rate
        yield from held

    def _divide(self, block: np.ndarray) -> np.ndarray:
        return block if self.full_scale == 1.0 else block * np.float32(1 / (self.full_scale or 1.0))

    def _check(self, block: np.ndarray) -> None:
        """Raise `ScaleError` for a block whose full scale is not that of the first."""
        peak = _peak(block)
        assert self.full_scale is not None
        limit = LOUDEST if self.full_scale == 1.0 else self.full_scale * _OVERSHOOT
        if math.isfinite(peak) and peak > limit and _find_full_scale(block) != self.full_scale:
            raise ScaleError(
                f"has values of {peak:.3g} after {self._seconds:.0f} s of much smaller ones, so that its full scale "
                "is ambiguous: store it with full scale 1.0, or as integers"
            )


def _peak(block: np.ndarray) -> float:
    return max(-float(block.min()), float(block.max())) if block.size else 0.0


def _find_full_scale(block: np.ndarray) -> float | None:
    """Return the full scale of a block; None where its values may be integers or not."""
    peak = _peak(block)
    if not math.isfinite(peak) or 0 < peak < 1 or peak > LARGEST_SAMPLE:  # damaged samples are refused by the decoder
        return 1.0
    is_whole = bool((block == np.rint(block)).all())
    if is_whole and peak <= 1:
        return None
    if not is_whole:
        values = np.abs(block)
        if peak <= LOUDEST or np.count_nonzero(values > 1) * 2 < np.count_nonzero(values):
            return 1.0
    for bits in _WIDTHS:
        full_scale = 2.0 ** (bits - 1)
        if peak <= (full_scale if is_whole else full_scale * _OVERSHOOT):
            return full_scale
    raise ScaleError(
        f"has values of up to {peak:.3g}, most of them beyond full scale 1.0, which are not integers of 16, 24 or 32 "
        "bits: store it with full scale 1.0, or as integers"
    )
