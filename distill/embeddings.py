"""Stores of embeddings: a teacher's embedding of every chunk, for distillation from embeddings alone (S-SONDO).

A `distill.store.TargetStore`: `embeddings_ep{E}_{R}.h5` with `embedding` float16 (N, E) and `seeds` int32 (N,) for
epoch E and part R. Parts of an epoch are written one after the other, so that an interruption loses little. One epoch
without augmentation is usual; augmentation is replayed for the student, as with soft targets.

Letters: N chunks, M items, E embedding width.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from audio.dataset import Pack
from common.errors import UserError, some
from distill.sound_check import Check
from distill.store import StoreItems, TargetStore
from distill.store_checks import RowFault, find_non_finite

_BLOCK = 2**24  # numbers of chunks that are averaged at once


class EmbeddingStore(TargetStore):
    """A folder of embeddings, opened and checked; see `distill.store.TargetStore`."""

    prefix, what = "embeddings", "embeddings"
    types = {"embedding": np.float16, "seeds": np.int32}  # noqa: RUF012

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._files: dict[tuple[int, int], h5py.File] = {}
        self._owner = os.getpid()
        widths = set()
        for epoch in self.epochs:
            for part in self.parts[epoch]:
                with self._open(epoch, part) as file:
                    widths.add(file["embedding"].shape[1:])
        if len(widths) > 1 or len(min(widths)) != 1:
            raise UserError(
                f"{self.folder} has embeddings of shapes {some(map(str, sorted(widths)))}; expected one width in all "
                "of its files: delete those of another teacher, or the folder, and run save_logits.py again"
            )
        self.width: int = min(widths)[0]

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if not shapes["embedding"][1]:
            raise ValueError(f"embedding has shape {shapes['embedding']}; expected (N,E)")

    def _find_fault(self, arrays: dict[str, np.ndarray]) -> RowFault | None:
        fault = super()._find_fault(arrays)
        return find_non_finite(arrays["embedding"]) if not fault and "embedding" in arrays else fault

    def read(self, epoch: int) -> np.ndarray:
        """Return all embeddings of `epoch`, aligned with `rows`: float32 (N, E)."""
        return self.read_arrays(epoch, "embedding")["embedding"].astype(np.float32)

    def read_row(self, epoch: int, part: int, row: int) -> np.ndarray:
        """Return the embedding in `row` of a part, float32 (E,), in any process."""
        if self._owner != os.getpid():  # a handle must not be shared with the process that this one was forked from
            self._files, self._owner = {}, os.getpid()
        if (epoch, part) not in self._files:
            self._files[epoch, part] = self._open(epoch, part)
        values = np.asarray(self._files[epoch, part]["embedding"][row], np.float32)
        if not np.isfinite(values).all():
            path = self._path(epoch, part)
            raise UserError(f"{path}: row {row} has values that are not finite; delete it and run save_logits.py again")
        return values

    def read_ends(self, epoch: int) -> np.ndarray:
        """Return the end of each part of `epoch` among its rows, int64."""
        lengths = []
        for part in self.parts[epoch]:
            with self._open(epoch, part) as file:
                lengths.append(len(file["seeds"]))
        return np.cumsum(lengths)

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a loader worker, without open files."""
        return self.__dict__ | {"_files": {}}


class StoredEmbeddings(StoreItems):
    """The embeddings of a store that belong to a pack, as a `distill.sources.TargetSource`.

    Args:
        store: the embeddings.
        pack: the clips; matched by name.
        max_epochs: number of stored epochs to use, from the first; 0 for all.
        check: which sounds to compare with those of the store.

    Raises:
        UserError: see `distill.store.StoreItems`.
    """

    def __init__(self, store: EmbeddingStore, pack: Pack, max_epochs: int = 0, check: Check = "sample") -> None:
        super().__init__(store, pack, max_epochs, check)
        self.store: EmbeddingStore = store
        self.widths = (store.width,)
        self._ends = {epoch: store.read_ends(epoch) for epoch in self.epochs}

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the stored embedding (E,) of `item` in `epoch`, float32."""
        stored, rows = self.find_rows(epoch)
        ends = self._ends[stored]
        place = int(np.searchsorted(ends, rows[item], side="right"))
        within = rows[item] - (ends[place - 1] if place else 0)
        return self.store.read_row(stored, self.store.parts[stored][place], int(within))


@dataclass(frozen=True)
class ChunkEmbeddings:
    """The embeddings of the chunks of a pack's clips.

    Attributes:
        values: float16 (M, E), the chunks of each clip one after the other, in the order of the pack.
        clip: (M,) clip of each, int.
        shares: (M,) length of each as a part of its clip, float64.
    """

    values: np.ndarray
    clip: np.ndarray
    shares: np.ndarray


def read_chunk_embeddings(store: EmbeddingStore, pack: Pack) -> ChunkEmbeddings:
    """Return the embeddings of the chunks of each clip of a pack.

    Args:
        store: the embeddings; its first epoch is used.
        pack: N clips; matched by name.

    Raises:
        UserError: clips without an embedding.
    """
    items = StoreItems(store, pack, max_epochs=1)
    epoch, rows = items.find_rows(1)
    clips, seconds = items.chunks.clip, items.chunks.seconds
    total = np.bincount(clips, seconds, len(pack))
    if not total.all():
        if len(set(pack.names)) < len(pack):
            repeated = [name for name, count in Counter(pack.names).items() if count > 1]
            raise UserError(
                f"{pack.manifest} lists {len(repeated)} clips more than once: {some(repeated)}; list each once"
            )
        missing = [pack.names[clip] for clip in np.flatnonzero(total == 0)]
        raise UserError(
            f"{store.folder} lacks the embeddings of {len(missing)} of the {len(pack)} clips of {pack.manifest}: "
            f"{some(missing)}; make a store of that list, or remove these clips from it"
        )
    order = np.argsort(clips, kind="stable")
    values = store.read_arrays(epoch, "embedding")["embedding"][rows[order]]
    return ChunkEmbeddings(values, clips[order], (seconds / total[clips])[order])


def compute_clip_embeddings(store: EmbeddingStore, pack: Pack) -> np.ndarray:
    """Return an embedding for each clip of a pack: the mean of its chunks', weighted by their length, float32 (N, E).

    Args:
        store: the embeddings; its first epoch is used.
        pack: N clips; matched by name.

    Raises:
        UserError: clips without an embedding.
    """
    chunks = read_chunk_embeddings(store, pack)
    result = np.zeros((len(pack), store.width))
    size = max(1, _BLOCK // store.width)
    for start in range(0, len(chunks.values), size):  # the products are float64, four times the size of the values
        part = slice(start, start + size)
        np.add.at(result, chunks.clip[part], chunks.values[part] * chunks.shares[part, None])
    return result.astype(np.float32)
