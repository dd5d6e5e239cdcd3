"""HDF5 files of others: datasets that are in the file, as large as they claim; and locks.

An HDF5 file may name other files: by external storage, virtual datasets and external links, so that a pack could hold
any file of the machine as sound. It may also declare terabytes that it does not hold, as fill values or by compression.
All readers of this project get their datasets from `get_dataset` or pass them to `check_dataset`.
"""

import errno
import struct
from collections.abc import Sequence
from math import ceil, prod
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5l

# What h5py raises for damaged files.
HDF5_ERRORS = (
    *(OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, OverflowError, MemoryError),
)

MAX_EXPANSION = 64  # bytes of a compressed dataset that is read as a whole, for each byte in the file
MAX_EXPANSION_OF_SOUND = 1100  # deflate cannot exceed 1032, and silence comes near
_ALWAYS_ALLOWED = 1 << 26  # bytes in memory that a compressed dataset may have however small it is in the file
_MAX_CHUNK_BYTES = 1 << 28  # HDF5 holds a chunk in memory to read a value of it
_TEXT_BLOCK = 4096
_LOCKED = {errno.EAGAIN, errno.EACCES}  # errno where another process has the lock


def get_dataset(
    file: h5py.File, name: str, kinds: str, n_dimensions: Sequence[int] = (1,), max_expansion: int = MAX_EXPANSION
) -> h5py.Dataset:
    """Return a dataset that is stored in the file itself, as far as its metadata shows.

    Args:
        file: open for reading.
        name: path of the dataset.
        kinds: letters of the NumPy kinds of its type: "i" signed, "u" unsigned, "f" float, "O" text.
        n_dimensions: supported numbers of dimensions.
        max_expansion: see `check_dataset`.

    Raises:
        KeyError: there is none.
        ValueError: it is of another type or shape, or see `check_dataset`.
    """
    dataset = find_dataset(file, name)
    if dataset is None:
        raise KeyError(f"it has no dataset {name!r}")
    check_dataset(dataset, max_expansion)
    if dataset.dtype.kind not in kinds or len(dataset.shape) not in n_dimensions:
        expected = f"{' or '.join(_KINDS[kind] for kind in kinds)} in {' or '.join(map(str, n_dimensions))} dimensions"
        raise ValueError(f"the dataset {name!r} has {dataset.dtype} of shape {dataset.shape}, expected {expected}")
    return dataset


_KINDS = {"i": "integers", "u": "unsigned integers", "f": "floats", "O": "text", "S": "bytes"}


