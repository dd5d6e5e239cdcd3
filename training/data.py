"""From the paths of a configuration to data: packs, label lists and target sources, with every fault noted."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio.dataset import Pack, chunk_bounds
from audio.manifest import parse_labels
from common.errors import Faults, UserError, some
from distill.clusters import Clusters, balance
from distill.embeddings import EmbeddingStore, StoredEmbeddings
from distill.replay import Replay
from distill.sources import LabelTargets, SeededItems, TargetSource
from distill.store import MatchedItems
from distill.targets import SoftTargetStore, StoredTargets
from models.labels import labels_for, read_labels
from models.registry import AUDIOSET_CLASSES
from training.config import TrainConfig
from training.holdout import find_groups, hold_out

logger = logging.getLogger(__name__)

NUMBERED = (
    "%s labels its clips with numbers: the %d that occur are taken for the names of the classes; if they are indices "
    "into a longer list, give num_classes or labels_csv (index,mid,display_name)"
)
COMPARED = 8  # clips of the same name in two lists: "1.wav" may be another sound in another folder
PACK_FIRST = "pack the sounds first: `python scripts/wavlist_to_hdf5.py LIST.tsv OUTDIR` writes OUTDIR/labels/LIST.tsv"


@dataclass
class LabelledPack:
    """A pack and what each of its clips is labelled with.

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


@dataclass
class TrainingData:
    """All that a run learns and is judged from.

    Attributes:
        pack: the training clips.
        source: their items and targets.
        labels: the class names.
        item_labels: the labels of every item of `source`, where the objective needs them beside the targets.
        items: (M,) the items of `source` to learn from: all but those of held-out clips.
        valid: chooses checkpoints, or None.
        evaluation: is reported at the end, or None.
        selection: what chooses checkpoints, as a sentence.
        balance: how often to draw each of `items`, for a `sampler`; None for each once.
        clusters: (M,) the cluster of every item of `source`, where they are named.
        chunk_seconds: what the items are at most.
    """

    pack: Pack
    source: TargetSource
    labels: list[str]
    item_labels: LabelTargets | None
    items: np.ndarray
    valid: LabelledPack | None
    evaluation: LabelledPack | None
    selection: str
    balance: np.ndarray | None
    clusters: np.ndarray | None = None
    chunk_seconds: float = 10.0


def open_pack(path: str, faults: Faults, *, labelled: bool = False) -> Pack | None:
    """Open a pack; what is wrong with it is noted in `faults`."""
    required = ("filename", "hdf5path", "labels") if labelled else ("filename", "hdf5path")
    if not Path(path).is_file():
        faults.add(f"{path} does not exist; {PACK_FIRST}")
        return None
    try:
        return Pack.open(path, required=required)
    except UserError as error:
        faults.add(str(error))
        return None


def open_labelled(path: str, labels: list[str], faults: Faults) -> LabelledPack | None:
    """Open a pack with a `labels` column of indices into `labels`, or of names in it."""
    pack = open_pack(path, faults, labelled=True)
    indices = None if pack is None else _clip_labels(pack, labels, faults)
    return None if pack is None or indices is None else LabelledPack(pack, indices, len(labels))


def _clip_labels(pack: Pack, labels: list[str], faults: Faults) -> list[np.ndarray] | None:
    """Return the class indices of each clip of a pack; what is wrong with its `labels` column is noted in `faults`."""
    try:
        return parse_labels(pack.table["labels"], labels, pack.names)
    except UserError as error:
        faults.add(f"{pack.manifest}: {error}")
        return None


