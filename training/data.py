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
from distill.objectives import Needs
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
    config: TrainConfig, seed: int, faults: Faults, needs: Needs, teacher_labels: list[str] | None = None
) -> TrainingData | None:
    """Open everything a run needs.

    Args:
        config: names the files.
        seed: of the run, for augmentation seeds that no store brings.
        faults: gets every fault found; where there is none, data is returned.
        needs: of the run's objective.
        teacher_labels: those of `config.teacher`; None where there is none, or it could not be loaded.
    """
    named = _named_labels(config, faults)
    opened = _open_source(config, needs, named, teacher_labels, seed, faults)
    of_column = config.num_classes and not config.labels_csv  # by its names, where these are no numbers
    labels = opened[2] if opened else teacher_labels or (None if of_column else named)
    packs: dict[str, LabelledPack | None] = {}
    for path in dict.fromkeys(p for p in (config.valid_data, config.eval_data) if p):
        if labels:
            packs[path] = open_labelled(path, labels, faults)
        else:
            open_pack(path, faults, labelled=True)
    item_labels = _item_labels(config, needs, *opened, seed, faults) if opened and needs.labels else None
    if opened is None or faults.sentences:
        return None
    pack, source, labels = opened
    for path, labelled in packs.items():
        if labelled is not None:
            warn_of_overlap(pack, labelled.pack, path)
    evaluation = packs[config.eval_data] if config.eval_data else None
    items, valid = np.arange(len(source.chunks)), None
    on_eval = config.select_on == "eval" or not (config.valid_data or config.valid_fraction or config.select_by)
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
    if config.select_by:
        return f"checkpoints are chosen by {config.select_by} on the training clips"
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


def _open_source(
    config: TrainConfig,
    needs: Needs,
    named: list[str] | None,
    teacher_labels: list[str] | None,
    seed: int,
    faults: Faults,
) -> Opened | None:
    """Open the clips, the names of their classes, and their targets: stored, from labels, or none of their own."""
    path = {"classes": config.logitspath, "embeddings": config.embeddingspath, "none": None}[needs.targets]
    from_labels = needs.targets == "classes" and not (path or config.teacher)
    labelled = from_labels or (needs.labels and needs.targets != "classes")
    pack = open_pack(config.train_data, faults, labelled=labelled)
    store, replay = _open_store(config, needs, path, faults), None if path else _own_replay(config, faults)
    if from_labels:
        labels = None if pack is None else _column_labels(config, named, pack, faults)
    elif needs.targets == "classes":
        labels = _teacher_labels(config, needs, named, teacher_labels, store, faults)
    elif needs.labels:
        labels = None if pack is None else named or vocabulary(pack)
    else:
        labels = []
    if pack is None or labels is None or (store is None and replay is None):
        return None
    if replay is not None:
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length)
        if not from_labels:
            return pack, SeededItems(chunks, replay, seed), labels
        indices = _class_indices(config, needs, pack, labels, faults)
        if indices is None:
            return None
        if len(labels) < 2:
            faults.add(
                f"{pack.manifest} labels every clip {labels[0]!r}: with one class nothing can be told apart; add "
                'clips of another ("other", say)'
            )
            return None
        return pack, LabelTargets(chunks, indices, len(labels), replay, seed), labels
    rest = (config.max_aug_epochs, config.check_sounds)
    with faults.noted():
        if isinstance(store, SoftTargetStore):
            return pack, StoredTargets(store, pack, len(labels), config.label_type, *rest), labels
        assert isinstance(store, EmbeddingStore)
        return pack, StoredEmbeddings(store, pack, *rest), labels
    return None


def _open_store(
    config: TrainConfig, needs: Needs, path: str | None, faults: Faults
) -> SoftTargetStore | EmbeddingStore | None:
    if path is None:
        return None
    if config.wavtransforms or config.spectransforms:
        where = "soft targets of logitspath" if needs.targets == "classes" else "store of embeddingspath"
        faults.add(f"wavtransforms and spectransforms come with the {where}; drop them here")
    with faults.noted():
        return SoftTargetStore(path) if needs.targets == "classes" else EmbeddingStore(path)
    return None


