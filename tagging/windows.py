"""Cut a stream of samples into windows: the same cuts for a file and a stream, of any length."""

from collections.abc import Iterator

import numpy as np

from common.errors import UserError


class Windows:
    """Cuts samples that come block by block into windows of one length, a fixed hop apart.

    Window k starts at k hops. There is a next one as long as the last one did not reach the end of the sound; the last
    one is what remains. Only samples that a window still needs are kept.

    Args:
        size: samples of a window.
        hop: samples from the start of one window to the next; `size` where they neither overlap nor leave gaps.
        shortest: fewer samples than this behind the last window are dropped (decoders and resamplers add some).

    Raises:
        UserError: a window or a hop of less than one sample.
    """

    def __init__(self, size: int, hop: int, shortest: int = 1) -> None:
        if size < 1 or hop < 1:
            raise UserError(f"windows of {size} samples every {hop} samples: both must be at least 1")
        self.size, self.hop, self.shortest = size, hop, shortest
        self.n_received = 0
        self._start = 0  # of the next window
        self._kept = np.zeros(0, np.float32)  # samples from `_first` on
        self._first = 0

    def push(self, block: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Add samples (S,) and yield the windows that they complete: index of the first sample, samples (size,)."""
        self._kept = np.concatenate([self._kept, block]) if len(self._kept) else block
        self.n_received += len(block)
        while self._start + self.size <= self.n_received:
            offset = self._start - self._first
            window = self._start, self._kept[offset : offset + self.size].copy()  # a view would keep the whole block
            self._start += self.hop
            yield window
        done = min(self._start - self._first, len(self._kept))
        self._kept = self._kept[done:].copy()  # a copy, so that the block is freed
        self._first += done

    def finish(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield what remains at the end of the sound, if it is in no window yet."""
        covered = self._start - self.hop + self.size if self._start else 0
        n_remaining = self.n_received - max(covered, self._start)
        if n_remaining >= (self.shortest if self._start else 1):
            yield self._start, self._kept[self._start - self._first :]
