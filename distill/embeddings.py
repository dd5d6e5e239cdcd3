"""Stores of embeddings: a teacher's embedding of every chunk, for distillation from embeddings alone (S-SONDO).

A `distill.store.TargetStore`: `embeddings_ep{E}_{R}.h5` with `embedding` float16 (N, E) and `seeds` int32 (N,) for
epoch E and part R. Parts of an epoch are written one after the other, so that an interruption loses little. One epoch
without augmentation is usual; augmentation is replayed for the student, as with soft targets.

Letters: N chunks, M items, E embedding width, W the sum of the widths of several teachers.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from audio.dataset import Pack
from common.errors import Faults, UserError, some
from distill.sound_check import Check
from distill.store import StoreItems, TargetStore
from distill.store_checks import MAX_CHUNKS, RowFault, find_non_finite


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


class JoinedEmbeddings:
    """The stored embeddings of several teachers side by side, as a `distill.sources.TargetSource`.

    Every store must have the same chunks and epochs. Where there is augmentation it must be that of all of them: the
    same transforms and seeds, which stores have that were made of one list with one `seed`.

    Args:
        sources: of each teacher, on the same pack.
        pack: the clips.

    Raises:
        UserError: the stores do not go together; lists all differences.
    """

    def __init__(self, sources: Sequence[StoredEmbeddings], pack: Pack) -> None:
        first = sources[0]
        self.sources, self.pack, self.chunks, self.n_reference = list(sources), pack, first.chunks, first.n_reference
        self.replay, self.chunk_seconds, self.epochs = first.replay, first.chunk_seconds, first.epochs
        self.widths = tuple(source.store.width for source in sources)
        self._places: list[np.ndarray] = []  # of each item in each source
        faults = Faults("the stores of embeddings")
        for source in sources:
            with faults.noted():
                self._places.append(self._match(source))
        faults.raise_if_any()

    def seed(self, epoch: int, item: int) -> int:
        """Return the stored seed of `item` in `epoch`."""
        return self.sources[0].seed(epoch, item)

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the embeddings (W,) of `item` in `epoch` of training, float32."""
        pairs = zip(self.sources, self._places, strict=True)
        return np.concatenate([source.target(epoch, int(places[item])) for source, places in pairs])

    def _match(self, source: StoredEmbeddings) -> np.ndarray:
        """Return the place (M,) of every item in another source.

        Raises:
            UserError: it has other chunks, epochs or augmentation.
        """
        one, other = (f"{each.store.folder}" for each in (self.sources[0], source))
        again = "make both stores of one list with the same settings"
        if source.chunk_seconds != self.chunk_seconds:
            lengths = f"{self.chunk_seconds:g} s, those of {other} {source.chunk_seconds:g} s"
            raise UserError(f"the chunks of {one} are {lengths}; give both stores one chunk_length")
        own, keys = (each.clip * MAX_CHUNKS + each.start for each in (self.chunks, source.chunks))
        if len(alone := np.setxor1d(own, keys)):
            raise UserError(
                f"{one} has the embeddings of {len(own)} chunks of these clips, {other} of {len(keys)}; {len(alone)} "
                f"are in one of the two alone, the first of {self.pack.names[alone[0] // MAX_CHUNKS]}: {again}"
            )
        order = np.argsort(keys)
        places = order[np.searchsorted(keys, own, sorter=order)]
        if source.epochs != self.epochs:
            raise UserError(
                f"{one} has {len(self.epochs)} epochs (from {self.epochs[0]}), {other} {len(source.epochs)} (from "
                f"{source.epochs[0]}); store as many, or use those that all have: --max_aug_epochs"
            )
        if source.replay != self.replay:
            raise UserError(f"{one} and {other} were stored with different transforms; {again}")
        is_augmented = bool(self.replay.wavtransforms or self.replay.spectransforms)
        if is_augmented and not self._have_same_draws(source, places):
            raise UserError(
                f"{one} and {other} were stored with different augmentation seeds, so no student's input fits both; "
                f"{again} and the same seed"
            )
        return places

    def _have_same_draws(self, source: StoredEmbeddings, places: np.ndarray) -> bool:
        """Whether the augmentation of every item is the same in every epoch, which reads all seeds."""
        if not np.array_equal(source.n_reference[places], self.n_reference):
            return False
        for epoch in range(1, len(self.epochs) + 1):
            (own, ours), (rows, others) = self.sources[0].load_epoch(epoch), source.load_epoch(epoch)
            if not np.array_equal(ours["seeds"][own], others["seeds"][rows[places]]):
                return False
        return True


def compute_clip_embeddings(store: EmbeddingStore, pack: Pack) -> np.ndarray:
    """Return an embedding for each clip of a pack: the mean of its chunks', weighted by their length, float32 (N, E).

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
    result = np.zeros((len(pack), store.width))
    np.add.at(result, clips, store.read(epoch)[rows] * seconds[:, None])
    return (result / total[:, None]).astype(np.float32)