def open_training(
    config: TrainConfig,
    seed: int,
    faults: Faults,
    *,
    taught: list[str] | None = None,
    needs_labels: bool = False,
    embeds: bool = False,
) -> TrainingData | None:
    """Open everything a run needs.

    Args:
        config: names the files.
        seed: of the run, for augmentation seeds that no store brings.
        faults: gets every fault found; where there is none, data is returned.
        taught: the labels of `config.teacher`; None where there is none, or it could not be loaded.
        needs_labels: labels are wanted beside the targets.
        embeds: the targets are embeddings, which have no classes.
    """
    named = _named_labels(config, faults)
    if embeds:
        opened = _embedded_source(config, named, seed, faults, needs_labels)
    elif config.logitspath:
        opened = _stored_source(config, named, faults)
    elif config.teacher:
        opened = _taught_source(config, named, taught, seed, faults)
    else:
        opened = _label_source(config, named, seed, faults)
    labels = opened[2] if opened else taught or named
    packs: dict[str, LabelledPack | None] = {}
    for path in dict.fromkeys(p for p in (config.valid_data, config.eval_data) if p):
        if labels is not None:
            packs[path] = open_labelled(path, labels, faults)
        else:
            open_pack(path, faults, labelled=True)
    item_labels = _item_labels(config, *opened, seed, faults) if opened and needs_labels else None
    if opened is None or faults.sentences:
        return None
    pack, source, labels = opened
    for path, judge in packs.items():
        if judge is not None:
            _warn_of_overlap(pack, judge.pack, path)
    evaluation = packs[config.eval_data] if config.eval_data else None
    items, valid = np.arange(len(source.bounds)), None
    on_eval = config.select_on == "eval" or not (config.valid_data or config.valid_fraction)
    if on_eval:
        valid = evaluation
    elif config.valid_data:
        valid = packs[config.valid_data]
    elif config.valid_fraction:
        held, valid = _held_out(pack, config.valid_fraction, labels, faults)
        if valid is None:
            return None
        items = np.flatnonzero(~held[source.bounds[:, 0]])
    clusters = _clusters(config.clusters, pack, source, faults) if config.clusters else None
    drawn = None
    if config.sampler == "balanced":
        of_items = _balance(pack, source, labels, faults)
        drawn = None if of_items is None else of_items[items]
    elif config.sampler == "clusters" and clusters is not None:
        drawn = balance(clusters[items])
    if faults.sentences:
        return None
    selection = _selection(config, on_eval, valid)
    seconds = source.chunk_seconds if isinstance(source, MatchedItems) else config.chunk_length
    return TrainingData(
        pack, source, labels, item_labels, items, valid, evaluation, selection, drawn, clusters, seconds
    )


def _warn_of_overlap(pack: Pack, other: Pack, path: str) -> None:
    """Say so where clips are learnt from and judged by: of the same name, and of the same samples in those compared."""
    rows = {name: row for row, name in enumerate(pack.names)}
    pairs = [(rows[name], row) for row, name in enumerate(other.names) if name in rows]
    if any(np.array_equal(pack.read(own), other.read(row)) for own, row in pairs[:COMPARED]):
        logger.warning(
            "%d clips are in %s and in %s, whose figures are then too good: %s",
            len(pairs),
            pack.manifest,
            path,
            some(other.names[row] for _, row in pairs),
        )


def _held_out(pack: Pack, fraction: float, labels: list[str], faults: Faults) -> tuple[np.ndarray, LabelledPack | None]:
    """Return which clips are held out, bool (N,), and the pack of these; None where something is wrong."""
    if "labels" not in pack.table:
        faults.add(
            f"valid_fraction holds out clips to be judged by, but {pack.manifest} has no `labels` column; add it, give "
            "valid_data, or set select_on: eval as published"
        )
        return np.zeros(len(pack), bool), None
    indices = _clip_labels(pack, labels, faults)
    if indices is None:
        return np.zeros(len(pack), bool), None
    column, groups = find_groups(pack)
    kept_together = None if column is None else groups.tolist()
    held = hold_out(pack.names, indices, len(labels), fraction, kept_together)
    if not held.any():  # every class has one clip, or one group, alone
        held = hold_out(pack.names, indices, len(labels), fraction, kept_together, spare_single_clips=False)
    if column is not None:
        logger.info("%d clips of %d groups (%s) are held out", held.sum(), len(set(groups[held].tolist())), column)
    rows = np.flatnonzero(held)
    return held, LabelledPack(pack.subset(rows), [indices[row] for row in rows], len(labels))


def _selection(config: TrainConfig, on_eval: bool, valid: LabelledPack | None) -> str:
    if valid is None:
        return "nothing chooses a checkpoint: the last one is kept"
    if on_eval:
        return (
            f"checkpoints are chosen on the evaluation data, {config.eval_data}, as CED does: its figures are "
            "optimistic"
        )
    if config.valid_data:
        return f"checkpoints are chosen on {config.valid_data}"
    return f"checkpoints are chosen on {len(valid.pack)} clips held out of {config.train_data}"


