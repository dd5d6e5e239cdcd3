"""Chunks of packed clips: clip, first and last sample of each.

N clips, M chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import UserError


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of the clips of a pack; three arrays, which forked processes share.

    Attributes:
        clip: int64 (M,), indices of the clips in the pack.
        start: int64 (M,), first samples.
        stop: int64 (M,), ends (exclusive).
        sample_rate: of the pack, in hertz.
    """

    clip: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sample_rate: int

    @classmethod
    def cut(cls, n_samples: np.ndarray, sample_rate: int, seconds: float, drop_short_tail: bool = True) -> "Chunks":
        """Cut clips as CED does for its soft targets.

        Args:
            n_samples: length of each clip, int (N,).
            sample_rate: in hertz.
            seconds: length of a chunk; the last one of a clip is what remains.
            drop_short_tail: leave out a last chunk shorter than half, unless it is the clip's only one.

        Returns:
            The chunks in the order of clips, then of time. A clip without samples has none.

        Raises:
            UserError: a chunk of less than one sample.
        """
        length = round(seconds * sample_rate)
        if length < 1:
            raise UserError(f"chunks of {seconds} s at {sample_rate} Hz have no samples; give a longer chunk length")
        n_samples = np.asarray(n_samples, dtype=np.int64)
        n_whole, tail = np.divmod(n_samples, length)
        keep_tail = (tail > 0) & ((n_whole == 0) | (2 * tail >= length) | (not drop_short_tail))
        counts = n_whole + keep_tail
        clip = np.repeat(np.arange(len(n_samples)), counts)
        first_of_clip = np.repeat(np.cumsum(counts) - counts, counts)
        start = (np.arange(counts.sum()) - first_of_clip) * length
        return cls(clip, start, np.minimum(start + length, n_samples[clip]), sample_rate)

    @classmethod
    def whole(cls, n_samples: np.ndarray, sample_rate: int) -> "Chunks":
        """Return one chunk a clip, the whole clip; arguments as in `cut`."""
        n_samples = np.asarray(n_samples, dtype=np.int64)
        return cls(np.arange(len(n_samples)), np.zeros_like(n_samples), n_samples, sample_rate)

    def __len__(self) -> int:
        """Return M."""
        return len(self.clip)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """Return clip, start and stop of a chunk as Python integers."""
        return int(self.clip[index]), int(self.start[index]), int(self.stop[index])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Iterate over `chunks[0]`, `chunks[1]`, …."""
        return zip(self.clip.tolist(), self.start.tolist(), self.stop.tolist(), strict=True)

    @property
    def n_samples(self) -> np.ndarray:
        """Length of each chunk in samples, int64 (M,)."""
        return self.stop - self.start

    @property
    def seconds(self) -> np.ndarray:
        """Length of each chunk in seconds, float64 (M,)."""
        return self.n_samples / self.sample_rate

    def select(self, index: np.ndarray) -> "Chunks":
        """Return the chunks of `index`: integers, or a boolean (M,)."""
        return Chunks(self.clip[index], self.start[index], self.stop[index], self.sample_rate)
