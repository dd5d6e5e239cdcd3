"""Writing of HDF5 shards, in the layouts of `audio.shards`."""

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from audio.shards import LAYOUTS, VERSION, compute_checksum, hash_index
from common.errors import UserError
from common.files import whole_file

_CHUNK_SAMPLES = 1 << 18  # half a MiB: resizable datasets must be chunked
_BLOCK_SAMPLES = 1 << 22  # held in memory before they are appended


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes a shard, which appears under its name when the `with` block ends without an error, or not at all.

    Args:
        path: the file to make or to replace.
        sample_rate: of every clip, in Hz.
        layout: "flat" or "clips".
    """

    def __init__(self, path: str | Path, sample_rate: int, layout: str = "flat") -> None:
        if layout not in LAYOUTS:
            raise UserError(f"there is no layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
        self.path = Path(path)
        self.sample_rate = sample_rate
        self.layout = layout
        self._names: list[str] = []
        self._ends = [0]
        self._checksums: list[int] = []
        self._pending: list[np.ndarray] = []
        self._n_pending = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._target = stack.enter_context(whole_file(self.path, keep=True))
            self._file = stack.enter_context(h5py.File(self._target, "w"))
            stack.push(self._finish)
            self._stack = stack.pop_all()
        self._file.attrs["sample_rate"] = self.sample_rate
        if self.layout == "flat":
            self._samples = self._file.create_dataset(
                "samples", (0,), maxshape=(None,), chunks=(_CHUNK_SAMPLES,), dtype="<i2"
            )
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stack.__exit__(*reason)

    def append(self, name: str, samples: np.ndarray) -> None:
        """Add a clip.

        Args:
            name: key of the clip.
            samples: int16 (S,); in the clips layout also (channels, S).

        Raises:
            ValueError: samples of another type or shape, or (clips layout) a name that HDF5 cannot store beside the
                others.
            UserError: the disk is full or has failed.
        """
        n_dimensions = (1,) if self.layout == "flat" else (1, 2)
        if samples.dtype != np.int16 or samples.ndim not in n_dimensions:
            raise ValueError(f"found {samples.dtype} samples of shape {samples.shape}, expected int16 (S,)")
        if self.layout == "clips":
            self._file.create_dataset(name, data=samples).attrs["checksum"] = compute_checksum(samples)
            self._target.check()
            return
        self._names.append(name)
        self._ends.append(self._ends[-1] + len(samples))
        self._checksums.append(compute_checksum(samples))
        self._pending.append(samples)
        self._n_pending += len(samples)
        if self._n_pending >= _BLOCK_SAMPLES:
            self._write_pending()

    def _finish(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Write what is pending, unless there was an error."""
        if kind is not None:
            return
        if self.layout == "flat":
            self._write_pending()
            offsets, checksums = np.array(self._ends, dtype="<i8"), np.array(self._checksums, dtype="<u4")
            self._file["offsets"], self._file["checksums"] = offsets, checksums
            self._file.create_dataset("names", data=self._names, shape=(len(self._names),), dtype=h5py.string_dtype())
            self._file.attrs["index_hash"] = hash_index(offsets, self._names, checksums)
            self._file.attrs["layout"] = "flat"
            self._file.attrs["version"] = VERSION

    def _write_pending(self) -> None:
        if self._pending:
            end = self._ends[-1]
            self._samples.resize((end,))
            self._samples[end - self._n_pending :] = np.concatenate(self._pending)
            self._pending, self._n_pending = [], 0
            self._target.check()
