"""HDF5 shards: many clips in one file, read at random.

Two layouts. "flat" (ours): `samples` int16, all clips end to end; `offsets` int64 (N + 1); `names` UTF-8 (N,);
`checksums` uint32 (N,), see `compute_checksum`; attributes `layout`, `version`, `sample_rate` (Hz), and `index_hash` of
offsets, names and checksums. "clips" (as CED published it): one dataset a clip, keyed by name, int16 or float, (S,) or
(channels, S), with or without a `sample_rate` attribute; ours have an attribute `checksum` each. Files without
checksums are read, too.

A look-up by name costs more than the reading, so the flat layout is the faster one: its reader gets the file offset of
each block of samples from HDF5 once, and then reads the file directly.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from audio.hdf5 import (
    HDF5_ERRORS,
    MAX_EXPANSION_OF_SOUND,
    check_dataset,
    describe_lock,
    find_dataset,
    get_dataset,
    read_texts,
)
from audio.io import to_int16
from audio.manifest import NameIndex
from common.errors import UserError

LAYOUTS = ("flat", "clips")
VERSION = 1

_PACK_AGAIN = "pack it again with scripts/wavlist_to_hdf5.py"
# Float datasets have full scale 1.0 and may exceed it a little; far beyond it, they are 16-bit values stored as floats.
_MAX_FLOAT = 16.0
_MAX_RATE = 10_000_000  # Hz


def compute_checksum(samples: np.ndarray) -> int:
    """Return the CRC-32 of int16 samples, which costs a tenth of a cryptographic hash."""
    return zlib.crc32(np.ascontiguousarray(samples, "<i2").data)


def hash_index(offsets: np.ndarray, names: Sequence[str], checksums: np.ndarray) -> str:
    """Return the SHA-256 of all that a flat shard has beside its samples."""
    digest = hashlib.sha256(np.ascontiguousarray(offsets, "<i8").data)
    digest.update("\0".join(names).encode())
    digest.update(np.ascontiguousarray(checksums, "<u4").data)
    return digest.hexdigest()


class Shard:
    """Reads a shard of either layout.

    Nothing is opened before it is needed. A process never uses a handle of another one: the shard may be pickled, and
    inherited over a fork, also after it was read.

    Args:
        path: the HDF5 file.
        verify: compare every clip that is read with its checksum; each is then read as a whole.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        self.path, self.verify = Path(path), verify
        self._hdf5: h5py.File | None = None  # for the clips layout
        self._bytes: BinaryIO | None = None  # for the flat layout
        self._owner = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hdf5": None, "_bytes": None, "_owner": -1}

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _contents(self) -> "_Contents":
        with _open(self.path) as file:
            try:
                return _Contents(file, self.path)
            except HDF5_ERRORS as error:
                raise UserError(f"{self.path}: the file is damaged ({error}); {_PACK_AGAIN}") from None

    @property
    def layout(self) -> str:
        """"flat" or "clips"."""  # fmt: skip
        return self._contents.layout

    @property
    def names(self) -> list[str]:
        """The clips' names: in the order of packing (flat), or of HDF5 (clips)."""
        return self._contents.names

    @property
    def sample_rate(self) -> int | None:
        """In Hz; None where the file lacks it, as those published by CED."""
        return self._contents.sample_rate

    @cached_property
    def index(self) -> NameIndex:
        """Finds clips under other spellings of their names."""
        return NameIndex(self.names)

    def find(self, name: str) -> int:
        """Return the position of a clip, by any unambiguous spelling of its name.

        Raises:
            KeyError: there is none, or several match.
        """
        position = self.index.find(name)
        if position < 0:
            raise KeyError(f"{self.path} has no clip {name!r}, or several that match")
        return position

    def n_samples(self, position: int) -> int:
        """Return the length S of a clip; in the clips layout the clip is opened for it."""
        offsets = self._contents.offsets
        if offsets is not None:
            return int(offsets[position + 1] - offsets[position])
        return int(self._dataset(position).shape[-1])

    def read(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read a clip, or its samples `start` to `stop` (exclusive), which are limited to the clip.

        Returns:
            int16 (S,); several channels are averaged.

        Raises:
            UserError: the clip's type or values are not supported, or (with `verify`) it is damaged.
        """
        offsets = self._contents.offsets
        if self.verify:
            try:
                whole = self._read_stored(position)
                is_intact = self._has_checksum_of(position, whole)
            except HDF5_ERRORS:
                is_intact = False
            if not is_intact:
                raise UserError(
                    f"{self.path}: the clip {self.names[position]!r} is damaged (its checksum differs); {_PACK_AGAIN}"
                )
            if whole.ndim == 1 and whole.dtype == np.int16:
                return whole[start:stop]
        if offsets is None:
            return self._read_dataset(position, start, stop)
        begin, end = int(offsets[position]), int(offsets[position + 1])
        stop = end if stop is None else min(begin + stop, end)
        start = min(begin + start, stop)
        return self._read_flat(start, stop - start)

    @property
    def has_checksums(self) -> bool:
        """Whether the file has the checksums of its clips; those of other programs and earlier versions do not."""
        if self.layout == "flat":
            return self._contents.checksums is not None
        return "checksum" in self._dataset(0).attrs

    def is_intact(self, position: int) -> bool:
        """Return whether a clip has the samples that were packed; True where the file has no checksums."""
        try:
            return self._has_checksum_of(position, self._read_stored(position))
        except HDF5_ERRORS:
            return False

    def _read_stored(self, position: int) -> np.ndarray:
        """Read a clip as it is stored: int16 (S,), or a dataset of the clips layout."""
        offsets = self._contents.offsets
        if offsets is None:
            return self._dataset(position)[()]
        return self._read_flat(int(offsets[position]), int(offsets[position + 1] - offsets[position]))

    def _has_checksum_of(self, position: int, stored: np.ndarray) -> bool:
        if self._contents.offsets is None:
            expected = self._dataset(position).attrs.get("checksum")
        else:
            expected = None if self._contents.checksums is None else self._contents.checksums[position]
        return expected is None or bool(compute_checksum(stored) == expected)

    def _read_dataset(self, position: int, start: int, stop: int | None) -> np.ndarray:
        dataset = self._dataset(position)
        where = f"{self.path}: the clip {self.names[position]!r}"
        try:
            samples = dataset[..., start:stop]  # (S,) or (channels, S)
        except HDF5_ERRORS as error:
            raise UserError(f"{where} cannot be read ({error}); {_PACK_AGAIN}") from None
        if samples.dtype == np.int16 and samples.ndim == 1:
            return samples
        if samples.dtype.kind == "f":
            samples = samples.astype(np.float64)
            highest = float(np.abs(samples).max(initial=0))
            if not highest <= _MAX_FLOAT:  # also where it is NaN
                raise UserError(
                    f"{where} has floats up to {highest:g}; expected full scale 1.0, or int16; {_PACK_AGAIN}"
                )
        elif samples.dtype == np.int16:
            samples = samples / 32768.0
        else:
            raise UserError(f"{where} is stored as {samples.dtype}; expected int16 or float32; {_PACK_AGAIN}")
        return to_int16(samples.mean(axis=0) if samples.ndim == 2 else samples)

    def _dataset(self, position: int) -> h5py.Dataset:
        name = self.names[position]
        try:
            dataset = self._open_hdf5()[name]
            check_dataset(dataset)
            if len(dataset.shape) not in (1, 2):
                raise ValueError(f"its shape is {dataset.shape}, expected (S,) or (channels, S)")
        except HDF5_ERRORS as error:
            raise UserError(f"{self.path}: the clip {name!r} cannot be read ({error}); {_PACK_AGAIN}") from None
        return dataset

    def _open_hdf5(self) -> h5py.File:
        self._close_inherited()
        if self._hdf5 is None:
            self._hdf5 = _open(self.path)
        return self._hdf5

    def _read_flat(self, begin: int, n_samples: int) -> np.ndarray:
        contents = self._contents
        if contents.block_starts is None:  # stored with a filter, by another program
            try:
                return self._open_hdf5()["samples"][begin : begin + n_samples]
            except HDF5_ERRORS as error:
                raise UserError(f"{self.path}: its samples cannot be read ({error}); {_PACK_AGAIN}") from None
        self._close_inherited()
        if self._bytes is None:
            self._bytes = open(self.path, "rb", buffering=0)  # noqa: SIM115 - kept open between reads
            if contents.stamp != _get_stamp(self.path):
                raise UserError(f"{self.path}: the file was replaced while in use; start again")
        samples = np.empty(n_samples, dtype="<i2")
        view, done = samples.view(np.uint8).data, 0
        while done < n_samples:
            block, offset = divmod(begin + done, contents.block_samples)
            n = min(contents.block_samples - offset, n_samples - done)
            place = int(contents.block_starts[block]) + 2 * offset
            # preadv does not move the file position, so that several threads may read at once.
            n_read = os.preadv(self._bytes.fileno(), [view[2 * done : 2 * (done + n)]], place)
            if n_read != 2 * n:
                raise UserError(f"{self.path}: the file ends too early; {_PACK_AGAIN}")
            done += n
        return samples

    def _close_inherited(self) -> None:
        if self._owner != os.getpid():
            # HDF5 shares the state of a file that is still open: close the inherited handle before opening a new one.
            if self._hdf5 is not None:
                self._hdf5.close()
            self._hdf5 = self._bytes = None
            self._owner = os.getpid()


class _Contents:
    """The metadata of a shard, read once."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        rate = file.attrs.get("sample_rate")
        self.sample_rate = None if rate is None else int(rate)
        if self.sample_rate is not None and not 0 < self.sample_rate <= _MAX_RATE:
            raise ValueError(f"its sample_rate is {self.sample_rate} Hz, expected 1 to {_MAX_RATE:,}")
        self.stamp = _get_stamp(path)
        self.offsets: np.ndarray | None = None
        self.checksums: np.ndarray | None = None
        self.block_starts: np.ndarray | None = None
        self.block_samples = 1
        if find_dataset(file, "samples") is not None and find_dataset(file, "offsets") is not None:
            self.layout = "flat"
            self._read_flat(file, path)
        else:
            self.layout = "clips"
            self.names = _list_datasets(file)
            _check_clips(file, self.names, path)

    def _read_flat(self, file: h5py.File, path: Path) -> None:
        version = int(file.attrs.get("version", VERSION))
        if version > VERSION:
            raise UserError(f"{path}: has version {version} of the flat layout; versions up to {VERSION} are supported")
        samples = get_dataset(file, "samples", "i", max_expansion=MAX_EXPANSION_OF_SOUND)
        self.offsets = get_dataset(file, "offsets", "iu")[:].astype(np.int64)
        self.names = read_texts(get_dataset(file, "names", "OS"))
        found = (
            f"{len(self.names)} names, {len(self.offsets)} offsets, {samples.dtype} samples of shape {samples.shape}"
        )
        is_valid = samples.dtype == np.dtype("<i2") and samples.ndim == 1 and len(self.offsets) == len(self.names) + 1
        if (
            not is_valid
            or (self.offsets[1:] < self.offsets[:-1]).any()
            or self.offsets[0] != 0
            or self.offsets[-1] != len(samples)
        ):
            raise UserError(f"{path}: the datasets of the flat layout do not match (found {found}); {_PACK_AGAIN}")
        if "index_hash" in file.attrs:
            self.checksums = get_dataset(file, "checksums", "u")[:].astype("<u4")
            if hash_index(self.offsets, self.names, self.checksums) != file.attrs["index_hash"]:
                raise UserError(f"{path}: its names or offsets are damaged (their hash differs); {_PACK_AGAIN}")
        self.block_samples, self.block_starts = _locate_blocks(samples)


def _locate_blocks(samples: h5py.Dataset) -> tuple[int, np.ndarray | None]:
    """Return the samples of a block and the file offset of each block; None where only HDF5 can decode them."""
    if samples.chunks is None:
        start = samples.id.get_offset()
        return max(1, len(samples)), None if start is None else np.array([start])
    if samples.id.get_create_plist().get_nfilters():
        return 1, None
    (size,) = samples.chunks
    starts = np.full(-(-len(samples) // size), -1, dtype=np.int64)

    def note(chunk: Any) -> None:
        if chunk.chunk_offset[0] // size < len(starts):
            starts[chunk.chunk_offset[0] // size] = chunk.byte_offset

    samples.id.chunk_iter(note)
    return size, None if (starts < 0).any() else starts


def _list_datasets(file: h5py.File) -> list[str]:
    """List all datasets without opening them: the paths that are not a folder of others."""
    paths: list[str] = []
    file.visit(paths.append)
    folders = {path.rpartition("/")[0] for path in paths}
    return [path for path in paths if path not in folders]


def _check_clips(file: h5py.File, names: Sequence[str], path: Path) -> None:
    for name in names[:3]:
        node = file[name]
        if not isinstance(node, h5py.Dataset) or node.ndim not in (1, 2) or node.dtype not in (np.int16, "f4", "f8"):
            what = f"{node.dtype} of shape {node.shape}" if isinstance(node, h5py.Dataset) else "an empty group"
            raise UserError(
                f"{path} is not a shard of clips: found {name!r} ({what}), expected either 'samples', 'offsets' and "
                f"'names', or one int16 dataset a clip; {_PACK_AGAIN}"
            )
    if not names:
        raise UserError(f"{path} has no clips; {_PACK_AGAIN}")


def _get_stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise UserError(f"{path}: the shard does not exist; {_PACK_AGAIN}")
    try:
        return h5py.File(path, "r")
    except HDF5_ERRORS as error:
        if locked := describe_lock(error):
            raise UserError(f"{path}: {locked}") from None
        what = "is not an HDF5 file" if not h5py.is_hdf5(path) else "is truncated or damaged"
        raise UserError(f"{path}: {what} ({error}); expected a shard of clips; {_PACK_AGAIN}") from None
