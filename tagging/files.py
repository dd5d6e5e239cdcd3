"""Tag sound files of any format and length, in batches of windows across files.

Decoders are processes, each with a thread that cuts windows; engines are threads. Between them is a pool of at most
some hundred windows, so that memory depends on neither the number of files nor their length.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audio.errors import AudioReadError
from audio.isolation import CancelledError, IsolatedBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError
from tagging.base import Engine
from tagging.engines import TorchEngine
from tagging.windows import Windows

MAX_LENGTH_RATIO = 1.25  # of the clips of a batch: more would be spent on padding
MIN_TAIL_SECONDS = 0.1  # of the last window of a file that has others
TYPICAL_SECONDS = 10.0  # of a window; fewer of longer ones make a batch and are held
MAX_FILES_AHEAD = 256  # begun before the file that is returned next


@dataclass
class TaggedWindow:
    """A window of a file, from `start` to `end` seconds.

    Attributes:
        tags: labels with their probabilities, best first.
        embedding: of the window (E,), if requested.
        frames: embeddings of its time steps (T',E) float16, if requested.
    """

    start: float
    end: float
    tags: list[tuple[str, float]] = field(default_factory=list)
    embedding: np.ndarray | None = None
    frames: np.ndarray | None = None


@dataclass
class TaggedFile:
    """A file with its windows in order.

    Attributes:
        path: as it was given.
        windows: none where there is a fault.
        fault: why it could not be read, None where it could.
        warnings: kind → sentence on a file that could be read, see `audio.io.AudioBlocks`.
    """

    path: Path
    windows: list[TaggedWindow] = field(default_factory=list)
    fault: str | None = None
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TagOptions:
    """What to keep of a window's probabilities.

    Attributes:
        top_k: this many labels, all where None.
        threshold: only labels of at least this probability.
        embeddings: embed the windows; the engine must be a `TorchEngine`.
    """

    top_k: int | None = 3
    threshold: float | None = None
    embeddings: bool = False

    def select(self, probabilities: np.ndarray, labels: list[str]) -> list[tuple[str, float]]:
        """Select tags from the probabilities (C,) of a window."""
        k = min(self.top_k or len(labels), len(labels))
        best = np.argsort(-probabilities, kind="stable")[:k]
        if self.threshold is not None:
            best = best[probabilities[best] >= self.threshold]
        return [(labels[i], float(probabilities[i])) for i in best]


@dataclass
class _PendingFile:
    """A file that is being tagged."""

    tagged: TaggedFile
    decoded: bool = False
    n_pending: int = 0  # windows decoded and not yet tagged


@dataclass
class _PendingWindow:
    """A window that is not yet tagged."""

    file: _PendingFile
    window: TaggedWindow
    samples: np.ndarray


class WindowPool:
    """The windows between decoders and engines, and the files they belong to; all state is behind one lock.

    Args:
        paths: the files.
        capacity: windows in the pool, where they have at most `typical` samples.
        typical: samples; the pool holds at most `capacity * typical`.
        on_window: called with the seconds of each window that was tagged.
    """

    def __init__(self, paths: Iterable[Path], capacity: int, typical: int, on_window: Callable[[float], None]) -> None:
        self.paths = iter(paths)
        self.capacity, self.typical = capacity, typical
        self.on_window = on_window
        self.changed = threading.Condition()
        self.files: deque[_PendingFile] = deque()  # in order, not yet returned
        self.windows: list[_PendingWindow] = []  # oldest first
        self.all_begun = False
        self.stopped = False
        self.cancelled = threading.Event()  # as `stopped`, for decoders
        self.error: BaseException | None = None

    def next_file(self) -> _PendingFile | None:
        """Return the next file to decode, or None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.files) < MAX_FILES_AHEAD or self.stopped)
            path = None if self.stopped else next(self.paths, None)
            if path is None:
                self.all_begun = True
                self.changed.notify_all()
                return None
            file = _PendingFile(TaggedFile(path))
            self.files.append(file)
            return file

    def put(self, pending: _PendingWindow) -> bool:
        """Add a decoded window; blocks while the pool is full. Returns False after `stop`."""
        with self.changed:
            self.changed.wait_for(lambda: self._has_space(len(pending.samples)) or self.stopped)
            pending.file.n_pending += 1
            pending.file.tagged.windows.append(pending.window)
            self.windows.append(pending)
            self.changed.notify_all()
            return not self.stopped

    def finish_file(self, file: _PendingFile, fault: str | None, warnings: dict[str, str]) -> None:
        """Mark a file as decoded."""
        with self.changed:
            file.decoded, file.tagged.fault, file.tagged.warnings = True, fault, warnings
            if fault is not None:  # perhaps found after hours of sound, whose windows are dropped
                self.windows = [pending for pending in self.windows if pending.file is not file]
                file.tagged.windows, file.n_pending = [], 0
            self.changed.notify_all()

    def get_batch(self, batch_size: int) -> list[_PendingWindow]:
        """Remove and return the oldest window with others of similar length; nothing at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.windows or self.stopped or self._is_decoded())
            if self.stopped or not self.windows:
                return []
            lengths = [len(pending.samples) for pending in self.windows]
            chosen = choose_batch(lengths, max(min(batch_size, batch_size * self.typical // lengths[0]), 1))
            batch = [self.windows[i] for i in chosen]
            self.windows = [pending for i, pending in enumerate(self.windows) if i not in chosen]
            self.changed.notify_all()
            return batch

    def finish_batch(self, batch: list[_PendingWindow]) -> None:
        """Mark the windows of a batch as tagged."""
        with self.changed:
            for pending in batch:
                if pending.file.tagged.fault is None:
                    pending.file.n_pending -= 1
                    self.on_window(pending.window.end - pending.window.start)
            self.changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Stop all threads; `next_tagged` raises `error`."""
        with self.changed:
            self.error = self.error or error
            self.stopped = True
            self.cancelled.set()
            self.changed.notify_all()

    def next_tagged(self) -> TaggedFile | None:
        """Wait for the next file in order; None after the last one."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self._is_next_tagged())
            if self.error is not None:
                raise self.error
            if not self.files:
                return None
            file = self.files.popleft()
            self.changed.notify_all()
            return file.tagged

    def _has_space(self, n_samples: int) -> bool:
        held = sum(len(pending.samples) for pending in self.windows)
        is_below = len(self.windows) < self.capacity and held + n_samples <= self.capacity * self.typical
        return is_below or not self.windows  # a single window may be longer than all that the pool should hold

    def _is_decoded(self) -> bool:
        return self.all_begun and all(file.decoded for file in self.files)

    def _is_next_tagged(self) -> bool:
        if not self.files:
            return self.all_begun
        return self.files[0].decoded and self.files[0].n_pending == 0


def tag_files(
    engine: Engine,
    paths: Iterable[Path],
    options: TagOptions | None = None,
    *,
    chunk_seconds: float = 10.0,
    hop_seconds: float | None = None,
    batch_size: int = 16,
    n_decoders: int = 2,
    limits: SoundLimits = DEFAULT_LIMITS,
    on_window: Callable[[float], None] = lambda seconds: None,
) -> Iterator[TaggedFile]:
    """Tag files window by window; a batch has windows of similar length, of one file or several.

    Files are decoded in blocks, several at once. Batches are not waited for: an engine that is free takes the windows
    that are there.

    Args:
        engine: computes the probabilities.
        paths: the files; any format, sample rate and length.
        options: what to keep of a window, by default its three best labels.
        chunk_seconds: length of a window; a file's last one is what remains, at least `MIN_TAIL_SECONDS`.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        batch_size: windows a batch, at most; fewer where they are longer than `TYPICAL_SECONDS`.
        n_decoders: processes that decode, see `audio.isolation`.
        limits: of a sound file.
        on_window: called with the seconds of each window that was tagged, from any thread, one call at a time.

    Yields:
        One `TaggedFile` a path, in order.

    Raises:
        UserError: windows too long for the engine, or errors of the engine (weights that give NaN, for example).
    """
    options = options or TagOptions()
    windows = create_windows(engine, chunk_seconds, hop_seconds)
    capacity = max(4 * batch_size * engine.n_threads, 16)
    pool = WindowPool(paths, capacity, round(TYPICAL_SECONDS * engine.sample_rate), on_window)

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again in the caller's thread
            pool.stop(error)

    works = [lambda: _decode_files(pool, windows, engine.sample_rate, limits)] * max(n_decoders, 1)
    works += [lambda: _tag_batches(pool, engine, batch_size, options)] * engine.n_threads
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        while (tagged := pool.next_tagged()) is not None:
            yield tagged
    finally:
        pool.stop()
        for thread in threads:
            thread.join()


def _decode_files(pool: WindowPool, windows: Windows, sample_rate: int, limits: SoundLimits) -> None:
    while (file := pool.next_file()) is not None:
        fault = None
        blocks = IsolatedBlocks(file.tagged.path, sample_rate, limits=limits, cancelled=pool.cancelled)
        try:
            for start, samples in cut_windows(blocks, copy.copy(windows)):
                window = TaggedWindow(start / sample_rate, (start + len(samples)) / sample_rate)
                if not pool.put(_PendingWindow(file, window, samples)):
                    break
        except AudioReadError as error:
            fault = error.reason
        except CancelledError:
            return
        pool.finish_file(file, fault, {} if fault else blocks.warnings)


def _tag_batches(pool: WindowPool, engine: Engine, batch_size: int, options: TagOptions) -> None:
    while batch := pool.get_batch(batch_size):
        tag_windows(engine, [each.samples for each in batch], [each.window for each in batch], options)
        pool.finish_batch(batch)


def create_windows(engine: Engine, chunk_seconds: float, hop_seconds: float | None) -> Windows:
    """Create the windows of an engine; less than `MIN_TAIL_SECONDS` at the end of a sound are no window.

    Raises:
        UserError: the engine does not support windows of that length.
    """
    size = max(round(chunk_seconds * engine.sample_rate), 1)
    if engine.max_samples is not None and size > engine.max_samples:
        longest = engine.max_samples / engine.sample_rate
        raise UserError(
            f"{engine.name} takes at most {longest:.2f} s at once, not windows of {chunk_seconds:g} s: "
            "give shorter ones, or export with a larger --max-frames"
        )
    hop = size if hop_seconds is None else max(round(hop_seconds * engine.sample_rate), 1)
    return Windows(size, hop, round(MIN_TAIL_SECONDS * engine.sample_rate))


def choose_batch(lengths: list[int], max_size: int) -> list[int]:
    """Choose the clips that go into a batch with the first one: those nearest in length, within `MAX_LENGTH_RATIO`.

    Args:
        lengths: samples of each clip.
        max_size: number of clips, at most.

    Returns:
        Their indices, the first clip's at the front.
    """
    shortest = longest = lengths[0]
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: abs(lengths[i] - lengths[0])):
        low, high = min(shortest, lengths[i]), max(longest, lengths[i])
        if high <= MAX_LENGTH_RATIO * low and len(chosen) < max_size:
            chosen.append(i)
            shortest, longest = low, high
    return chosen


def cut_windows(blocks: Iterable[np.ndarray], windows: Windows) -> Iterator[tuple[int, np.ndarray]]:
    """Cut blocks of samples (S,) into windows: index of the first sample, samples."""
    for block in blocks:
        yield from windows.push(block)
    yield from windows.finish()


def tag_windows(engine: Engine, clips: list[np.ndarray], windows: list[TaggedWindow], options: TagOptions) -> None:
    """Set the tags, and the embeddings if requested, of a batch of windows.

    Args:
        engine: computes the probabilities.
        clips: samples (S,) of each window.
        windows: changed in place.
        options: what to keep.
    """
    rows = engine.predict(clips)  # (B,C)
    for window, row in zip(windows, rows, strict=True):
        window.tags = options.select(row, engine.labels)
    if options.embeddings:
        vectors, frames = require_embeddings(engine).embed(clips)
        for window, vector, steps in zip(windows, vectors, frames, strict=True):
            window.embedding, window.frames = vector, steps.astype(np.float16)  # half the memory: hours may be held


def require_embeddings(engine: Engine) -> TorchEngine:
    """Return the engine if it can embed.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(engine, TorchEngine):
        raise UserError(f"{engine.name} has no embeddings; --embeddings requires a checkpoint and --engine torch")
    return engine
