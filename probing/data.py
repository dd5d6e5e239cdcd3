"""The clips of a probe: packs, their classes and their folds.

Letters: N clips, C classes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio.dataset import Pack
from audio.labels import count_classes, describe_lookalikes, parse_labels
from common.errors import Faults, UserError, did_you_mean, some
from models import read_labels
from probing.options import ProbeOptions
from training.labelled import LabelledPack, open_pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSet:
    """Labelled clips without their embeddings.

    Attributes:
        packs: part ("data", or "train", "valid" and "test") → pack.
        targets: part → float32 (N,C) of 0 and 1.
        labels: the C class names.
        folds: of each clip of `packs["data"]`; None without folds.
    """

    packs: dict[str, Pack]
    targets: dict[str, np.ndarray]
    labels: list[str]
    folds: np.ndarray | None

    @property
    def train_part(self) -> str:
        """The part that heads are trained on."""
        return "train" if self.folds is None else "data"

    @property
    def test_part(self) -> str:
        """The part that heads are tested on."""
        return "test" if self.folds is None else "data"

    @property
    def single(self) -> bool:
        """Whether every clip has exactly one label."""
        return all(bool((targets.sum(axis=1) == 1).all()) for targets in self.targets.values())


def open_clips(options: ProbeOptions, faults: Faults) -> ProbeSet | None:
    """Open the packs of a probe, with their labels and folds; their faults are added to `faults`."""
    column = options.label_column
    packs: dict[str, Pack] = {}
    columns = {}
    for part, path in options.packs().items():
        pack = open_pack(path, faults, verify=options.verify)
        if pack is None:
            continue
        packs[part] = pack
        if column in pack.table:
            columns[part] = pack.table[column]
            continue
        names = [str(name) for name in pack.table.columns]
        faults.add(
            f"{path} has no column {column!r}{did_you_mean(column, names)} for the classes of each clip; its columns "
            f"are {some(names, 20)}: add it, or choose another one with --label_column"
        )
    folds = _read_folds(packs["data"], options, faults) if "data" in packs else None
    if len(columns) < len(options.packs()) or not columns:
        return None
    classes = _read_classes(packs, columns, options, faults)
    if classes is None or (folds is None and "data" in packs):
        return None
    warn_of_overlap(packs)
    return ProbeSet(packs, *classes, folds)


def warn_of_overlap(packs: Mapping[str, Pack]) -> None:
    """Log validation and test clips that are training clips as well; `packs` are by part."""
    for part in [part for part in ("valid", "test") if {part, "train"} <= set(packs)]:
        overlap = set(packs[part].names) & set(packs["train"].names)
        if overlap:
            logger.warning("%d clips are in train_data and in %s_data: %s", len(overlap), part, some(sorted(overlap)))


def _read_folds(pack: Pack, options: ProbeOptions, faults: Faults) -> np.ndarray | None:
    names = [str(name) for name in pack.table.columns]
    if options.fold_column not in names:
        faults.add(
            f"{pack.manifest} has no column {options.fold_column!r}{did_you_mean(options.fold_column, names)} for the "
            f"fold of each clip; its columns are {some(names, 20)}: choose one with --fold_column, or give "
            "--train_data and --test_data"
        )
        return None
    folds = pack.table[options.fold_column].astype(str).str.strip().to_numpy()
    empty = np.flatnonzero(folds == "")
    if len(empty):
        faults.add(f"{pack.manifest}: {len(empty)} clips have no fold: {some(pack.names[row] for row in empty)}")
    elif len(set(folds)) < 2:
        faults.add(f"{pack.manifest}: all clips are in one fold, {folds[0]!r}; expected two folds or more")
    return folds


def _read_classes(
    packs: dict[str, Pack], columns: dict[str, Any], options: ProbeOptions, faults: Faults
) -> tuple[dict[str, np.ndarray], list[str]] | None:
    """Return the targets (N,C) of each pack, and the names of the C classes that occur in any of them."""
    try:
        if options.labels_csv is not None:
            classes = read_labels(options.labels_csv)
        else:
            classes = collect_classes([str(cell) for column in columns.values() for cell in column])
    except UserError as error:
        faults.add(str(error))
        return None
    indices = {}
    for part, pack in packs.items():
        try:
            indices[part] = parse_labels(columns[part], classes, pack.names)
        except UserError as error:
            faults.add(f"{pack.manifest}: {error}")
    if len(indices) < len(packs):
        return None
    targets = {part: LabelledPack(pack, indices[part], len(classes)).multi_hot() for part, pack in packs.items()}
    occurs = np.any([table.any(axis=0) for table in targets.values()], axis=0)
    untrained = occurs & ~targets["data" if "data" in targets else "train"].any(axis=0)
    if untrained.any():
        names = [classes[index] for index in np.flatnonzero(untrained)]
        logger.warning("%d classes occur in no training clip: %s", len(names), some(names))
    if occurs.sum() < 2:
        faults.add(f"{some(str(pack.manifest) for pack in packs.values())}: found one class only; expected two or more")
        return None
    labels = [classes[index] for index in np.flatnonzero(occurs)]
    return {part: np.ascontiguousarray(table[:, occurs]) for part, table in targets.items()}, labels


def collect_classes(cells: Iterable[str]) -> list[str]:
    """Return the classes of cells of labels, sorted; names that differ only in details are logged."""
    counts = count_classes(cells)
    if lookalikes := describe_lookalikes(counts):
        logger.warning(lookalikes)
    return sorted(counts, key=make_sort_key)


def make_sort_key(name: str) -> tuple[bool, int, str]:
    """Return a key that sorts numbers by their value, before all other names."""
    is_number = name.isascii() and name.isdigit()
    return (not is_number, int(name) if is_number else 0, name)