def _named_labels(config: TrainConfig, faults: Faults) -> list[str] | None:
    """Return the class names that the configuration gives: of `labels_csv`, or plain ones for `num_classes`."""
    if config.labels_csv is None:
        return labels_for(config.num_classes, None) if config.num_classes else None
    try:
        labels = read_labels(config.labels_csv)
    except UserError as error:
        faults.add(str(error))
        return None
    if config.num_classes not in (None, len(labels)):
        faults.add(
            f"num_classes is {config.num_classes}, but {config.labels_csv} lists {len(labels)}; drop one of them"
        )
    return labels


Opened = tuple[Pack, TargetSource, list[str]]


def _stored_source(config: TrainConfig, named: list[str] | None, faults: Faults) -> Opened | None:
    pack = open_pack(config.train_data, faults)
    try:
        store = SoftTargetStore(config.logitspath or "")
    except UserError as error:
        faults.add(str(error))
        return None
    said = store.num_classes
    difference = _differ_from_taught(config, named, store.labels, said, f"the teacher of {store.folder}")
    if difference:
        faults.add(difference)
        return None
    if config.wavtransforms or config.spectransforms:
        faults.add("wavtransforms and spectransforms come with the soft targets of logitspath; drop them here")
    if store.meta.get("activation") == "softmax" and config.loss != "CrossEntropyLoss":
        logger.warning(
            "the probabilities of %s sum to one (a softmax), but loss %s learns each class on its own: the student's "
            "will not; set loss: CrossEntropyLoss",
            store.folder,
            config.loss,
        )
    num_classes = said or (len(named) if named else AUDIOSET_CLASSES)
    labels = named if config.labels_csv and named else store.labels or labels_for(num_classes, None)
    if pack is None:
        return None
    try:
        source = StoredTargets(store, pack, num_classes, config.label_type, config.max_aug_epochs)
    except UserError as error:
        faults.add(str(error))
        return None
    return pack, source, labels


def _differ_from_taught(
    config: TrainConfig, named: list[str] | None, taught: list[str] | None, n_taught: int | None, who: str
) -> str | None:
    """Return where the classes that a configuration names part from those of its teacher; None where they do not."""
    if named and n_taught and len(named) != n_taught:
        return (
            f"{who} knows {n_taught} classes, the configuration says {len(named)}; drop num_classes and labels_csv to "
            "take the teacher's"
        )
    if config.labels_csv and named and taught and named != taught:
        wrong = next(index for index, pair in enumerate(zip(named, taught, strict=True)) if pair[0] != pair[1])
        return (
            f"{config.labels_csv} calls class {wrong} {named[wrong]!r}, {who} calls it {taught[wrong]!r}; drop "
            "labels_csv to take the teacher's names"
        )
    return None


def _taught_source(
    config: TrainConfig, named: list[str] | None, taught: list[str] | None, seed: int, faults: Faults
) -> Opened | None:
    pack, replay = open_pack(config.train_data, faults), _own_replay(config, faults)
    if taught is None or pack is None or replay is None:
        return None
    difference = _differ_from_taught(config, named, taught, len(taught), f"teacher {config.teacher}")
    if difference:
        faults.add(difference)
        return None
    bounds = chunk_bounds(pack.n_samples, pack.sample_rate, config.chunk_length)
    return pack, SeededItems(bounds, pack.sample_rate, replay, seed), taught


def _embedded_source(
    config: TrainConfig, named: list[str] | None, seed: int, faults: Faults, needs_labels: bool
) -> Opened | None:
    """Open clips whose targets are embeddings, stored or asked for; classes are there only where labels are learnt."""
    pack = open_pack(config.train_data, faults, labelled=needs_labels)
    store = replay = None
    if config.embeddingspath:
        with faults.noted():
            store = EmbeddingStore(config.embeddingspath)
        if config.wavtransforms or config.spectransforms:
            faults.add("wavtransforms and spectransforms come with the store of embeddingspath; drop them here")
    else:
        replay = _own_replay(config, faults)
    if pack is None:
        return None
    labels = (named or vocabulary(pack)) if needs_labels else []
    if store is not None:
        with faults.noted():
            return pack, StoredEmbeddings(store, pack, config.max_aug_epochs), labels
    elif replay is not None:
        bounds = chunk_bounds(pack.n_samples, pack.sample_rate, config.chunk_length)
        return pack, SeededItems(bounds, pack.sample_rate, replay, seed), labels
    return None


