"""From the paths of a configuration to data: packs, label lists and target sources, with every fault noted."""

import logging
from dataclasses import dataclass

import numpy as np

from audio.audioset import other_name
from audio.cutting import Chunks
from audio.dataset import Pack
from audio.labels import list_classes
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
from training.labelled import (
    LabelledPack,
    hold_out_clips,
    open_labelled,
    open_pack,
    read_clip_labels,
    vocabulary,
    warn_of_overlap,
)

logger = logging.getLogger(__name__)


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
    of_column = config.num_classes and not config.labels_csv  # by its names, where these are no numbers
    labels = opened[2] if opened else taught or (None if of_column else named)
    packs: dict[str, LabelledPack | None] = {}
    for path in dict.fromkeys(p for p in (config.valid_data, config.eval_data) if p):
        if labels:
            packs[path] = open_labelled(path, labels, faults)
        else:
            open_pack(path, faults, labelled=True)
    item_labels = _item_labels(config, *opened, seed, faults) if opened and needs_labels else None
    if opened is None or faults.sentences:
        return None
    pack, source, labels = opened
    for path, judge in packs.items():
        if judge is not None:
            warn_of_overlap(pack, judge.pack, path)
    evaluation = packs[config.eval_data] if config.eval_data else None
    items, valid = np.arange(len(source.chunks)), None
    on_eval = config.select_on == "eval" or not (config.valid_data or config.valid_fraction)
    if on_eval:
        valid = evaluation
    elif config.valid_data:
        valid = packs[config.valid_data]
    elif config.valid_fraction:
        held, valid = hold_out_clips(pack, config.valid_fraction, labels, faults)
        if valid is None:
            return None
        items = np.flatnonzero(~held[source.chunks.clip])
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
        source = StoredTargets(store, pack, num_classes, config.label_type, config.max_aug_epochs, config.check_sounds)
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
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length)
    return pack, SeededItems(chunks, replay, seed), taught


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
            return pack, StoredEmbeddings(store, pack, config.max_aug_epochs, config.check_sounds), labels
    elif replay is not None:
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length)
        return pack, SeededItems(chunks, replay, seed), labels
    return None


def _clusters(path: str, pack: Pack, source: TargetSource, faults: Faults) -> np.ndarray | None:
    """Return the cluster of each item, int64 (M,)."""
    clips, starts = source.chunks.clip, source.chunks.start / pack.sample_rate
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
    if config.num_classes and config.labels_csv is None:
        found = list_classes(map(str, pack.table["labels"].unique()))
        if not set(found) <= set(labels) and not all(name.isdigit() for name in found):
            labels = found
        if len(labels) != config.num_classes:
            faults.add(
                f"num_classes is {config.num_classes}, but {pack.manifest} has {len(found)} classes: {some(found)}; "
                "drop num_classes to take these, or give all names with labels_csv"
            )
            return None
    indices = read_clip_labels(pack, labels, faults)
    if indices is None or not _suits_loss(config, pack, indices, faults):
        return None
    if len(labels) < 2:
        faults.add(
            f"{pack.manifest} labels every clip {labels[0]!r}: with one class nothing can be told apart; add "
            'clips of another ("other", say)'
        )
        return None
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length)
    return pack, LabelTargets(chunks, indices, len(labels), replay, seed), labels


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
    known = {*labels, *(other for label in labels if (other := other_name(label)))}
    unknown = [name for name in vocabulary(pack) if name not in known and not name.isdigit()]
    if unknown:
        faults.add(
            f"{pack.manifest} labels clips {some(sorted(unknown))}, which the teacher does not know: its classes are "
            f"{some(labels)}; give a teacher that was trained on the classes of these clips"
        )
        return None
    indices = read_clip_labels(pack, labels, faults)
    if indices is None or not _suits_loss(config, pack, indices, faults):
        return None
    return LabelTargets(source.chunks, indices, len(labels), source.replay, seed)


def _balance(pack: Pack, source: TargetSource, labels: list[str], faults: Faults) -> np.ndarray | None:
    """Weigh each item by the rarest of its classes: 1 / (number of clips with that class)."""
    if "labels" not in pack.table:
        faults.add(f"sampler: balanced needs a `labels` column in {pack.manifest}; add it, or drop the sampler")
        return None
    indices = read_clip_labels(pack, labels, faults)
    if indices is None:
        return None
    counts = np.bincount(np.concatenate(indices), minlength=len(labels))
    of_clip = np.array([(1.0 / counts[i]).max() for i in indices])
    return of_clip[source.chunks.clip]
