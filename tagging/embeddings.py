"""Embeddings of sound files in HDF5: one vector a window, and one for each of its time steps.

Layout: `filename` (N,) names (see `tagging.outputs.as_text`); `window/file` (W,) the file of each window,
`window/start` and `window/end` (W,) seconds, `window/embedding` (W,E) float32; `frame/offset` (W+1,) where each
window's steps begin in `frame/embedding` (M,E) float16. The attribute `made_with` is JSON.

Letters: N files, W windows, M time steps of all windows, E embedding width.
"""

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.errors import UserError
from common.files import remove_dead_partials, whole_file
from tagging.files import TaggedFile
from tagging.parts import LastOne, Output, Share, check_made_with
from tagging.rows import as_text, from_text

CHUNK_BYTES = 1 << 26  # of embeddings held before they are written
CHUNK_SECONDS = 30.0  # from one part to the next, at most, while files are through
MOST_OPEN = 16  # files at once


class Embeddings(Output):
    """Writes embeddings part by part into TARGET.parts/, and the whole file at the end.

    Args:
        path: the HDF5 file wanted; what it holds already is kept.
        settings: what embeddings are made with.
        share: this process's part of the work.

    Raises:
        UserError: the file exists and was made otherwise.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        super().__init__()
        self.path, self.settings, self.share = path, dict(settings), share
        self.last_one = LastOne(path, share)
        self.folder = path.with_name(f"{path.name}.parts")
        self.folder.mkdir(exist_ok=True)
        remove_dead_partials(self.folder)
        for source in self._sources():
            with _opened(source, settings) as file:
                self.done |= set(from_text(_names(file)))
        self.held: list[TaggedFile] = []
        self.n_bytes = 0
        self.written = time.monotonic()

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there; one that cannot be read has no embeddings."""
        name = str(file.path)
        if file.fault is not None:
            self.faults[name] = file.fault
        elif name not in self.done:
            self.done.add(name)
            self.held.append(file)
            self.n_bytes += sum(w.frames.nbytes for w in file.windows if w.frames is not None)
            if self.n_bytes > CHUNK_BYTES or time.monotonic() - self.written > CHUNK_SECONDS:
                self.flush()

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish this part; the last process to do so joins all parts."""
        self.flush()
        with self.last_one.finish(self.faults) as everyones:
            if everyones is None:
                return False
            self.faults |= everyones
            sources = self._sources()
            if sources != [self.path]:
                self._join(sources, [as_text(str(path)) for path in paths])
            shutil.rmtree(self.folder)
        return True

    def _sources(self) -> list[Path]:
        return [*([self.path] if self.path.exists() else []), *sorted(self.folder.glob("[!.]*.h5"))]

    def flush(self) -> None:
        """Write a part with what is held."""
        self.written = time.monotonic()
        if not self.held:
            return
        number = len(list(self.folder.glob(f"{self.share}.*.h5")))
        with whole_file(self.folder / f"{self.share}.{number:06}.h5") as partial, h5py.File(partial, "w") as file:
            writer = _Writer(file, self.settings)
            for tagged in self.held:
                windows = tagged.windows
                vectors = [window.embedding for window in windows if window.embedding is not None]
                frames = [window.frames for window in windows if window.frames is not None]
                times = [(window.start, window.end) for window in windows]
                writer.add(as_text(str(tagged.path)), np.array(times), np.array(vectors), frames)
        self.held, self.n_bytes = [], 0

    def _join(self, sources: list[Path], order: list[str]) -> None:
        with (
            closing(_Sources(sources, self.settings)) as there,
            whole_file(self.path) as partial,
            h5py.File(partial, "w") as target,
        ):
            writer = _Writer(target, self.settings)
            for name in dict.fromkeys([*order, *there.where]):
                if name in there.where:
                    writer.add(name, *there.read(name))


class _Sources:
    """Reads from several files of the layout above, of which there may be more than a process can open.

    Attributes:
        where: name → file, and its windows there, first and end.
    """

    def __init__(self, paths: list[Path], settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.where: dict[str, tuple[Path, int, int]] = {}
        self.opened: dict[Path, h5py.File] = {}  # the one used last is at the end
        for path in paths:
            with _opened(path, settings) as file:
                names = _names(file)
                first = np.searchsorted(file["window/file"][:], np.arange(len(names) + 1)).tolist()
            self.where |= {name: (path, *first[i : i + 2]) for i, name in enumerate(names)}

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """A sound's times, vectors and time steps, as `_Writer.add` takes them."""
        path, start, stop = self.where[name]
        file = self.opened.pop(path, None) or _opened(path, self.settings)
        self.opened[path] = file
        if len(self.opened) > MOST_OPEN:
            self.opened.pop(next(iter(self.opened))).close()
        times = np.stack([file["window/start"][start:stop], file["window/end"][start:stop]], axis=1)
        offsets = file["frame/offset"][start : stop + 1]
        frames = file["frame/embedding"][offsets[0] : offsets[-1]]
        return times, file["window/embedding"][start:stop], np.split(frames, offsets[1:-1] - offsets[0])

    def close(self) -> None:
        """Close what is open."""
        for file in self.opened.values():
            file.close()


