"""Embeddings of sound files in HDF5: one vector a window, and one for each of its time steps.

Layout: `filename` (N,) names (see `tagging.rows.escape_name`); `window/file` (W,) the index of each window's file,
`window/start` and `window/end` (W,) seconds, `window/embedding` (W,E) float32; `frame/offset` (W+1,) the first row of
each window's time steps in `frame/embedding` (M,E) float16. The attribute `made_with` is the provenance as JSON.

Letters: N files, W windows, M time steps of all windows, E embedding width.
"""

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from audio.hdf5 import HDF5_ERRORS, get_dataset, read_texts
from common.errors import UserError
from common.files import create_hdf5, remove_dead_partials
from common.parsing import parse_json
from tagging.files import TaggedFile
from tagging.parts import Output, Share, check_provenance
from tagging.rows import escape_name, unescape_name

CHUNK_BYTES = 1 << 26  # of embeddings held in memory before a part is written
CHUNK_SECONDS = 30.0  # after which a part is written although it is smaller
MAX_OPEN = 16  # parts open at once while they are joined


class EmbeddingFile(Output):
    """Writes embeddings to parts in TARGET.parts/, which are joined at the end.

    Args:
        path: the target, an HDF5 file; what it holds is kept.
        settings: the provenance of the embeddings.
        share: this process's share of the work.

    Raises:
        UserError: the target was made with other settings, was not written by this program, or is locked.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        super().__init__(path, settings, share)
        self.folder = parts_folder(path)
        self.folder.mkdir(exist_ok=True)
        remove_dead_partials(self.folder)
        for source in self._sources():
            with _open_source(source, settings) as file:
                self.done.update(map(unescape_name, _read_names(file)))
        self._held: list[TaggedFile] = []
        self._n_bytes = 0
        self._last_flush = time.monotonic()

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there; one that cannot be read has no embeddings."""
        name = str(file.path)
        if file.fault is not None:
            self.faults[name] = file.fault
        elif name not in self.done:
            self.done.add(name)
            self._held.append(file)
            self._n_bytes += sum(w.frames.nbytes for w in file.windows if w.frames is not None)
            if self._n_bytes > CHUNK_BYTES or time.monotonic() - self._last_flush > CHUNK_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what is held in memory to a part."""
        self._last_flush = time.monotonic()
        if not self._held:
            return
        number = len(list(self.folder.glob(f"{self.share}.*.h5")))
        with create_hdf5(self.folder / f"{self.share}.{number:06}.h5") as file:
            writer = _Writer(file, self.settings)
            for tagged in self._held:
                times = np.array([(window.start, window.end) for window in tagged.windows])
                vectors = [window.embedding for window in tagged.windows if window.embedding is not None]
                frames = [window.frames for window in tagged.windows if window.frames is not None]
                writer.add(escape_name(str(tagged.path)), times, np.array(vectors), frames)
        self._held, self._n_bytes = [], 0

    def join(self, paths: Iterable[Path]) -> None:
        """Join what the target holds with all parts, in the order of `paths`."""
        sources = self._sources()
        if sources != [self.path]:
            places: dict[str, tuple[Path, int, int]] = {}  # name → source, its first window there and their end
            for source in sources:
                with _open_source(source, self.settings) as file:
                    names = _read_names(file)
                    edges = np.searchsorted(file["window/file"][:], np.arange(len(names) + 1)).tolist()
                places |= {name: (source, *edges[i : i + 2]) for i, name in enumerate(names)}
            # There may be more parts than a process can open; one that drops out of the cache is closed.
            open_cached = lru_cache(MAX_OPEN)(lambda source: _open_source(source, self.settings))
            with create_hdf5(self.path) as target:
                writer = _Writer(target, self.settings)
                for name in dict.fromkeys([*(escape_name(str(path)) for path in paths), *places]):
                    if name in places:
                        source, first, stop = places[name]
                        writer.add(name, *_read_windows(open_cached(source), first, stop))
            open_cached.cache_clear()
        shutil.rmtree(self.folder)

    def _sources(self) -> list[Path]:
        return [*([self.path] if self.path.exists() else []), *sorted(self.folder.glob("[!.]*.h5"))]


class _Writer:
    """Appends sound files to an open HDF5 file of the layout above."""

    def __init__(self, file: h5py.File, settings: Mapping[str, Any]) -> None:
        self.file = file
        file.attrs["made_with"] = json.dumps(dict(settings))
        self.n_files = self.n_steps = 0
        kinds = {"filename": h5py.string_dtype(), "window/file": "i8", "window/start": "f8", "window/end": "f8"}
        for key, kind in kinds.items():
            file.create_dataset(key, (0,), kind, maxshape=(None,))
        file.create_dataset("frame/offset", data=np.zeros(1, "i8"), maxshape=(None,))

    def add(self, name: str, times: np.ndarray, vectors: np.ndarray, frames: list[np.ndarray]) -> None:
        """Add a file: times (W,2) in seconds, vectors (W,E), and the time steps (T',E) of each window."""
        if "window/embedding" not in self.file:  # only now is the width known
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


def parts_folder(path: Path) -> Path:
    """Return the folder of the parts of an embedding file."""
    return path.with_name(f"{path.name}.parts")


def is_embedding_file(path: Path) -> bool:
    """Return whether a file holds embeddings with their provenance."""
    try:
        with h5py.File(path, "r") as file:
            return "made_with" in file.attrs
    except HDF5_ERRORS:
        return False


def is_part(path: Path) -> bool:
    """Return whether a file in TARGET.parts/ is named like a part, or like what a killed process left of one."""
    return re.fullmatch(r"\.?\d+-of-\d+\..*|\.\w+\.partial\.lock", path.name) is not None


def _open_source(path: Path, settings: Mapping[str, Any]) -> h5py.File:
    try:
        file = h5py.File(path, "r")
        provenance = parse_json(file.attrs["made_with"])
        _check_layout(file)
    except HDF5_ERRORS as error:
        raise UserError(f"{path} cannot be added to ({error}): write elsewhere, or remove it") from error
    check_provenance(path, provenance, settings)
    return file


def _check_layout(file: h5py.File) -> None:
    """Raise `ValueError` or `KeyError` where an open file has not the layout above."""
    n_files = len(get_dataset(file, "filename", "O"))
    n_windows = len(owners := get_dataset(file, "window/file", "i"))
    offsets = get_dataset(file, "frame/offset", "i")
    lengths = [len(get_dataset(file, f"window/{key}", "f")) for key in ("start", "end")]
    n_steps = 0
    if n_files:
        lengths.append(len(get_dataset(file, "window/embedding", "f", (2,))))
        n_steps = len(get_dataset(file, "frame/embedding", "f", (2,)))
    if set(lengths) != {n_windows} or len(offsets) != n_windows + 1:
        raise ValueError("its datasets do not have one row a window")
    owners, offsets = owners[:], offsets[:]
    if (owners < 0).any() or (owners >= n_files).any() or (owners[1:] < owners[:-1]).any():
        raise ValueError("window/file does not number its files in their order")
    if offsets[0] != 0 or offsets[-1] != n_steps or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("frame/offset does not fit the rows of frame/embedding")


def _read_names(file: h5py.File) -> list[str]:
    return read_texts(file["filename"])


def _read_windows(file: h5py.File, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Read windows `first` to `stop` as `_Writer.add` takes them."""
    times = np.stack([file["window/start"][first:stop], file["window/end"][first:stop]], axis=1)
    offsets = file["frame/offset"][first : stop + 1]
    frames = file["frame/embedding"][offsets[0] : offsets[-1]]
    return times, file["window/embedding"][first:stop], np.split(frames, offsets[1:-1] - offsets[0])