def _clusters(path: str, pack: Pack, source: TargetSource, faults: Faults) -> np.ndarray | None:
    """Return the cluster of each item, int64 (M,)."""
    clips, starts = source.bounds[:, 0], source.bounds[:, 1] / pack.sample_rate
    with faults.noted():
        return Clusters.read(path).of_items([pack.names[clip] for clip in clips], starts)
    return None


def _own_replay(config: TrainConfig, faults: Faults) -> Replay | None:
    try:
        return Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
    except UserError as error:
        faults.add(str(error))
        return None


def _label_source(config: TrainConfig, named: list[str] | None, seed: int, faults: Faults) -> Opened | None:
    pack, replay = open_pack(config.train_data, faults, labelled=True), _own_replay(config, faults)
    if pack is None or replay is None:
        return None
    labels = named or vocabulary(pack)
    indices = _clip_labels(pack, labels, faults)
    if indices is None or not _suits_loss(config, pack, indices, faults):
        return None
    if len(labels) < 2:
        faults.add(
            f"{pack.manifest} labels every clip {labels[0]!r}: with one class nothing can be told apart; add "
            'clips of another ("other", say)'
        )
        return None
    bounds = chunk_bounds(pack.n_samples, pack.sample_rate, config.chunk_length)
    return pack, LabelTargets(bounds, indices, len(labels), pack.sample_rate, replay, seed), labels


def vocabulary(pack: Pack) -> list[str]:
    """Return the class names in a pack's `labels` column: in alphabetical order, or by size where all are numbers."""
    names = {token.strip() for cell in pack.table["labels"].unique() for token in str(cell).split(";")} - {""}
    if not all(name.isascii() and name.isdigit() for name in names):
        return sorted(names)
    logger.info(NUMBERED, pack.manifest, len(names))
    return sorted(names, key=lambda name: (int(name), name))


def _suits_loss(config: TrainConfig, pack: Pack, indices: list[np.ndarray], faults: Faults) -> bool:
    """Note where a loss for exactly one class a clip meets clips with several; return whether there are none."""
    several = [row for row, classes in enumerate(indices) if len(classes) > 1]
    if config.loss != "CrossEntropyLoss" or not several:
        return True
    rows = some(f"row {row + 1} ({pack.names[row]}: {pack.table['labels'][row]})" for row in several)
    faults.add(
        f"loss CrossEntropyLoss is for exactly one label a clip, but {len(several)} of the {len(indices)} clips of "
        f"{pack.manifest} have several: {rows}. Set loss: BCEWithLogitsLoss, or give each clip one label"
    )
    return False


def _item_labels(
    config: TrainConfig, pack: Pack, source: TargetSource, labels: list[str], seed: int, faults: Faults
) -> LabelTargets | None:
    if "labels" not in pack.table:
        faults.add(
            f"objective {config.objective} learns from labels as well, but {pack.manifest} has no `labels` column; add "
            "it, or set objective: target to learn from the teacher alone"
        )
        return None
    unknown = [name for name in vocabulary(pack) if name not in set(labels) and not name.isdigit()]
    if unknown:
        faults.add(
            f"{pack.manifest} labels clips {some(sorted(unknown))}, which the teacher does not know: its classes are "
            f"{some(labels)}; give a teacher that was trained on the classes of these clips"
        )
        return None
    indices = _clip_labels(pack, labels, faults)
    if indices is None or not _suits_loss(config, pack, indices, faults):
        return None
    return LabelTargets(source.bounds, indices, len(labels), pack.sample_rate, source.replay, seed)


def _balance(pack: Pack, source: TargetSource, labels: list[str], faults: Faults) -> np.ndarray | None:
    """Weigh each item by the rarest of its classes: 1 / (number of clips with that class)."""
    if "labels" not in pack.table:
        faults.add(f"sampler: balanced needs a `labels` column in {pack.manifest}; add it, or drop the sampler")
        return None
    indices = _clip_labels(pack, labels, faults)
    if indices is None:
        return None
    counts = np.bincount(np.concatenate(indices), minlength=len(labels))
    of_clip = np.array([(1.0 / counts[i]).max() for i in indices])
    return of_clip[source.bounds[:, 0]]