def _teacher_labels(
    config: TrainConfig,
    needs: Needs,
    named: list[str] | None,
    of_model: list[str] | None,
    store: SoftTargetStore | EmbeddingStore | None,
    faults: Faults,
) -> list[str] | None:
    """Return the classes of stored soft targets, or of the online teacher; None where there are faults."""
    if config.teacher:
        who, labels, num_classes = f"teacher {config.teacher}", of_model, len(of_model or [])
    elif isinstance(store, SoftTargetStore):
        who, labels, num_classes = f"the teacher of {store.folder}", store.labels, store.num_classes or 0
        if store.meta.get("activation") == "softmax" and needs.activation != "softmax":
            logger.warning(
                "the probabilities of %s sum to one (a softmax), but loss %s learns each class on its own: the "
                "student's will not; set loss: CrossEntropyLoss",
                store.folder,
                config.loss,
            )
    else:
        return None
    if named and num_classes and len(named) != num_classes:
        faults.add(
            f"{who} knows {num_classes} classes, the configuration says {len(named)}; drop num_classes and labels_csv "
            "to take the teacher's"
        )
        return None
    if config.labels_csv and named and labels and named != labels:
        wrong = next(index for index, pair in enumerate(zip(named, labels, strict=True)) if pair[0] != pair[1])
        faults.add(
            f"{config.labels_csv} calls class {wrong} {named[wrong]!r}, {who} calls it {labels[wrong]!r}; drop "
            "labels_csv to take the teacher's names"
        )
        return None
    if config.teacher:
        return labels
    plain = labels_for(num_classes or (len(named) if named else AUDIOSET_CLASSES), None)
    return named if config.labels_csv and named else labels or plain


def _column_labels(config: TrainConfig, named: list[str] | None, pack: Pack, faults: Faults) -> list[str] | None:
    """Return the classes of a pack that is learnt from its own labels; None where they are not as many as wanted."""
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
    return labels


def _own_replay(config: TrainConfig, faults: Faults) -> Replay | None:
    with faults.noted():
        return Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
    return None


def _clusters(path: str, pack: Pack, source: TargetSource, faults: Faults) -> np.ndarray | None:
    """Return the cluster of each item, int64 (M,)."""
    clips, starts = source.chunks.clip, source.chunks.start / pack.sample_rate
    with faults.noted():
        return Clusters.read(path).assign_items([pack.names[clip] for clip in clips], starts)
    return None


def _class_indices(
    config: TrainConfig, needs: Needs, pack: Pack, labels: list[str], faults: Faults
) -> list[np.ndarray] | None:
    """Return the class indices of each clip; None where they are wrong, or several and the loss is for one."""
    indices = read_clip_labels(pack, labels, faults)
    if indices is None or needs.activation != "softmax":
        return indices
    several = [row for row, classes in enumerate(indices) if len(classes) > 1]
    if not several:
        return indices
    rows = some(f"row {row + 1} ({pack.names[row]}: {pack.table['labels'][row]})" for row in several)
    faults.add(
        f"loss {config.loss} is for exactly one label a clip, but {len(several)} of the {len(indices)} clips of "
        f"{pack.manifest} have several: {rows}. Set loss: BCEWithLogitsLoss, or give each clip one label"
    )
    return None


def _item_labels(
    config: TrainConfig,
    needs: Needs,
    pack: Pack,
    source: TargetSource,
    labels: list[str],
    seed: int,
    faults: Faults,
) -> LabelTargets | None:
    """Return the labels of every item, beside its target."""
    if "labels" not in pack.table:
        alone = TrainConfig.model_fields["objective"].default
        faults.add(
            f"objective {config.objective} learns from labels as well, but {pack.manifest} has no `labels` column; add "
            f"it, or set objective: {alone} to learn from the teacher alone"
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
    indices = _class_indices(config, needs, pack, labels, faults)
    return None if indices is None else LabelTargets(source.chunks, indices, len(labels), source.replay, seed)


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