def find_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Return the dataset of that path; None where there is none, or a group.

    Raises:
        ValueError: a part of the path is a link to another place or to another file, which is not followed.
    """
    group: Any = file
    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or not group.id.links.exists(part.encode()):
            return None
        if group.id.links.get_info(part.encode()).type != h5l.TYPE_HARD:
            raise ValueError(f"{name!r} is a soft or external link, which is not followed")
        group = group[part]
    return group if isinstance(group, h5py.Dataset) else None


def check_dataset(dataset: h5py.Dataset, max_expansion: int = MAX_EXPANSION_OF_SOUND) -> None:
    """Check that a dataset is stored in its own file, completely, and is about as large as what is stored.

    Args:
        dataset: not read.
        max_expansion: largest factor between its bytes in memory and those in the file, where it is compressed.

    Raises:
        ValueError: it is virtual, in external storage, or without a shape; parts of it were never written; or it
            expands too much.
    """
    place = dataset.id
    # Only what is in one piece in the file itself has an offset, and then all of it; clips are checked when read.
    if place.get_offset() is not None and place.get_storage_size() <= _ALWAYS_ALLOWED:
        return
    plist = place.get_create_plist()
    layout = plist.get_layout()
    if layout == h5d.VIRTUAL or plist.get_external_count():
        raise ValueError(f"the dataset {dataset.name!r} takes its values from other files, which are not read")
    shape, stored = place.shape, place.get_storage_size()
    if shape is None:
        raise ValueError(f"the dataset {dataset.name!r} has no shape")
    n_bytes = allowed = prod(shape) * dataset.dtype.itemsize
    if layout == h5d.CHUNKED:
        _check_chunks(dataset)
        allowed = max(_ALWAYS_ALLOWED, max_expansion * stored) if plist.get_nfilters() else stored
    elif n_bytes:
        allowed = min(stored, dataset.file.id.get_filesize())
    if n_bytes > allowed:
        raise ValueError(
            f"the dataset {dataset.name!r} declares {n_bytes:,} bytes ({dataset.dtype}, {shape}), but {stored:,} bytes "
            "are stored of it"
        )


def read_texts(dataset: h5py.Dataset) -> list[str]:
    """Return the values of a dataset of text (N,), in blocks.

    Raises:
        ValueError: their heaps are damaged; or together, they have more bytes than their file, where references lead
            to one long text.
    """
    _check_heaps(dataset)
    texts: list[str] = []
    rest = dataset.file.id.get_filesize()
    for start in range(0, len(dataset), _TEXT_BLOCK):
        block = dataset.asstr()[start : start + _TEXT_BLOCK].tolist()
        rest -= sum(map(len, block))
        if rest < 0:
            raise ValueError(f"the texts of {dataset.name!r} are longer than the file")
        texts += block
    return texts


def _check_heaps(dataset: h5py.Dataset) -> None:
    """Raise `ValueError` where texts lead to a damaged heap: on an entry of size 0 in one, HDF5 would loop for ever.

    HDF5 file format specification, III.E: a heap is "GCOL" and its size, followed by entries with index and size.
    """
    offset, file = dataset.id.get_offset(), dataset.file
    if offset is None or dataset.dtype.kind != "O" or file.userblock_size or not len(dataset):
        return
    if file.id.get_create_plist().get_sizes() != (8, 8):  # of addresses and lengths, in bytes
        return
    n_bytes = file.id.get_filesize()
    with open(file.filename, "rb") as raw:
        raw.seek(offset)
        references = np.frombuffer(raw.read(16 * len(dataset)), [("n", "<u4"), ("heap", "<u8"), ("index", "<u4")])
        for heap in np.unique(references["heap"][references["n"] > 0]).tolist():
            raw.seek(min(heap, n_bytes))
            signature, size = struct.unpack("<4s4xQ", raw.read(16).ljust(16, b"\0"))
            if signature != b"GCOL" or not 16 <= size <= n_bytes - heap or not _is_heap(raw.read(size - 16)):
                raise ValueError(f"the texts of {dataset.name!r} lead to a damaged place of the file")


def _is_heap(entries: bytes) -> bool:
    """Return whether the entries of a heap follow each other up to its end."""
    place = 0
    while place + 16 <= len(entries):
        index, size = struct.unpack_from("<H6xQ", entries, place)
        step = size if index == 0 else 16 + (size + 7) // 8 * 8  # of free space, the size includes the header
        if not 16 <= step <= len(entries) - place:
            return False
        place += step
    return True


def _check_chunks(dataset: h5py.Dataset) -> None:
    """Raise `ValueError` where chunks are missing, which would be read as fill values, or are too large to hold."""
    if prod(dataset.chunks) * dataset.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise ValueError(f"the dataset {dataset.name!r} has chunks of {dataset.chunks}, which fill the memory")
    expected = prod(ceil(n / size) for n, size in zip(dataset.shape, dataset.chunks, strict=True))
    found = dataset.id.get_num_chunks()
    if found < expected:
        raise ValueError(f"the dataset {dataset.name!r} has only {found} of its {expected} chunks")


def describe_lock(error: Exception) -> str:
    """Return a sentence on a file that HDF5 could not lock; "" for any other error of `h5py.File`.

    HDF5 locks a file while it is open: exclusively for writing, shared for reading.
    """
    if "unable to lock file" not in str(error):
        return ""
    if getattr(error, "errno", None) in _LOCKED or "errno = 11," in str(error):
        return (
            "is locked by another process that has it open for writing; wait until that process has ended, or end it, "
            "and start again (`lsof` or `fuser` lists it)"
        )
    return (
        f"cannot be locked, since its file system has no locks ({error}); set HDF5_USE_FILE_LOCKING=FALSE in the "
        "environment, and make sure that no process writes the file meanwhile"
    )
