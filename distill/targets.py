"""The soft-target store: what a teacher answered to every chunk in every epoch, and the seed it was shown with.

Layout, as published by CED: a folder with `logits_ep{E}_{R}.h5` (datasets `topk_values` float16 (N, K),
`topk_indexes` int16 (N, K), `seeds` int32 (N,)) and, row by row beside it, `logits_ep{E}_{R}.parquet` (`filename`,
`start`, `end` in seconds) for epoch E and rank R. The values are probabilities, whatever the file name says.
`meta.json` says how they were made; published folders have a pickled `meta.pt` instead, which is read, never executed.

Stores written here add the column `n_reference`: each chunk's length in samples at the reference rate, so that a
student with another sample rate replays the same draws.
"""

import json
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from audio.dataset import Pack
from audio.manifest import NameIndex
from common.errors import Faults, UserError, some
from common.files import whole_file
from distill.published_meta import read_published_meta
from distill.replay import REFERENCE_RATE, Replay
from distill.sources import reference_lengths

logger = logging.getLogger(__name__)

LABEL_TYPES = ("last_mean", "last_half", "last_random", "527", "zero")
_DATASETS = ("topk_values", "topk_indexes", "seeds")
_MAX_CHUNKS = 2**32  # more than any clip has; makes one number of clip and chunk
_FILE = re.compile(r"logits_ep(\d+)_(\d+)\.h5")


def dense_target(
    values: np.ndarray, indexes: np.ndarray, num_classes: int, label_type: str, seed: int = 0
) -> np.ndarray:
    """Rebuild a target over all classes from its K stored ones.

    Args:
        values: (K,) stored probabilities.
        indexes: (K,) their classes.
        num_classes: C.
        label_type: what the C - K classes outside the top K get: `last_mean` min(v) / (C - K), `last_half` min(v) / 2,
            `last_random` a uniform number below min(v) each, `527` 1 / C, `zero` 0.
        seed: of `last_random`.

    Returns:
        (C,) float32.
    """
    values = values.astype(np.float32)
    smallest, n_left = values.min(), num_classes - len(values)
    if label_type == "last_random":
        target = np.random.default_rng(seed).random(num_classes, dtype=np.float32) * smallest
    else:
        fill = {
            "last_mean": smallest / max(n_left, 1),  # K = C leaves nothing to fill
            "last_half": smallest / 2,
            "527": 1 / num_classes,
            "zero": 0.0,
        }[label_type]
        target = np.full(num_classes, fill, np.float32)
    target[indexes.astype(np.int64)] = values
    return target


def epoch_file(folder: Path, epoch: int, rank: int) -> Path:
    """Return the HDF5 file of `epoch` and `rank`; its `.parquet` lies beside it."""
    return folder / f"logits_ep{epoch}_{rank}.h5"


def write_epoch(
    folder: Path, epoch: int, rank: int, rows: pd.DataFrame, values: np.ndarray, indexes: np.ndarray, seeds: np.ndarray
) -> None:
    """Write one epoch of one rank, whole or not at all.

    Args:
        folder: of the store.
        epoch: counts from 1.
        rank: of the process that made it.
        rows: `filename`, `start`, `end` (seconds), `n_reference` (samples) of the N chunks.
        values: (N, K) probabilities, highest first.
        indexes: (N, K) their classes.
        seeds: (N,) augmentation seeds.
    """
    target = epoch_file(folder, epoch, rank)
    with whole_file(target.with_suffix(".parquet")) as partial:
        rows.to_parquet(partial, compression="brotli", index=False)
    # The HDF5 file comes last: where it exists, the epoch is finished.
    with whole_file(target) as partial, h5py.File(partial, "w") as file:
        file.create_dataset("topk_values", data=values.astype(np.float16))
        file.create_dataset("topk_indexes", data=indexes.astype(np.int16))
        file.create_dataset("seeds", data=seeds.astype(np.int32))


