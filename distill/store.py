"""Stores of a teacher's outputs: a folder with two files per epoch and part, of values and of names.

`PREFIX_ep{E}_{R}.h5` has the outputs for N chunks in epoch E and the seeds of their augmentation. The rows of
`PREFIX_ep{E}_{R}.parquet` name the chunks: `filename`, `start`, `end` in seconds, `n_reference` (length in samples at
the reference rate, so that students of other sample rates replay the same draws) and the columns of
`distill.sound_check`. R counts the parts of an epoch. `meta.json` has all settings. This is CED's published layout of
soft targets except for names and columns, see `distill.published_layout`; the values are described in
`distill.targets` and `distill.embeddings`.
"""

import logging
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pandas as pd
from pydantic import ValidationError

from audio.cutting import Chunks
from audio.dataset import Pack
from audio.hdf5 import HDF5_ERRORS, describe_lock, get_dataset
from audio.manifest import NameIndex
from common.errors import Faults, UserError, some
from common.files import create_hdf5, whole_file
from common.parquet import PARQUET_ERRORS, read_parquet, read_row_count
from common.parsing import describe_faults, read_json
from distill.published_meta import read_published_meta
from distill.replay import REFERENCE_RATE, Replay
from distill.sound_check import Check, check_sounds
from distill.sources import compute_reference_lengths
from distill.store_checks import MAX_CHUNKS, RowFault, StoreMeta, find_faulty_row, find_faulty_seed

logger = logging.getLogger(__name__)

_COLUMNS = {"filename": "text", "start": "number", "end": "number"}
_MORE_COLUMNS = {"n_reference": "integer", "clip_samples": "integer", "sound_hash": "integer"}


def _compute_checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data)