class _Writer:
    """Appends files to an open HDF5 file of the layout above."""

    def __init__(self, file: h5py.File, settings: Mapping[str, Any]) -> None:
        self.file = file
        file.attrs["made_with"] = json.dumps(dict(settings))
        self.n_files = self.n_windows = self.n_steps = 0
        file.create_dataset("filename", (0,), h5py.string_dtype(), maxshape=(None,))
        file.create_dataset("window/file", (0,), "i8", maxshape=(None,))
        file.create_dataset("window/start", (0,), "f8", maxshape=(None,))
        file.create_dataset("window/end", (0,), "f8", maxshape=(None,))
        file.create_dataset("frame/offset", data=np.zeros(1, "i8"), maxshape=(None,))

    def add(self, name: str, times: np.ndarray, vectors: np.ndarray, frames: list[np.ndarray]) -> None:
        """Add a file: times (W,2) in seconds, vectors (W,E), and the steps (T',E) of each window."""
        if "window/embedding" not in self.file:
            width = vectors.shape[1]
            for key, kind in (("window/embedding", "f4"), ("frame/embedding", "f2")):
                self.file.create_dataset(key, (0, width), kind, maxshape=(None, width))
        steps = np.array([len(frame) for frame in frames])
        self._append("filename", np.array([name], dtype=object))
        self._append("window/file", np.full(len(times), self.n_files))
        self._append("window/start", times[:, 0])
        self._append("window/end", times[:, 1])
        self._append("window/embedding", vectors)
        self._append("frame/offset", self.n_steps + steps.cumsum())
        self._append("frame/embedding", np.concatenate(frames))
        self.n_files += 1
        self.n_steps += int(steps.sum())

    def _append(self, key: str, values: np.ndarray) -> None:
        dataset = self.file[key]
        n = len(dataset)
        dataset.resize(n + len(values), axis=0)
        dataset[n:] = values


def is_made(path: Path) -> bool:
    """Whether a file holds embeddings that say what they were made with."""
    try:
        with h5py.File(path, "r") as file:
            return "made_with" in file.attrs
    except OSError:
        return False


def is_part(path: Path) -> bool:
    """Whether a file in TARGET.parts/ has such a name as a part has, or what was killed while it was written."""
    return re.fullmatch(r"\.?\d+-of-\d+\..*|\.\w+\.partial\.lock", path.name) is not None


def _opened(path: Path, settings: Mapping[str, Any]) -> h5py.File:
    try:
        file = h5py.File(path, "r")
        made_with = json.loads(file.attrs["made_with"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be added to ({error}): write elsewhere, or remove it") from error
    check_made_with(path, made_with, settings)
    return file


def _names(file: h5py.File) -> list[str]:
    return list(file["filename"].asstr()[:])
