"""Cut a stream of samples into windows: the same cuts for a file and a stream, of any length."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from common.errors import UserError
from tagging.base import ContinuedSound


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
        if self.is_last(self._start, self.n_received):
            yield self._start, self._kept[self._start - self._first :]

    def is_last(self, start: int, n_samples: int) -> bool:
        """Whether an incomplete window from `start` on is the last one of a sound of `n_samples` samples."""
        covered = start - self.hop + self.size if start else 0
        return n_samples - max(covered, start) >= (self.shortest if start else 1)


class StateWindows:
    """Probabilities of the same windows, by a model with a state: each is computed while its samples come.

    No samples are kept, so that memory does not depend on the length of windows.

    Args:
        cuts: the windows, without samples so far.
        open_sound: starts a window.
    """

    def __init__(self, cuts: Windows, open_sound: Callable[[], ContinuedSound]) -> None:
        self.cuts, self.open_sound = cuts, open_sound
        self.n_received = 0
        self._open: deque[tuple[int, ContinuedSound]] = deque()  # index of the first sample, and the window
        self._next = 0  # start of the window that is opened next

    def push(self, block: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Add samples (S,) and yield the windows that they complete: first sample, samples, probabilities (C,)."""
        while len(block):
            if self._next == self.n_received:
                self._open.append((self._next, self.open_sound()))
                self._next += self.cuts.hop
            stop = min([self._next, *(start + self.cuts.size for start, _ in self._open)])
            part, block = np.split(block, [stop - self.n_received])
            self.n_received += len(part)
            for _, sound in self._open:
                sound.push(part)
            if self._open and self._open[0][0] + self.cuts.size == self.n_received:
                start, sound = self._open.popleft()
                yield start, self.cuts.size, sound.predict()

    def finish(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield what remains at the end of the sound, if it is in no window yet."""
        if self._open and self.cuts.is_last(self._open[0][0], self.n_received):
            start, sound = self._open[0]
            yield start, self.n_received - start, sound.predict()
