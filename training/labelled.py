"""Labelled packs: opening, class names, held-out clips and overlaps."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio.dataset import Pack
from audio.labels import count_classes, describe_lookalikes, list_classes, parse_labels
from common.errors import Faults, UserError, did_you_mean, some
from common.places import describe_elsewhere
from training.holdout import find_groups, hold_out

logger = logging.getLogger(__name__)

NUMBERED = (
    "%s has numbers as labels: the %d that occur are used as class names; if they are indices into a longer list, set "
    "num_classes or labels_csv (index,mid,display_name)"
)
COMPARED = 8  # clips of the same name in two lists are compared: "1.wav" may be another sound in another folder
PACK_FIRST = "pack the sounds first: `python scripts/wavlist_to_hdf5.py LIST.tsv OUTDIR` writes OUTDIR/labels/LIST.tsv"


@dataclass
class LabelledPack:
    """A pack and the labels of its clips.

    Attributes:
        pack: N clips.
        labels: class indices of each clip.
        num_classes: C.
    """

    pack: Pack
    labels: list[np.ndarray]
    num_classes: int

    def multi_hot(self) -> np.ndarray:
        """Return the labels as (N, C) of 0 and 1."""
        targets = np.zeros((len(self.labels), self.num_classes), np.float32)
        for row, indices in zip(targets, self.labels, strict=True):
            row[indices] = 1.0
        return targets


def open_pack(path: str, faults: Faults, *, labelled: bool = False, verify: bool = False) -> Pack | None:
    """Open a pack, see `Pack.open`; errors are added to `faults`."""
    required = ("filename", "hdf5path", "labels") if labelled else ("filename", "hdf5path")
    if Path(path).is_dir():
        lists = sorted(Path(path).glob("*.tsv")) or sorted(Path(path).glob("labels/*.tsv"))
        found = f", such as {lists[0]}" if lists else f"; {PACK_FIRST}"
        faults.add(f"{path} is a folder; expected a packed list{found}")
        return None
    if not Path(path).is_file():
        beside = [each.name for each in Path(path).parent.glob("*.tsv")]
        near = did_you_mean(Path(path).name, beside) or describe_elsewhere(path)
        faults.add(f"{path} does not exist{near}; {PACK_FIRST}")
        return None
    try:
        return Pack.open(path, required=required, verify=verify)
    except UserError as error:
        faults.add(str(error))
        return None


def open_labelled(path: str, labels: list[str], faults: Faults, *, verify: bool = False) -> LabelledPack | None:
    """Open a pack whose `labels` column has names of `labels`, or indices into it."""
    pack = open_pack(path, faults, labelled=True, verify=verify)
    indices = None if pack is None else read_clip_labels(pack, labels, faults)
    return None if pack is None or indices is None else LabelledPack(pack, indices, len(labels))


def read_clip_labels(pack: Pack, labels: list[str], faults: Faults) -> list[np.ndarray] | None:
    """Return the class indices of each clip of a pack; errors in its `labels` column are added to `faults`."""
    try:
        return parse_labels(pack.table["labels"], labels, pack.names)
    except UserError as error:
        faults.add(f"{pack.manifest}: {error}")
        return None


def list_pack_classes(pack: Pack) -> list[str]:
    """Return the class names in a pack's `labels` column: in alphabetical order, or ascending if all are numbers.

    AudioSet's identifiers (/m/09x0r) are replaced by its display names. Logs a warning for names that are spellings of
    one class.
    """
    names = list_classes(map(str, pack.table["labels"].unique()))
    if all(name.isascii() and name.isdigit() for name in names):
        logger.info(NUMBERED, pack.manifest, len(names))
    elif lookalikes := describe_lookalikes(count_classes(map(str, pack.table["labels"]))):
        logger.warning("%s: %s", pack.manifest, lookalikes)
    return names


def hold_out_clips(
    pack: Pack, fraction: float, labels: list[str], faults: Faults
) -> tuple[np.ndarray, LabelledPack | None]:
    """Return which clips are held out, bool (N,), and the pack of these; None if there are faults."""
    if "labels" not in pack.table:
        faults.add(
            f"valid_fraction needs labels for validation, but {pack.manifest} has no `labels` column; add it, set "
            "valid_data, or set select_on: eval as published"
        )
        return np.zeros(len(pack), bool), None
    indices = read_clip_labels(pack, labels, faults)
    if indices is None:
        return np.zeros(len(pack), bool), None
    column, groups = find_groups(pack)
    group_names = None if column is None else groups.tolist()
    held = hold_out(pack.names, indices, len(labels), fraction, group_names)
    if not held.any():  # every class has only one clip, or one group
        held = hold_out(pack.names, indices, len(labels), fraction, group_names, spare_single_clips=False)
    if column is not None:
        logger.info("%d clips of %d groups (%s) are held out", held.sum(), len(set(groups[held].tolist())), column)
    rows = np.flatnonzero(held)
    return held, LabelledPack(pack.subset(rows), [indices[row] for row in rows], len(labels))


def warn_of_overlap(pack: Pack, other: Pack, path: str) -> None:
    """Log a warning if clips with the same names, and the same samples in those compared, are in both packs."""
    rows = {name: row for row, name in enumerate(pack.names)}
    pairs = [(rows[name], row) for row, name in enumerate(other.names) if name in rows]
    if any(np.array_equal(pack.read(one), other.read(row)) for one, row in pairs[:COMPARED]):
        logger.warning(
            "%d clips are both in %s and in %s, so metrics on the latter are too good: %s",
            len(pairs),
            pack.manifest,
            path,
            some(other.names[row] for _, row in pairs),
        )
