"""Tag sound files of any format and length: decode beside the model, batch windows across files, keep what is wanted.

Decoders and engines are threads; between them lies a pool of at most some hundred windows, so that memory depends on
neither the number of files nor their length.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audio.io import AudioBlocks, AudioReadError
from common.errors import UserError
from tagging.engines import Engine, TorchEngine
from tagging.windows import Windows

LIKE = 1.25  # clips of one batch differ in length by this factor at most: more would be spent on padding
SHORTEST_TAIL = 0.1  # seconds
USUAL = 10.0  # seconds of a window; fewer of longer ones are held and make a batch
AHEAD = 256  # files begun before the one that is handed over next


@dataclass
class TaggedWindow:
    """From `start` to `end` seconds of a file: labels with their probabilities, best first.

    Attributes:
        embedding: of the window (E,), where it was asked for.
        frames: embeddings of its time steps (T',E), likewise, float16.
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
        warnings: what is odd about it although it could be read, see `audio.io.AudioBlocks`.
    """

    path: Path
    windows: list[TaggedWindow] = field(default_factory=list)
    fault: str | None = None
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What to keep of a window's probabilities.

    Attributes:
        top_k: this many labels, all where None.
        threshold: only labels of at least this probability.
        embeddings: embed the windows; the engine must be a `TorchEngine`.
    """

    top_k: int | None = 3
    threshold: float | None = None
    embeddings: bool = False

    def tags(self, probabilities: np.ndarray, labels: list[str]) -> list[tuple[str, float]]:
        """Choose from the probabilities (C,) of a window."""
        k = min(self.top_k or len(labels), len(labels))
        best = np.argsort(-probabilities, kind="stable")[:k]
        if self.threshold is not None:
            best = best[probabilities[best] >= self.threshold]
        return [(labels[i], float(probabilities[i])) for i in best]


@dataclass
class _Waiting:
    """A window before it was tagged."""

    file: "_Begun"
    window: TaggedWindow
    samples: np.ndarray


@dataclass
class _Begun:
    """A file under way."""

    tagged: TaggedFile
    decoded: bool = False
    n_left: int = 0  # windows decoded and not yet tagged

    @property
    def finished(self) -> bool:
        return self.decoded and self.n_left == 0


class _Shop:
    """Where decoders leave windows and engines fetch them; one lock for all that is shared."""

    def __init__(self, paths: Iterable[Path], capacity: int, usual: int, on_window: Callable[[float], None]) -> None:
        self.paths = iter(paths)
        self.capacity = capacity  # windows in the pool, if they are of usual length or shorter
        self.usual = usual  # samples
        self.on_window = on_window
        self.changed = threading.Condition()
        self.files: deque[_Begun] = deque()  # in order, not yet handed over
        self.pool: list[_Waiting] = []  # oldest first
        self.n_undecoded = 0  # files that decoders are at
        self.all_begun = False
        self.stopped = False
        self.error: BaseException | None = None

    def begin(self) -> _Begun | None:
        """Give a decoder its next file, or None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.files) < AHEAD or self.stopped)
            path = None if self.stopped else next(self.paths, None)
            if path is None:
                self.all_begun = True
                self.changed.notify_all()
                return None
            file = _Begun(TaggedFile(path))
            self.files.append(file)
            self.n_undecoded += 1
            return file

    def put(self, waiting: _Waiting) -> bool:
        """Leave a window; blocks while the pool is full. False when the work was stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self._has_room(len(waiting.samples)) or self.stopped)
            waiting.file.n_left += 1
            waiting.file.tagged.windows.append(waiting.window)
            self.pool.append(waiting)
            self.changed.notify_all()
            return not self.stopped

    def end(self, file: _Begun, fault: str | None, warnings: dict[str, str]) -> None:
        """A decoder is through with a file."""
        with self.changed:
            file.decoded, file.tagged.fault, file.tagged.warnings = True, fault, warnings
            if fault is not None:  # also one that shows only after hours
                self.pool = [waiting for waiting in self.pool if waiting.file is not file]
                file.tagged.windows, file.n_left = [], 0
            self.n_undecoded -= 1
            self.changed.notify_all()

    def fetch(self, batch_size: int) -> list[_Waiting]:
        """Give an engine the oldest window with others of like length, or nothing at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.pool or self.stopped or (self.all_begun and self.n_undecoded == 0))
            if self.stopped or not self.pool:
                return []
            lengths = [len(waiting.samples) for waiting in self.pool]
            taken = choose_alike(lengths, max(min(batch_size, batch_size * self.usual // lengths[0]), 1))
            batch = [self.pool[i] for i in taken]
            self.pool = [waiting for i, waiting in enumerate(self.pool) if i not in taken]
            self.changed.notify_all()
            return batch

    def done(self, batch: list[_Waiting]) -> None:
        """An engine has tagged a batch."""
        with self.changed:
            for waiting in batch:
                if waiting.file.tagged.fault is None:
                    waiting.file.n_left -= 1
                    self.on_window(waiting.window.end - waiting.window.start)
            self.changed.notify_all()

    def fail(self, error: BaseException | None) -> None:
        """Stop all threads; `error` is raised where the files are handed over."""
        with self.changed:
            self.error = self.error or error
            self.stopped = True
            self.changed.notify_all()

    def hand_over(self) -> TaggedFile | None:
        """Wait for the next file in order; None after the last one."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or (self.files and self.files[0].finished) or self._empty())
            if self.error is not None:
                raise self.error
            if not self.files:
                return None
            file = self.files.popleft()
            self.changed.notify_all()
            return file.tagged

    def _has_room(self, n_samples: int) -> bool:
        held = sum(len(waiting.samples) for waiting in self.pool)
        return not self.pool or (len(self.pool) < self.capacity and held + n_samples <= self.capacity * self.usual)

    def _empty(self) -> bool:
        return self.all_begun and not self.files


