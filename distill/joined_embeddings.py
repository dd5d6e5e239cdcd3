"""Stored embeddings of several teachers, joined to one target.

Letters: M items, W the widths of the teachers' embeddings together.
"""

from collections.abc import Sequence

import numpy as np

from audio.dataset import Pack
from common.errors import Faults, UserError
from distill.embeddings import StoredEmbeddings
from distill.store_checks import MAX_CHUNKS


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