class SoftTargetStore:
    """A folder of soft targets, opened and checked.

    Args:
        folder: with `logits_ep*_*.h5`.

    Attributes:
        epochs: the stored epoch numbers, ascending.
        meta: what `meta.json` (or a published `meta.pt`) says.
        replay: the augmentation its seeds are for.

    Raises:
        UserError: every fault of the folder at once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        faults = Faults(f"the soft-target folder {self.folder}")
        self._ranks: dict[int, list[int]] = defaultdict(list)
        for path in self.folder.glob("logits_ep*_*.h5"):
            if match := _FILE.fullmatch(path.name):
                self._ranks[int(match[1])].append(int(match[2]))
        if not self._ranks:
            there = "is not a folder" if not self.folder.is_dir() else "holds no logits_ep*_*.h5"
            raise UserError(
                f"{self.folder} {there}; make soft targets with `python save_logits.py CONFIG.yaml`, which prints the "
                "folder it writes, and give that folder"
            )
        self.epochs = sorted(self._ranks)
        self.meta = self._read_meta(faults)
        ranks = range(self.meta.get("world_size", 1 + max(max(r) for r in self._ranks.values())))
        for epoch in self.epochs:
            missing = sorted(set(ranks) - set(self._ranks[epoch]))
            missing += [r for r in self._ranks[epoch] if not self._path(epoch, r).with_suffix(".parquet").is_file()]
            self._ranks[epoch].sort()
            if not missing:
                self._check_rows(epoch, faults)
            else:
                faults.add(
                    f"epoch {epoch} lacks the file of rank {some(map(str, missing))}; run save_logits.py again with "
                    "the same settings, it goes on where it stopped"
                )
        faults.raise_if_any()
        absent = sorted(set(range(self.epochs[0], self.epochs[-1])) - set(self.epochs))
        if absent:
            raise UserError(
                f"{self.folder} lacks epoch {some(map(str, absent))} between others; run save_logits.py again with the "
                "same settings, it makes what is missing"
            )
        planned = self.meta.get("config", {}).get("epochs")
        if planned and len(self.epochs) < planned:
            logger.warning("%s holds %d of the %d epochs planned", self.folder, len(self.epochs), planned)
        self.replay = Replay(**{k: self.meta[k] for k in ("wavtransforms", "spectransforms")} | self._fill_setting())

    def _check_rows(self, epoch: int, faults: Faults) -> None:
        """Open every file of an epoch, and see that values and names go together, row by row."""
        for rank in self._ranks[epoch]:
            path = self._path(epoch, rank)
            try:
                with self._open(epoch, rank) as file:
                    lengths = {name: len(file[name]) for name in _DATASETS}
                lengths["names"] = pyarrow.parquet.read_metadata(path.with_suffix(".parquet")).num_rows
            except UserError as error:
                faults.add(str(error))
            except (KeyError, OSError, pyarrow.ArrowException) as error:
                faults.add(f"{path} and the .parquet beside it do not hold what a store holds ({error}); save it anew")
            else:
                if len(set(lengths.values())) > 1:
                    faults.add(f"{path} and the .parquet beside it differ in length ({lengths}); save this epoch anew")

    def _fill_setting(self) -> dict[str, Any]:
        return {"mask_fill": self.meta["mask_fill"]} if "mask_fill" in self.meta else {}

    def _path(self, epoch: int, rank: int) -> Path:
        return epoch_file(self.folder, epoch, rank)

    def _read_meta(self, faults: Faults) -> dict[str, Any]:
        empty: dict[str, Any] = {"wavtransforms": {}, "spectransforms": []}
        if (path := self.folder / "meta.json").is_file():
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(said, dict) or not isinstance(said.get("config", {}), dict):
                    raise ValueError("not the mapping that save_logits.py writes")
                return empty | said
            except ValueError as error:
                faults.add(f"{path} cannot be understood ({error}); save the targets anew")
        elif (path := self.folder / "meta.pt").is_file():
            try:
                return read_published_meta(path)
            except UserError as error:
                faults.add(str(error))
        else:
            faults.add(
                "neither meta.json nor meta.pt is there, so the augmentation of its seeds is unknown; copy the file "
                "that belongs to these targets beside them"
            )
        return empty

    def _open(self, epoch: int, rank: int) -> h5py.File:
        path = self._path(epoch, rank)
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run save_logits.py again") from None

    @property
    def num_classes(self) -> int | None:
        """C, where the store says it; published folders do not."""
        return self.meta.get("num_classes")

    @property
    def labels(self) -> list[str] | None:
        """The teacher's class names, where the store says them."""
        return self.meta.get("labels")

    @property
    def chunk_seconds(self) -> float:
        """Length of a chunk in seconds."""
        return float(self.meta.get("config", {}).get("chunk_length", 10.0))

    def rows(self, epoch: int) -> pd.DataFrame:
        """Return the rows of `epoch`, every rank's in turn: `filename`, `start`, `end`, and `n_reference` if stored."""
        files = [self._path(epoch, r).with_suffix(".parquet") for r in self._ranks[epoch]]
        return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)

    def arrays(self, epoch: int) -> dict[str, np.ndarray]:
        """Return `topk_values` (N, K), `topk_indexes` (N, K) and `seeds` (N,) of `epoch`, aligned with `rows`."""
        parts = defaultdict(list)
        for rank in self._ranks[epoch]:
            with self._open(epoch, rank) as file:
                for name in _DATASETS:
                    parts[name].append(file[name][()])
        return {name: np.concatenate(blocks) for name, blocks in parts.items()}