class TargetStore:
    """A folder of a teacher's outputs, opened and checked.

    Args:
        folder: with `PREFIX_ep*_*.h5`.

    Attributes:
        epochs: the stored epoch numbers, ascending.
        meta: contents of `meta.json` (or of a published `meta.pt`).
        parts: the numbers of the parts of each epoch, ascending.
        replay: the augmentation of its seeds.

    Raises:
        UserError: the folder is no complete store; lists all faults.
    """

    prefix: ClassVar[str]  # of the file names
    types: ClassVar[dict[str, type]]  # dataset → type in the file; `seeds` is one of them
    what: ClassVar[str]  # name of the outputs in messages
    part_name: ClassVar[str] = "part"  # likewise of a part

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        faults = Faults(f"the folder of {self.what} {self.folder}")
        self.parts: dict[int, list[int]] = defaultdict(list)
        for path in self.folder.glob(f"{self.prefix}_ep*_*.h5"):
            if match := re.fullmatch(rf"{self.prefix}_ep([0-9]{{1,6}})_([0-9]{{1,5}})\.h5", path.name):
                self.parts[int(match[1])].append(int(match[2]))
        if not self.parts:
            found = "is not a folder" if not self.folder.is_dir() else f"has no files {self.prefix}_ep*_*.h5"
            raise UserError(
                f"{self.folder} {found}; make {self.what} with `python save_logits.py CONFIG.yaml`, which prints the "
                "folder it writes, and give that folder"
            )
        self.epochs = sorted(self.parts)
        self.meta, self._facts = self._read_meta(faults)
        self._checked: set[tuple[int, int, tuple[str, ...]]] = set()  # files whose values were checked
        n_parts = self._facts.parts or self._facts.world_size or 1 + max(max(r) for r in self.parts.values())
        for epoch in self.epochs:
            missing = sorted(set(range(n_parts)) - set(self.parts[epoch]))
            missing += [r for r in self.parts[epoch] if not self._path(epoch, r).with_suffix(".parquet").is_file()]
            self.parts[epoch].sort()
            if not missing:
                self._check_rows(epoch, faults)
            else:
                faults.add(
                    f"epoch {epoch} lacks the file of {self.part_name} {some(map(str, missing))}; run save_logits.py "
                    "again with the same settings to complete it"
                )
        faults.raise_if_any()
        gaps = sorted(set(range(self.epochs[0], self.epochs[-1])) - set(self.epochs))
        if gaps:
            raise UserError(
                f"{self.folder} lacks epoch {some(map(str, gaps))} between others; run save_logits.py again with the "
                "same settings to complete it"
            )
        planned = self._facts.config.epochs
        if planned and len(self.epochs) < planned:
            logger.warning("%s has %d of the %d epochs planned", self.folder, len(self.epochs), planned)
        self.replay = Replay(**{k: self.meta[k] for k in ("wavtransforms", "spectransforms")} | self._get_mask_fill())

    @classmethod
    def get_path(cls, folder: Path, epoch: int, part: int) -> Path:
        """Return the HDF5 file of `epoch` and `part`; its `.parquet` is beside it."""
        return folder / f"{cls.prefix}_ep{epoch}_{part}.h5"

    @classmethod
    def write(cls, folder: Path, epoch: int, part: int, rows: pd.DataFrame, **arrays: np.ndarray) -> None:
        """Write one part of one epoch, atomically.

        Args:
            folder: of the store.
            epoch: counts from 1.
            part: counts from 0; the rank of the process in soft targets.
            rows: `filename`, `start`, `end` (seconds), `n_reference` (samples) of the N chunks.
            **arrays: (N,...) the datasets of `types`, each under its name.
        """
        target = cls.get_path(folder, epoch, part)
        with whole_file(target.with_suffix(".parquet")) as file:
            rows.to_parquet(file, compression="brotli", index=False, write_page_checksum=True)
        # The HDF5 file is written last: if it exists, the part is complete.
        with create_hdf5(target) as file:
            for name, kind in cls.types.items():
                values: np.ndarray = arrays[name].astype(kind)
                file.create_dataset(name, data=values).attrs["checksum"] = _compute_checksum(values)

    def _check_rows(self, epoch: int, faults: Faults) -> None:
        """Open every file of an epoch, and check types and shapes, and that values and names have as many rows."""
        for part in self.parts[epoch]:
            path = self._path(epoch, part)
            try:
                with self._open(epoch, part) as file:
                    datasets = {name: self._get_dataset(file, name) for name in self.types}
                    lengths = {name: len(dataset) for name, dataset in datasets.items()}
                    self._check_shapes({name: dataset.shape for name, dataset in datasets.items()})
                lengths["names"] = read_row_count(path.with_suffix(".parquet"))
            except UserError as error:
                faults.add(str(error))
            except (*HDF5_ERRORS, *PARQUET_ERRORS) as error:
                faults.add(
                    f"{path} and the .parquet beside it are not files of a store ({error}); save this epoch again"
                )
            else:
                if len(set(lengths.values())) > 1:
                    faults.add(f"{path} and the .parquet beside it differ in length ({lengths}); save this epoch again")

    def _get_dataset(self, file: h5py.File, name: str) -> h5py.Dataset:
        kinds = "f" if np.issubdtype(self.types[name], np.floating) else "iu"
        return get_dataset(file, name, kinds, (1,) if name == "seeds" else (2,))

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` where the shapes of a part's datasets do not go together."""

    def _find_fault(self, arrays: dict[str, np.ndarray]) -> RowFault | None:
        """Return what is wrong with the values of a part, those of `arrays`."""
        return find_faulty_seed(arrays["seeds"]) if "seeds" in arrays else None

    def _get_mask_fill(self) -> dict[str, Any]:
        return {"mask_fill": self.meta["mask_fill"]} if "mask_fill" in self.meta else {}

    def _path(self, epoch: int, part: int) -> Path:
        return self.get_path(self.folder, epoch, part)

    def _read_meta(self, faults: Faults) -> tuple[dict[str, Any], StoreMeta]:
        empty: dict[str, Any] = {"wavtransforms": {}, "spectransforms": []}
        path = self.folder / "meta.json"
        try:
            if path.is_file():
                meta = read_json(path, "save the targets again")
            elif (path := self.folder / "meta.pt").is_file():
                meta = read_published_meta(path)
            else:
                raise UserError(
                    "neither meta.json nor meta.pt exists, so the augmentation of the seeds is unknown; copy the file "
                    "of these targets into the folder"
                )
            return empty | meta, StoreMeta.model_validate(meta)
        except UserError as error:
            faults.add(str(error))
        except ValidationError as error:
            faults.add(f"{path}: {some(describe_faults(error), 3)}; save the targets again")
        return empty, StoreMeta()

    def _open(self, epoch: int, part: int) -> h5py.File:
        path = self._path(epoch, part)
        try:
            return h5py.File(path, "r")
        except HDF5_ERRORS as error:
            if locked := describe_lock(error):
                raise UserError(f"{path} {locked}") from None
            raise UserError(f"{path} cannot be read ({error}); delete it and run save_logits.py again") from None

    @property
    def chunk_seconds(self) -> float:
        """Length of a chunk in seconds."""
        return self._facts.config.chunk_length

    def read_rows(self, epoch: int) -> pd.DataFrame:
        """Return the rows of `epoch`, part by part: `filename`, `start`, `end` and further columns."""
        tables = [self._read_part_rows(self._path(epoch, part).with_suffix(".parquet")) for part in self.parts[epoch]]
        # Parts of an earlier version may lack columns; the common ones are kept.
        return pd.concat(tables, ignore_index=True, join="inner")

    def _read_part_rows(self, path: Path) -> pd.DataFrame:
        try:
            rows = read_parquet(path, _COLUMNS, _MORE_COLUMNS).to_pandas()
        except PARQUET_ERRORS as error:
            raise UserError(f"{path}: {error}; save this epoch again") from None
        if fault := find_faulty_row(rows, self.chunk_seconds):
            name = rows["filename"].iloc[fault.row]
            raise UserError(f"{path}: row {fault.row} ({name}) {fault.what}; save this epoch again")
        return rows

    def read_arrays(self, epoch: int, *names: str) -> dict[str, np.ndarray]:
        """Return the datasets of `epoch` with these names, or all of them, aligned with `rows`: (N,...) each.

        Raises:
            UserError: a file cannot be read, or has values that cannot be: see `distill.store_checks`.
        """
        blocks = defaultdict(list)
        for part in self.parts[epoch]:
            for name, array in self._read_part(epoch, part, names or tuple(self.types)).items():
                blocks[name].append(array)
        return {name: np.concatenate(arrays) for name, arrays in blocks.items()}

    def _read_part(self, epoch: int, part: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        path = self._path(epoch, part)
        try:
            with self._open(epoch, part) as file:
                datasets = {name: self._get_dataset(file, name) for name in names}
                arrays = {name: dataset[()] for name, dataset in datasets.items()}
                checksums = {name: dataset.attrs.get("checksum") for name, dataset in datasets.items()}
        except HDF5_ERRORS as error:
            raise UserError(f"{path}: {error}; delete it and run save_logits.py again") from None
        # Comparing the classes of a row takes as long as reading: once for each file.
        if (epoch, part, names) not in self._checked:
            damaged = [
                name for name, value in checksums.items() if value not in (None, _compute_checksum(arrays[name]))
            ]
            if damaged:
                raise UserError(
                    f"{path}: {some(damaged)} are damaged (their checksum differs); delete it and run save_logits.py "
                    "again"
                )
            if fault := self._find_fault(arrays):
                name = self._read_part_rows(path.with_suffix(".parquet"))["filename"].iloc[fault.row]
                raise UserError(
                    f"{path}: row {fault.row} ({name}) {fault.what}; delete it and run save_logits.py again"
                )
            self._checked.add((epoch, part, names))
        return arrays


class StoreItems:
    """The part of a store that belongs to a pack, as a `distill.sources.TargetSource` without `target`.

    Epoch e of training uses the stored epoch number (e - 1) modulo the number of stored ones.

    Args:
        store: the teacher's outputs.
        pack: the clips; matched by name.
        max_epochs: number of stored epochs to use, from the first; 0 for all.
        check: which sounds to compare with those of the store, see `distill.sound_check.check_sounds`.

    Raises:
        UserError: no stored chunk belongs to a clip of the pack, the pack has other sounds under the same names, or
            the stored epochs have different chunks.
    """

    cached: ClassVar[tuple[str, ...]] = ("seeds",)  # datasets of the epochs in use that are kept in memory

    def __init__(self, store: TargetStore, pack: Pack, max_epochs: int = 0, check: Check = "sample") -> None:
        self.store, self.replay, self.chunk_seconds = store, store.replay, store.chunk_seconds
        self._cache: dict[int, dict[str, np.ndarray]] = {}
        self.epochs = store.epochs[: max_epochs or None]
        faults = Faults(f"the match of {store.folder} with {pack.manifest}")
        names = NameIndex(pack.names)
        rows = store.read_rows(self.epochs[0])
        clips, numbers = self._locate(names, rows)
        chunk_samples = round(store.chunk_seconds * pack.sample_rate)
        starts = numbers * chunk_samples
        stops = np.minimum(starts + chunk_samples, np.asarray(pack.n_samples)[clips])
        chunks = Chunks(clips, starts, stops, pack.sample_rate)
        is_found = clips >= 0
        stored_seconds = (rows["end"] - rows["start"]).to_numpy(np.float64)
        # Decoders differ by milliseconds; another clip of the same name differs by more.
        tolerance = min(0.5, 0.05 * store.chunk_seconds)
        fits = (chunks.n_samples > 0) & (np.abs(chunks.seconds - stored_seconds) < tolerance)
        is_used = is_found & fits
        self.n_unmatched = int((~is_found).sum())
        self.n_misfits = int((is_found & ~fits).sum())
        self.n_clips = len(np.unique(clips[is_used]))
        self.chunks = chunks.select(is_used)
        if "n_reference" in rows:
            self.n_reference = rows["n_reference"].to_numpy(np.int64)[is_used]
        else:
            self.n_reference = self._compute_published_lengths(rows[is_used])
        if not is_used.any():
            faults.add(
                f"none of its {len(rows)} chunks belongs to a clip of the pack: the store names "
                f"{some(rows['filename'].unique(), 3)}, the pack names {some(pack.names, 3)}"
                + (f"; {self.n_misfits} names match but the clips' lengths differ" if self.n_misfits else "")
                + "; give the pack that the targets were saved from, or save targets for this pack"
            )
            faults.raise_if_any()
        stored_rate, matched = store.meta.get("pack_rate"), chunks.select(is_found)
        check_sounds(store.what, store.folder, stored_rate, pack, rows[is_found], matched, faults, check)
        self._rows = self._find_epoch_rows(store, names, clips, numbers, np.flatnonzero(is_used), faults)
        faults.raise_if_any()
        if self.n_unmatched or self.n_misfits or self.n_clips < len(pack):
            logger.info(
                "%s: %d of %d chunks used (%d not in the pack, %d of another length), for %d of the %d clips",
                store.what, len(self.chunks), len(rows), self.n_unmatched, self.n_misfits, self.n_clips, len(pack),
            )  # fmt: skip

    def _locate(self, names: NameIndex, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return for each row the index of the clip in the pack (-1: missing) and of the chunk in the clip."""
        codes, unique = pd.factorize(rows["filename"])
        clips = names.find_all([str(name) for name in unique])[codes]
        return clips, np.round(rows["start"].to_numpy(np.float64) / self.chunk_seconds).astype(np.int64)

    def _compute_published_lengths(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the lengths of the teacher's input: the stored seconds, which float32 rounds in long recordings.

        If the difference from the pack's chunk is within that rounding, the length is that of the chunk.
        """
        stored = np.round((rows["end"] - rows["start"]).to_numpy(np.float64) * REFERENCE_RATE).astype(np.int64)
        in_pack = compute_reference_lengths(self.chunks)
        step = np.spacing(rows["end"].to_numpy(np.float32)).astype(np.float64) * REFERENCE_RATE
        return np.where(np.abs(stored - in_pack) <= np.maximum(step, 0.5), in_pack, stored)

    def _find_epoch_rows(
        self,
        store: TargetStore,
        names: NameIndex,
        clips: np.ndarray,
        numbers: np.ndarray,
        used: np.ndarray,
        faults: Faults,
    ) -> list[np.ndarray]:
        """Return for each stored epoch the row of every item; files of one epoch may order them differently."""
        expected = (clips * MAX_CHUNKS + numbers)[used]
        result = []
        for epoch in self.epochs:
            rows = store.read_rows(epoch)
            key_clips, key_numbers = self._locate(names, rows)
            keys = key_clips * MAX_CHUNKS + key_numbers
            order = np.argsort(keys, kind="stable")
            place = np.searchsorted(keys, expected, sorter=order)
            row = order[np.minimum(place, len(order) - 1)]
            n_missing = int((keys[row] != expected).sum())
            if n_missing:
                faults.add(
                    f"epoch {epoch} lacks {n_missing} of the chunks that epoch {self.epochs[0]} has; its files were "
                    "made from another list or interrupted: delete them and run save_logits.py again"
                )
            result.append(row)
        return result

    def find_rows(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return the number of the stored epoch that `epoch` of training uses, and the row of every item in it (M,)."""
        index = (epoch - 1) % len(self.epochs)
        return self.epochs[index], self._rows[index]

    def load_epoch(self, epoch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the row of every item in `epoch` of training (M,), and the datasets `cached` of the stored epoch."""
        stored, rows = self.find_rows(epoch)
        if stored not in self._cache:
            # Two are kept: a loader that reads ahead needs the next epoch before it has finished this one.
            self._cache = dict(list(self._cache.items())[-1:])
            self._cache[stored] = self._read_epoch(stored)
        return rows, self._cache[stored]

    def _read_epoch(self, stored: int) -> dict[str, np.ndarray]:
        return self.store.read_arrays(stored, *self.cached)

    def seed(self, epoch: int, item: int) -> int:
        """Return the stored seed of `item` in `epoch`."""
        rows, arrays = self.load_epoch(epoch)
        return int(arrays["seeds"][rows[item]])