def tag_files(
    engine: Engine,
    paths: Iterable[Path],
    wanted: Wanted | None = None,
    *,
    chunk_seconds: float = 10.0,
    hop_seconds: float | None = None,
    batch_size: int = 16,
    n_decoders: int = 2,
    on_window: Callable[[float], None] = lambda seconds: None,
) -> Iterator[TaggedFile]:
    """Tag files window by window; a batch holds windows of like length, of as many files as it takes.

    A file is decoded in blocks, several files at once; a batch waits for nothing: whenever an engine is free it takes
    what is there.

    Args:
        engine: computes.
        paths: the files; any format, sample rate and length.
        wanted: what to keep of a window, by default its three best labels.
        chunk_seconds: length of a window; a file's last one is what remains, at least `SHORTEST_TAIL`.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        batch_size: windows a batch, at most; fewer where they are longer than `USUAL`.
        n_decoders: threads that decode; decoding and resampling happen outside Python's lock.
        on_window: called with the seconds of each window that was tagged, from any thread, one call at a time.

    Yields:
        One `TaggedFile` a path, in order.

    Raises:
        UserError: windows too long for the engine, or what the engine raises (weights that give NaN, say).
    """
    wanted = wanted or Wanted()
    windows = create_windows(engine, chunk_seconds, hop_seconds)
    usual = round(USUAL * engine.sample_rate)
    shop = _Shop(paths, max(4 * batch_size * engine.n_threads, 16), usual, on_window)

    def decode() -> None:
        while (file := shop.begin()) is not None:
            fault = None
            blocks = AudioBlocks(file.tagged.path, engine.sample_rate)
            try:
                for start, samples in cut(blocks, copy.copy(windows)):
                    times = start / engine.sample_rate, (start + len(samples)) / engine.sample_rate
                    if not shop.put(_Waiting(file, TaggedWindow(*times), samples)):
                        break
            except AudioReadError as error:
                fault = error.reason
            shop.end(file, fault, {} if fault else blocks.warnings)

    def compute() -> None:
        while batch := shop.fetch(batch_size):
            tag_windows(engine, [w.samples for w in batch], [w.window for w in batch], wanted)
            shop.done(batch)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again where the files are handed over
            shop.fail(error)

    works = [decode] * max(n_decoders, 1) + [compute] * engine.n_threads
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        while (tagged := shop.hand_over()) is not None:
            yield tagged
    finally:
        shop.fail(None)
        for thread in threads:
            thread.join()


def create_windows(engine: Engine, chunk_seconds: float, hop_seconds: float | None) -> Windows:
    """Windows of an engine's samples; less than `SHORTEST_TAIL` seconds at the end of a sound are no window.

    Raises:
        UserError: the engine does not take windows of that length.
    """
    size = max(round(chunk_seconds * engine.sample_rate), 1)
    if engine.max_samples is not None and size > engine.max_samples:
        longest = engine.max_samples / engine.sample_rate
        raise UserError(
            f"{engine.name} takes at most {longest:.2f} s at once, not windows of {chunk_seconds:g} s: "
            "give shorter ones, or export with a larger --max-frames"
        )
    hop = size if hop_seconds is None else max(round(hop_seconds * engine.sample_rate), 1)
    return Windows(size, hop, round(SHORTEST_TAIL * engine.sample_rate))


def choose_alike(lengths: list[int], n_most: int) -> list[int]:
    """Choose what goes into a batch with the first clip: the nearest in length, none longer than `LIKE` times another.

    Args:
        lengths: samples of each clip.
        n_most: clips, at most.

    Returns:
        Their places in `lengths`, the first one's at the front.
    """
    shortest = longest = lengths[0]
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: abs(lengths[i] - lengths[0])):
        low, high = min(shortest, lengths[i]), max(longest, lengths[i])
        if high <= LIKE * low and len(chosen) < n_most:
            chosen.append(i)
            shortest, longest = low, high
    return chosen


def cut(blocks: Iterable[np.ndarray], windows: Windows) -> Iterator[tuple[int, np.ndarray]]:
    """Cut blocks of samples (S,) into windows: first sample, samples."""
    for block in blocks:
        yield from windows.push(block)
    yield from windows.finish()


def tag_windows(engine: Engine, clips: list[np.ndarray], windows: list[TaggedWindow], wanted: Wanted) -> None:
    """Fill in what an engine says of windows.

    Args:
        engine: computes.
        clips: samples (S,) of each window.
        windows: get their tags, and whatever else is wanted.
        wanted: what to keep.
    """
    rows = engine.predict(clips)  # (B,C)
    for window, row in zip(windows, rows, strict=True):
        window.tags = wanted.tags(row, engine.labels)
    if wanted.embeddings:
        whole, frames = embedding_engine(engine).embed(clips)
        for window, vector, steps in zip(windows, whole, frames, strict=True):
            window.embedding, window.frames = vector, steps.astype(np.float16)  # hours of them may be held


def embedding_engine(engine: Engine) -> TorchEngine:
    """Return the engine, which can embed.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(engine, TorchEngine):
        raise UserError(f"{engine.name} gives probabilities alone; embeddings want a checkpoint and --engine torch")
    return engine
