"""Clips for packing: decoded by several processes at once, in the order of a list, in memory that has a limit.

S samples.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audio.clip_blocks import ClipBlocks
from audio.errors import AudioReadError
from audio.isolation import IsolatedBlocks, describe_failure
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError

_CLIPS_IN_FLIGHT = 8  # for each worker
_MAX_HELD = 1_000_000_000  # bytes of clips that wait for an earlier one


@dataclass(frozen=True)
class Clip:
    """A decoded clip, or the reason why there is none.

    Attributes:
        samples: int16 (S,), or (2, S) in stereo; None when the file cannot be packed.
        fault: "unreadable", "empty", "nan", or "" when it can.
        reason: the fault in words.
        source_rate: of the file, in Hz.
        silent: every sample is zero.
        clipped: the sound exceeds full scale, or stays at it.
        warnings: other warnings on the file, see `audio.io.AudioBlocks`.
    """

    samples: np.ndarray | None = None
    fault: str = ""
    reason: str = ""
    source_rate: int = 0
    silent: bool = False
    clipped: bool = False
    warnings: dict[str, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Length of the samples in memory."""
        return 0 if self.samples is None else self.samples.nbytes


def load_clip(
    path: str | Path,
    sample_rate: int,
    stereo: bool = False,
    *,
    limits: SoundLimits = DEFAULT_LIMITS,
    isolated: bool = False,
    cancelled: threading.Event | None = None,
) -> Clip:
    """Decode one file for packing; a fault of the file is returned, not raised.

    Args:
        path: a sound file of any kind.
        sample_rate: of the clip, in Hz.
        stereo: two channels.
        limits: of the file and of the clip.
        isolated: decode in another process, see `audio.isolation`.
        cancelled: set by another thread to end the decoding in another process with `CancelledError`.

    Raises:
        DecoderStartError: the machine cannot start another process.
        UserError: its memory has run out, in this process while another one decodes.
    """
    blocks: ClipBlocks | IsolatedBlocks
    if isolated:
        blocks = IsolatedBlocks(path, sample_rate, source=ClipBlocks, limits=limits, cancelled=cancelled, stereo=stereo)
    else:
        blocks = ClipBlocks(path, sample_rate, stereo=stereo, limits=limits)
    held = bytearray()  # grows in place: joining a list of blocks would take twice the memory
    try:
        for block in blocks:
            held += block.data
    except AudioReadError as error:
        return Clip(fault=error.kind, reason=error.reason)
    except Exception as error:  # no file may keep the others from being packed
        if isinstance(error, MemoryError) and isolated:
            raise UserError(f"memory ran out while {path} was read: give fewer --n_workers") from None
        if isolated:  # what the other process does not report is a fault of the machine, or cancelled
            raise
        return Clip(fault="unreadable", reason=describe_failure(error, limits))
    samples = np.frombuffer(held, np.int16)  # (S,) or (S * 2,)
    if stereo:
        samples = np.ascontiguousarray(samples.reshape(-1, 2).T)
    return Clip(samples, "", "", blocks.source_rate, blocks.silent, blocks.clipped, blocks.warnings)


class _MemoryLimit:
    """The bytes of clips that are decoded and not yet yielded, limited in the order of the list."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.n_bytes = 0
        self.position = 0  # of the clip that is yielded next
        self.cancelled = threading.Event()

    def add(self, position: int, n_bytes: int) -> None:
        """Count a clip, and wait until there is room for another; the next one to be yielded does not wait."""
        with self.changed:
            self.n_bytes += n_bytes
            self.changed.wait_for(
                lambda: self.n_bytes <= _MAX_HELD or position <= self.position or self.cancelled.is_set()
            )

    def remove(self, n_bytes: int) -> None:
        """Count a clip that was yielded."""
        with self.changed:
            self.n_bytes -= n_bytes
            self.position += 1
            self.changed.notify_all()

    def cancel(self) -> None:
        """Let all threads end."""
        self.cancelled.set()
        with self.changed:
            self.changed.notify_all()


def load_clips(paths: Sequence[Path], load: Callable[..., Clip], n_workers: int) -> Iterator[Clip]:
    """Yield `load(path)` for each path, in order, computed a window ahead, in memory that has a limit.

    Args:
        paths: sound files.
        load: called with a path, and `cancelled`, by several threads.
        n_workers: calls at once; with 0 they are made one by one in this thread.
    """
    if n_workers == 0:
        yield from map(load, paths)
        return
    memory = _MemoryLimit()

    def load_limited(position: int, path: Path) -> Clip:
        clip = load(path, cancelled=memory.cancelled)
        memory.add(position, clip.n_bytes)
        return clip

    pending: deque[Future[Clip]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for position, path in enumerate(paths):
                pending.append(pool.submit(load_limited, position, path))
                if len(pending) >= n_workers * _CLIPS_IN_FLIGHT:
                    yield _pop_first(pending, memory)
            while pending:
                yield _pop_first(pending, memory)
        finally:
            memory.cancel()
            for future in pending:
                future.cancel()


def _pop_first(pending: deque[Future[Clip]], memory: _MemoryLimit) -> Clip:
    clip = pending.popleft().result()
    memory.remove(clip.n_bytes)
    return clip