class StoredTargets:
    """The part of a store that belongs to a pack, as a `distill.sources.TargetSource`.

    Epoch e of training uses the stored epoch number (e - 1) modulo the number of stored ones: every stored epoch, in
    order, then from the start again.

    Args:
        store: the targets.
        pack: the clips; matched by name.
        num_classes: C.
        label_type: see `dense_target`.
        max_epochs: use the first so many stored epochs; 0 for all.

    Raises:
        UserError: no stored chunk belongs to a clip of the pack, or the stored epochs hold different chunks.
    """

    def __init__(
        self, store: SoftTargetStore, pack: Pack, num_classes: int, label_type: str, max_epochs: int = 0
    ) -> None:
        self.store, self.num_classes, self.label_type = store, num_classes, label_type
        self.replay = store.replay
        self.epochs = store.epochs[: max_epochs or None]
        faults = Faults(f"the match of {store.folder} with {pack.manifest}")
        names = NameIndex(pack.names)
        rows = store.rows(self.epochs[0])
        clips, chunks = self._locate(names, rows)
        chunk_samples = round(store.chunk_seconds * pack.sample_rate)
        starts = chunks * chunk_samples
        n_samples = np.asarray(pack.n_samples)[clips]
        stops = np.minimum(starts + chunk_samples, n_samples)
        found = clips >= 0
        stored_seconds = (rows["end"] - rows["start"]).to_numpy(np.float64)
        # Decoders differ by milliseconds; another clip of the same name differs by more.
        tolerance = min(0.5, 0.05 * store.chunk_seconds)
        fits = (stops > starts) & (np.abs((stops - starts) / pack.sample_rate - stored_seconds) < tolerance)
        used = found & fits
        self.n_unmatched = int((~found).sum())
        self.n_misfits = int((found & ~fits).sum())
        self.n_clips = len(np.unique(clips[used]))
        self.bounds = np.stack([clips, starts, stops], axis=1)[used]  # (M, 3)
        if "n_reference" in rows:
            self.n_reference = rows["n_reference"].to_numpy(np.int64)[used]
        else:
            self.n_reference = self._published_lengths(rows[used], pack.sample_rate)
        if not used.any():
            faults.add(
                f"none of its {len(rows)} chunks belongs to a clip of the pack: the store names "
                f"{some(rows['filename'].unique(), 3)}, the pack names {some(pack.names, 3)}"
                + (f"; {self.n_misfits} names match but the clips' lengths differ" if self.n_misfits else "")
                + "; give the pack that the targets were saved from, or save targets for this pack"
            )
            faults.raise_if_any()
        self._rows = self._rows_of_epochs(names, clips, chunks, np.flatnonzero(used), faults)
        faults.raise_if_any()
        highest = int(store.arrays(self.epochs[0])["topk_indexes"].max())
        if highest >= num_classes:
            raise UserError(
                f"{store.folder} holds targets for class {highest}, but there are {num_classes} classes; give "
                "num_classes or labels_csv as the teacher had them"
            )
        self._cache: dict[int, dict[str, np.ndarray]] = {}
        if self.n_unmatched or self.n_misfits or self.n_clips < len(pack):
            logger.info(
                "soft targets: %d of %d chunks used (%d not in the pack, %d of another length), for %d of the %d clips",
                len(self.bounds), len(rows), self.n_unmatched, self.n_misfits, self.n_clips, len(pack),
            )  # fmt: skip

    def _locate(self, names: NameIndex, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return for each row the clip's number in the pack (-1: not there) and the chunk's number in the clip."""
        codes, unique = pd.factorize(rows["filename"])
        clips = names.find_all([str(name) for name in unique])[codes]
        return clips, np.round(rows["start"].to_numpy(np.float64) / self.store.chunk_seconds).astype(np.int64)

    def _published_lengths(self, rows: pd.DataFrame, sample_rate: int) -> np.ndarray:
        """Return the samples that the teacher heard: the stored seconds, which float32 rounds in long recordings.

        Where that rounding alone could explain the difference from the pack's own chunk, the chunk is right.
        """
        stored = np.round((rows["end"] - rows["start"]).to_numpy(np.float64) * REFERENCE_RATE).astype(np.int64)
        own = reference_lengths(self.bounds, sample_rate)
        step = np.spacing(rows["end"].to_numpy(np.float32)).astype(np.float64) * REFERENCE_RATE
        return np.where(np.abs(stored - own) <= np.maximum(step, 0.5), own, stored)

    def _rows_of_epochs(
        self, names: NameIndex, clips: np.ndarray, chunks: np.ndarray, used: np.ndarray, faults: Faults
    ) -> list[np.ndarray]:
        """Return for each stored epoch the row of every item; files of one epoch may order them differently."""
        wanted = (clips * _MAX_CHUNKS + chunks)[used]
        result = []
        for epoch in self.epochs:
            rows = self.store.rows(epoch)
            key_clips, key_chunks = self._locate(names, rows)
            keys = key_clips * _MAX_CHUNKS + key_chunks
            order = np.argsort(keys, kind="stable")
            place = np.searchsorted(keys, wanted, sorter=order)
            row = order[np.minimum(place, len(order) - 1)]
            lacking = int((keys[row] != wanted).sum())
            if lacking:
                faults.add(
                    f"epoch {epoch} lacks {lacking} of the chunks that epoch {self.epochs[0]} has; its files were "
                    "made from another list or interrupted: delete them and run save_logits.py again"
                )
            result.append(row)
        return result

    def _epoch_arrays(self, epoch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        index = (epoch - 1) % len(self.epochs)
        stored = self.epochs[index]
        if stored not in self._cache:
            # Two are kept: a loader that reads ahead asks for the next epoch before it has left this one.
            self._cache = dict(list(self._cache.items())[-1:])
            self._cache[stored] = self.store.arrays(stored)
        return self._rows[index], self._cache[stored]

    def seed(self, epoch: int, item: int) -> int:
        """Return the stored seed of `item` in `epoch`."""
        rows, arrays = self._epoch_arrays(epoch)
        return int(arrays["seeds"][rows[item]])

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the rebuilt soft target (C,) of `item` in `epoch`."""
        rows, arrays = self._epoch_arrays(epoch)
        row = rows[item]
        return dense_target(
            arrays["topk_values"][row],
            arrays["topk_indexes"][row],
            self.num_classes,
            self.label_type,
            seed=int(arrays["seeds"][row]),
        )
