"""Packed clips as waveforms: the pack of a manifest, a PyTorch dataset of clips or chunks, and padding.

B batch, S samples, N clips.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from audio.cutting import Chunks
from audio.io import from_int16, resample
from audio.manifest import read_manifest, resolve
from audio.shards import Shard
from common.entry_points import describe_dead_worker
from common.errors import Faults, UserError, some
from common.interrupts import start_worker
from common.temporary import process_folder

logger = logging.getLogger(__name__)

ASSUMED_SAMPLE_RATE = 16000  # Hz; of published stores, which lack it


@dataclass(eq=False)
class Pack:
    """The clips of a packed manifest (`labels/NAME.tsv`), each found in its shard.

    A pack may be pickled, and inherited over a fork: each process reads with handles of its own.

    Attributes:
        manifest: the file it was opened from.
        table: the rows whose clip is in a shard, renumbered from 0; every value a string.
        shards: the files of clips.
        shard_of: index of each clip's shard, int (N,).
        position_of: index of each clip in its shard, int64 (N,).
        sample_rate: of every clip, in Hz.
        n_missing: number of rows that were left out because their clip is in no shard.
    """

    manifest: Path
    table: pd.DataFrame
    shards: list[Shard]
    shard_of: np.ndarray
    position_of: np.ndarray
    sample_rate: int
    n_missing: int = 0

    @classmethod
    def open(
        cls,
        manifest_path: str | Path,
        *,
        required: Sequence[str] = ("filename", "hdf5path"),
        verify: bool = False,
    ) -> "Pack":
        """Open the clips that a manifest lists.

        Args:
            manifest_path: a tab-separated table with at least `filename` and `hdf5path`.
            required: columns that must be present.
            verify: compare every clip that is read with its checksum, see `audio.shards.Shard`.

        Raises:
            UserError: with all faults: a missing column, absent or damaged shards, sample rates that differ, or no clip
                of the table in its shards. Where only some clips are missing, their rows are left out with a warning.
        """
        manifest = Path(manifest_path)
        table = _read_packed_manifest(manifest, required)
        paths = table["hdf5path"].unique().tolist()
        shards = _open_shards(paths, manifest, verify)
        shard_of = pd.Index(paths).get_indexer(pd.Index(table["hdf5path"]))
        position_of = np.full(len(table), -1, dtype=np.int64)
        for number, shard in enumerate(shards):
            rows = np.flatnonzero(shard_of == number)
            position_of[rows] = shard.index.find_all(table["filename"].to_numpy()[rows])
        usable = position_of >= 0
        missing = table["filename"][~usable].tolist()
        if not usable.any():
            raise UserError(
                f"{manifest}: none of its {len(missing)} clips is in the shards {some(paths, 3)}; found for "
                f"example {some(map(repr, shards[0].names), 2)}, expected {some(map(repr, missing), 2)}"
            )
        if missing:
            logger.warning(
                "%s: %d clips are not in their shards and are left out: %s", manifest, len(missing), some(missing)
            )
        return cls(
            manifest,
            table[usable].reset_index(drop=True),
            shards,
            shard_of[usable],
            position_of[usable],
            _get_common_rate(shards, manifest),
            len(missing),
        )

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, rows: np.ndarray) -> "Pack":
        """Return the pack of the clips `rows` (int), in that order."""
        table = self.table.iloc[rows].reset_index(drop=True)
        shard_of, position_of = self.shard_of[rows], self.position_of[rows]
        return Pack(self.manifest, table, self.shards, shard_of, position_of, self.sample_rate)

    @cached_property
    def names(self) -> list[str]:
        """The clips' names, as in the manifest."""
        return self.table["filename"].tolist()

    @cached_property
    def n_samples(self) -> np.ndarray:
        """Length of each clip in samples, int64 (N,); in the clips layout every clip is opened for it, once."""
        lengths = np.empty(len(self), dtype=np.int64)
        slow = any(shard.layout == "clips" for shard in self.shards) and len(self) > 10_000
        for i in tqdm(range(len(self)), desc="clip lengths", unit="clip", disable=not slow):
            lengths[i] = self.shards[self.shard_of[i]].n_samples(int(self.position_of[i]))
        return lengths

    def shard_path(self, i: int) -> Path:
        """Return the path of the shard of clip `i`."""
        return self.shards[self.shard_of[i]].path

    def read(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read clip `i`, or its part from sample `start` to before `stop`: float32 (S,), full scale at 1.0."""
        return from_int16(self.shards[self.shard_of[i]].read(int(self.position_of[i]), start, stop))

    def hash_sound(self, i: int, start: int = 0, stop: int | None = None) -> int:
        """Return eight bytes of BLAKE2b over the 16-bit samples of clip `i`, or a part of it, as a signed integer."""
        samples = self.shards[self.shard_of[i]].read(int(self.position_of[i]), start, stop)
        digest = hashlib.blake2b(np.ascontiguousarray(samples, "<i2").data, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _read_packed_manifest(manifest: Path, required: Sequence[str]) -> pd.DataFrame:
    try:
        return read_manifest(manifest, required=required)
    except UserError as error:
        raise UserError(f"{error}{_suggest_fix(str(error), manifest)}") from None


def _suggest_fix(fault: str, manifest: Path) -> str:
    """Return what to do about a table that is not a packed list, as a continuation of the fault."""
    missing = fault.partition("; missing ")[2]
    if "looks separated" in missing:
        return "; packed lists are tab-separated: give the one that scripts/wavlist_to_hdf5.py wrote to OUTDIR/labels"
    if "'hdf5path'" in missing:
        return (
            f". The list is not packed yet: run `python scripts/wavlist_to_hdf5.py {manifest} OUTDIR`, then use "
            f"OUTDIR/labels/{manifest.stem}.tsv"
        )
    if "'labels'" in missing:
        return (
            ". The list is packed, but has no labels: add a column `labels` to it (several of a clip joined by ;), or "
            "rename one"
        )
    return ""


def _open_shards(paths: Sequence[str], manifest: Path, verify: bool) -> list[Shard]:
    """Open every shard; all faults are raised at once."""
    faults = Faults(str(manifest))
    shards = []
    for path in paths:
        if not path:
            faults.add("some rows have no 'hdf5path'")
            continue
        places = [Path(path), resolve(path, manifest)]
        if not Path(path).parent.name.startswith("."):  # else a shard of a pack that is just being replaced
            places.append(manifest.parent.parent / "hdf5" / Path(path).name)
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            searched = ", ".join(dict.fromkeys(map(str, [places[0], manifest.parent / path, *places[2:]])))
            faults.add(f"the shard {path!r} does not exist (searched {searched})")
            continue
        shard = Shard(place, verify)
        try:
            len(shard)
        except UserError as error:
            faults.add(str(error))
        shards.append(shard)
    faults.raise_if_any()
    return shards


def _get_common_rate(shards: Sequence[Shard], manifest: Path) -> int:
    rates: dict[int, list[str]] = {}
    unknown = [shard for shard in shards if shard.sample_rate is None]
    for shard in shards:
        rates.setdefault(shard.sample_rate or ASSUMED_SAMPLE_RATE, []).append(shard.path.name)
    if unknown:
        logger.warning("%s: %s has no sample rate; %d Hz are assumed", manifest, unknown[0].path, ASSUMED_SAMPLE_RATE)
    if len(rates) > 1:
        found = "; ".join(f"{rate} Hz in {some(names, 3)}" for rate, names in sorted(rates.items()))
        raise UserError(
            f"{manifest}: its shards differ in sample rate ({found}); pack them again with one --sample_rate"
        )
    return next(iter(rates))


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips, or chunks of them, at the sample rates of models.

    Args:
        pack: the clips.
        sample_rates: in Hz; each item has the waveform at every one of them.
        chunks: of the pack; whole clips when None.
    """

    def __init__(self, pack: Pack, sample_rates: Sequence[int], chunks: Chunks | None = None) -> None:
        self.pack = pack
        self.sample_rates = list(sample_rates)
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.pack if self.chunks is None else self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `index`, the clip's `name` and `waveforms`: for each rate in Hz a float32 tensor (S,)."""
        clip, start, stop = (index, 0, None) if self.chunks is None else self.chunks[index]
        waveform = self.pack.read(clip, start, stop)
        waveforms = {
            rate: torch.from_numpy(resample(waveform, self.pack.sample_rate, rate)) for rate in self.sample_rates
        }
        return {"index": index, "name": self.pack.names[clip], "waveforms": waveforms}


class ClipLoader(DataLoader[Any]):
    """A DataLoader whose processes end with this one; one that has died is an error with its cause.

    Args:
        dataset: the clips.
        n_workers: loader processes; at most one a core is started, since more are no faster.
        options: of the DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], n_workers: int, **options: Any) -> None:
        n = min(n_workers, os.cpu_count() or 1)
        start = partial(_start_worker, str(process_folder())) if n else None
        super().__init__(dataset, num_workers=n, worker_init_fn=start, **options)

    def __iter__(self) -> Any:
        """Return an iterator over batches; it raises `UserError` if a loader process has died."""
        batches = super().__iter__()
        return _explain_dead_workers(batches) if self.num_workers else batches


def _start_worker(folder: str, _: int) -> None:
    start_worker()
    tempfile.tempdir = folder  # of the parent: Python's sockets would stay when it is killed


def _explain_dead_workers(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        dead = describe_dead_worker(error)
        if dead is None:
            raise
        raise UserError(dead) from error
    finally:  # processes that are at work would miss the folder of their sockets, which is removed at the end
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def pad_batch(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack waveforms of different lengths.

    Args:
        waveforms: float32 (S,) each.

    Returns:
        The batch (B, longest S) with zeros after each clip's end, and the lengths, int64 (B,).
    """
    lengths = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths
