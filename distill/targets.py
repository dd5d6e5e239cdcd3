"""Stores of soft targets: a teacher's highest probabilities for every chunk in every epoch, with its seed.

A `distill.store.TargetStore` as published by CED: `logits_ep{E}_{R}.h5` with `topk_values` float16 (N, K),
`topk_indexes` int16 (N, K) and `seeds` int32 (N,) for epoch E and rank R. The values are probabilities, in spite
of the file name. Published folders have a pickled `meta.pt` in place of `meta.json`, which is parsed, never executed.
"""

import numpy as np

from audio.dataset import Pack
from common.errors import UserError
from distill.sound_check import Check
from distill.store import StoreItems, TargetStore
from distill.store_checks import MAX_CLASSES, RowFault, find_faulty_class, find_faulty_probability

LABEL_TYPES = ("last_mean", "last_half", "last_random", "527", "zero")


def rebuild_target(
    values: np.ndarray, indexes: np.ndarray, num_classes: int, label_type: str, seed: int = 0
) -> np.ndarray:
    """Rebuild a target over all classes from its K stored values.

    Args:
        values: (K,) stored probabilities.
        indexes: (K,) their classes.
        num_classes: C.
        label_type: value of the C - K classes outside the top K: `last_mean` min(v) / (C - K), `last_half` min(v) / 2,
            `last_random` a uniform number below min(v) each, `527` 1 / C, `zero` 0.
        seed: of `last_random`.

    Returns:
        (C,) float32.
    """
    values = values.astype(np.float32)
    smallest, n_others = values.min(), num_classes - len(values)
    if label_type == "last_random":
        target = np.random.default_rng(seed).random(num_classes, dtype=np.float32) * smallest
    else:
        fill = {
            "last_mean": smallest / max(n_others, 1),  # K = C: no class is filled
            "last_half": smallest / 2,
            "527": 1 / num_classes,
            "zero": 0.0,
        }[label_type]
        target = np.full(num_classes, fill, np.float32)
    target[indexes.astype(np.int64)] = values
    return target


class SoftTargetStore(TargetStore):
    """A folder of soft targets, opened and checked; see `distill.store.TargetStore`."""

    prefix, what, part_name = "logits", "soft targets", "rank"
    types = {"topk_values": np.float16, "topk_indexes": np.int16, "seeds": np.int32}  # noqa: RUF012

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        n_classes = self.num_classes or MAX_CLASSES
        values, indexes = shapes["topk_values"], shapes["topk_indexes"]
        if values != indexes or not 1 <= values[1] <= n_classes:
            raise ValueError(
                f"topk_values {values} and topk_indexes {indexes}; expected the same shape, and 1 to {n_classes} "
                "values a row"
            )

    def _find_fault(self, arrays: dict[str, np.ndarray]) -> RowFault | None:
        fault = super()._find_fault(arrays) or find_faulty_class(arrays["topk_indexes"], self.num_classes)
        return find_faulty_probability(arrays["topk_values"]) if not fault and "topk_values" in arrays else fault

    @property
    def num_classes(self) -> int | None:
        """C, if the store has it; published folders do not."""
        return self._facts.num_classes

    @property
    def labels(self) -> list[str] | None:
        """The teacher's class names, if the store has them."""
        return self._facts.labels


class StoredTargets(StoreItems):
    """The soft targets of a store that belong to a pack, as a `distill.sources.TargetSource`.

    Args:
        store: the targets.
        pack: the clips; matched by name.
        num_classes: C.
        label_type: see `rebuild_target`.
        max_epochs: number of stored epochs to use, from the first; 0 for all.
        check: which sounds to compare with those of the store.

    Raises:
        UserError: see `distill.store.StoreItems`; or the store has classes beyond C.
    """

    cached = tuple(SoftTargetStore.types)

    def __init__(
        self,
        store: SoftTargetStore,
        pack: Pack,
        num_classes: int,
        label_type: str,
        max_epochs: int = 0,
        check: Check = "sample",
    ) -> None:
        super().__init__(store, pack, max_epochs, check)
        self.num_classes, self.label_type = num_classes, label_type
        self._check_highest(store.read_arrays(self.epochs[0], "topk_indexes")["topk_indexes"])

    def _read_epoch(self, stored: int) -> dict[str, np.ndarray]:
        arrays = super()._read_epoch(stored)
        self._check_highest(arrays["topk_indexes"])
        return arrays

    def _check_highest(self, indexes: np.ndarray) -> None:
        highest = int(indexes.max(initial=0))
        if highest >= self.num_classes:
            raise UserError(
                f"{self.store.folder} has targets of class {highest}, but there are {self.num_classes} classes; give "
                "num_classes or labels_csv of the teacher"
            )

    def target(self, epoch: int, item: int) -> np.ndarray:
        """Return the rebuilt soft target (C,) of `item` in `epoch`."""
        rows, arrays = self.load_epoch(epoch)
        row = rows[item]
        return rebuild_target(
            arrays["topk_values"][row],
            arrays["topk_indexes"][row],
            self.num_classes,
            self.label_type,
            seed=int(arrays["seeds"][row]),
        )
