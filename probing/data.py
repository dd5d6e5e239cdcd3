"""The clips of a probe: packs, their classes and their folds, with every fault noted.

Letters: N clips, C classes.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio.dataset import Pack
from audio.labels import count_classes, describe_lookalikes, list_classes, parse_labels
from common.errors import Faults, UserError, did_you_mean, some
from models import read_labels
from probing.options import ProbeOptions
from training.labelled import LabelledPack, open_pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSet:
    """Labelled clips, before their embeddings are known.

    Attributes:
        packs: what they are for ("data", or "train", "valid" and "test") → pack.
        targets: likewise, float32 (N,C) of 0 and 1.
        labels: the C class names.
        folds: of each clip of `packs["data"]`; None without folds.
    """

    packs: dict[str, Pack]
    targets: dict[str, np.ndarray]
    labels: list[str]
    folds: np.ndarray | None

    @property
    def single(self) -> bool:
        """Whether every clip has exactly one label."""
        return all(bool((targets.sum(axis=1) == 1).all()) for targets in self.targets.values())


def open_clips(options: ProbeOptions, faults: Faults) -> ProbeSet | None:
    """Open the packs that a probe names, with their labels and folds; what is wrong with them is noted."""
    column = options.label_column
    packs: dict[str, Pack] = {}
    columns = {}
    for part, path in options.packs().items():
        pack = open_pack(path, faults)
        if pack is None:
            continue
        packs[part] = pack
        if column in pack.table:
            columns[part] = pack.table[column]
            continue
        names = [str(name) for name in pack.table.columns]
        faults.add(
            f"{path} has no column {column!r}{did_you_mean(column, names)}, which holds the classes of each clip; its "
            f"columns are {some(names, 20)}: add it, or name another one with --label_column"
        )
    folds = _folds(packs["data"], options, faults) if "data" in packs else None
    if len(columns) < len(options.packs()) or not columns:
        return None
    read = _read_classes(packs, columns, options, faults)
    if read is None or (folds is None and "data" in packs):
        return None
    for part in {"valid", "test"} & set(packs):
        twice = set(packs[part].names) & set(packs["train"].names)
        if twice:
            logger.warning("%d clips are in train_data and in %s_data: %s", len(twice), part, some(sorted(twice)))
    return ProbeSet(packs, read[0], read[1], folds)


def _folds(pack: Pack, options: ProbeOptions, faults: Faults) -> np.ndarray | None:
    names = [str(name) for name in pack.table.columns]
    if options.fold_column not in names:
        faults.add(
            f"{pack.manifest} has no column {options.fold_column!r}{did_you_mean(options.fold_column, names)}, which "
            f"says in which fold a clip is tested; its columns are {some(names, 20)}: name one with --fold_column, or "
            "give --train_data and --test_data"
        )
        return None
    folds = pack.table[options.fold_column].astype(str).str.strip().to_numpy()
    empty = np.flatnonzero(folds == "")
    if len(empty):
        faults.add(f"{pack.manifest}: {len(empty)} clips are in no fold: {some(pack.names[row] for row in empty)}")
    elif len(set(folds)) < 2:
        faults.add(f"{pack.manifest}: all clips are in one fold, {folds[0]!r}; wanted two folds or more")
    return folds


def _read_classes(
    packs: dict[str, Pack], columns: dict[str, Any], options: ProbeOptions, faults: Faults
) -> tuple[dict[str, np.ndarray], list[str]] | None:
    """Return the targets (N,C) of each pack and the names of the C classes that occur in any of them."""
    try:
        if options.labels_csv is not None:
            classes = read_labels(options.labels_csv)
        else:
            cells = {str(cell) for column in columns.values() for cell in column.unique()}
            classes = sorted(list_classes(cells), key=in_order)
            if lookalikes := describe_lookalikes(count_classes(str(c) for column in columns.values() for c in column)):
                logger.warning(lookalikes)
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
    learned = targets["data" if "data" in targets else "train"].any(axis=0)
    if (occurs & ~learned).any():
        names = [classes[index] for index in np.flatnonzero(occurs & ~learned)]
        logger.warning("%d classes occur in no training clip: %s", len(names), some(names))
    if occurs.sum() < 2:
        faults.add(f"{some(str(pack.manifest) for pack in packs.values())}: found one class alone; wanted two or more")
        return None
    labels = [classes[index] for index in np.flatnonzero(occurs)]
    return {part: np.ascontiguousarray(table[:, occurs]) for part, table in targets.items()}, labels


def in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, before names by their letters."""
    is_number = name.isascii() and name.isdigit()
    return (not is_number, int(name) if is_number else 0, name)
