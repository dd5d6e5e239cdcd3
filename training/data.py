"""Opens the data of a configuration: packs, class names and target sources; collects all faults."""

import logging
from dataclasses import dataclass

import numpy as np

from audio.audioset import other_name
from audio.cutting import Chunks
from audio.dataset import Pack
from audio.labels import list_classes
from common.errors import Faults, UserError, some
from distill.clusters import Clusters, compute_balance
from distill.embeddings import EmbeddingStore, StoredEmbeddings
from distill.joined_embeddings import JoinedEmbeddings
from distill.objectives import Needs
from distill.replay import Replay
from distill.sources import LabelTargets, SeededItems, TargetSource
from distill.store import StoreItems
from distill.targets import SoftTargetStore, StoredTargets
from models.labels import labels_for, read_labels
from models.registry import AUDIOSET_CLASSES
from training.config import TrainConfig
from training.labelled import (
    LabelledPack,
    hold_out_clips,
    list_pack_classes,
    open_labelled,
    open_pack,
    read_clip_labels,
    warn_of_overlap,
)

logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The training, validation and evaluation data of a run.

    Attributes:
        pack: the training clips.
        source: their items and targets.
        labels: the class names.
        item_labels: the labels of every item of `source`, if the objective needs them beside the targets.
        items: (M,) the items of `source` to train on: all but those of held-out clips.
        valid: the data that select checkpoints, or None.
        evaluation: the data of the final evaluation, or None.
        selection: how checkpoints are selected, as a sentence.
        balance: sampling weight of each of `items`; None for each once.
        clusters: (M,) the cluster of every item of `source`, if configured.
        chunk_seconds: largest length of an item.
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
    """Open all data of a run.

    Args:
        config: names the files.
        seed: of the run, for the augmentation of targets that are not stored.
        faults: gets all faults.
        needs: requirements of the objective.
        teacher_labels: classes of the online teacher; None if there is none, or it could not be loaded.

    Returns:
        The data; None if there are faults.
    """
    configured = _read_configured_labels(config, faults)
    opened = _open_source(config, needs, configured, teacher_labels, seed, faults)
    is_numbered = config.num_classes and not config.labels_csv  # the names are those of the column, then
    labels = opened[2] if opened else teacher_labels or (None if is_numbered else configured)
    packs: dict[str, LabelledPack | None] = {}
    for path in dict.fromkeys(p for p in (config.valid_data, config.eval_data) if p):
        if labels:
            packs[path] = open_labelled(path, labels, faults, verify=config.verify)
        else:
            open_pack(path, faults, labelled=True)
    item_labels = _open_item_labels(config, needs, *opened, seed, faults) if opened and needs.labels else None
    if opened is None or faults.sentences:
        return None
    pack, source, labels = opened
    for path, labelled in packs.items():
        if labelled is not None:
            warn_of_overlap(pack, labelled.pack, path)
    return _complete(config, pack, source, labels, item_labels, packs, faults)


def _complete(
    config: TrainConfig,
    pack: Pack,
    source: TargetSource,
    labels: list[str],
    item_labels: LabelTargets | None,
    packs: dict[str, LabelledPack | None],
    faults: Faults,
) -> TrainingData | None:
    """Choose the validation data and the sampling weights of the opened clips."""
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
    clusters = weights = None
    if config.clusters:
        with faults.noted():
            names, starts = [pack.names[clip] for clip in source.chunks.clip], source.chunks.start / pack.sample_rate
            clusters = Clusters.read(config.clusters).assign_items(names, starts)
    if config.sampler == "balanced":
        weights = _balance_classes(pack, source, labels, items, faults)
    elif config.sampler == "clusters" and clusters is not None:
        weights = compute_balance(clusters[items])
    if faults.sentences:
        return None
    return TrainingData(
        pack,
        source,
        labels,
        item_labels,
        items,
        valid,
        evaluation,
        _describe_selection(config, on_eval, valid),
        weights,
        clusters,
        source.chunk_seconds if isinstance(source, StoreItems | JoinedEmbeddings) else config.chunk_length,
    )


def _describe_selection(config: TrainConfig, on_eval: bool, valid: LabelledPack | None) -> str:
    if config.select_by:
        extreme = "largest" if config.select_by.startswith("-") else "smallest"
        return f"checkpoints are chosen by the {extreme} {config.select_by.removeprefix('-')} on the training clips"
    if valid is None:
        return "no validation data: the last weights are kept"
    if on_eval:
        return (
            f"checkpoints are chosen on the evaluation data, {config.eval_data}, as CED does: its metrics are "
            "optimistic"
        )
    if config.valid_data:
        return f"checkpoints are chosen on {config.valid_data}"
    return f"checkpoints are chosen on {len(valid.pack)} clips held out of {config.train_data}"


def _read_configured_labels(config: TrainConfig, faults: Faults) -> list[str] | None:
    """Return the class names of the configuration: those of `labels_csv`, or numbers for `num_classes`."""
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


def _open_source(
    config: TrainConfig,
    needs: Needs,
    configured: list[str] | None,
    teacher_labels: list[str] | None,
    seed: int,
    faults: Faults,
) -> tuple[Pack, TargetSource, list[str]] | None:
    """Open the clips, their targets (stored, from labels, or computed while training), and the class names."""
    soft_targets = [config.logitspath] if config.logitspath else []
    paths = {"classes": soft_targets, "embeddings": config.embedding_stores, "none": []}[needs.targets]
    from_labels = needs.targets == "classes" and not (paths or config.teacher)
    labelled = from_labels or (needs.labels and needs.targets != "classes")
    pack = open_pack(config.train_data, faults, labelled=labelled, verify=config.verify)
    replay = None
    stores = _open_stores(config, needs, paths, faults)
    if not paths:
        with faults.noted():
            replay = Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
    if from_labels:
        labels = None if pack is None else _choose_pack_labels(config, configured, pack, faults)
    elif needs.targets == "classes":
        store = stores[0] if stores else None
        labels = _choose_teacher_labels(config, needs, configured, teacher_labels, store, faults)
    elif needs.labels:
        labels = None if pack is None else configured or list_pack_classes(pack)
    else:
        labels = []
    if pack is None or labels is None or len(stores) < len(paths) or not (stores or replay):
        return None
    if replay is not None:
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length)
        if not from_labels:
            return pack, SeededItems(chunks, replay, seed), labels
        indices = _read_class_indices(config, needs, pack, labels, faults)
        if indices is None:
            return None
        if len(labels) < 2:
            faults.add(
                f"{pack.manifest} has the one class {labels[0]!r}; at least two are needed: add clips of another "
                '("other", say)'
            )
            return None
        return pack, LabelTargets(chunks, indices, len(labels), replay, seed), labels
    options = (config.max_aug_epochs, config.check_sounds)
    sources: list[StoredEmbeddings] = []
    for store in stores:
        with faults.noted():
            if isinstance(store, SoftTargetStore):
                return pack, StoredTargets(store, pack, len(labels), config.label_type, *options), labels
            sources.append(StoredEmbeddings(store, pack, *options))
    with faults.noted():
        if len(sources) == len(stores):
            return pack, sources[0] if len(sources) == 1 else JoinedEmbeddings(sources, pack), labels
    return None


def _open_stores(
    config: TrainConfig, needs: Needs, paths: list[str], faults: Faults
) -> list[SoftTargetStore | EmbeddingStore]:
    """Open the stores of a configuration: that of soft targets, or that of the embeddings of each teacher."""
    if paths and (config.wavtransforms or config.spectransforms):
        where = "soft targets of logitspath" if needs.targets == "classes" else "store of embeddingspath"
        faults.add(f"wavtransforms and spectransforms come with the {where}; drop them here")
    stores: list[SoftTargetStore | EmbeddingStore] = []
    for path in paths:
        with faults.noted():
            stores.append(SoftTargetStore(path) if needs.targets == "classes" else EmbeddingStore(path))
    return stores


def _choose_teacher_labels(
    config: TrainConfig,
    needs: Needs,
    configured: list[str] | None,
    teacher_labels: list[str] | None,
    store: SoftTargetStore | EmbeddingStore | None,
    faults: Faults,
) -> list[str] | None:
    """Return the classes of stored soft targets, or of the online teacher; None if there are faults."""
    if config.teacher:
        source, labels, num_classes = f"teacher {config.teacher}", teacher_labels, len(teacher_labels or [])
    elif isinstance(store, SoftTargetStore):
        source, labels, num_classes = f"the teacher of {store.folder}", store.labels, store.num_classes or 0
        if store.meta.get("activation") == "softmax" and needs.activation != "softmax":
            logger.warning(
                "the probabilities of %s sum to one (a softmax), but with loss %s those of the student will not; set "
                "loss: CrossEntropyLoss",
                store.folder,
                config.loss,
            )
    else:
        return None
    if configured and num_classes and len(configured) != num_classes:
        faults.add(
            f"{source} has {num_classes} classes, the configuration {len(configured)}; drop num_classes and labels_csv "
            "to use the teacher's"
        )
        return None
    if config.labels_csv and configured and labels and configured != labels:
        pairs = enumerate(zip(configured, labels, strict=True))
        wrong = next(index for index, (name, teacher_name) in pairs if name != teacher_name)
        faults.add(
            f"class {wrong} is {configured[wrong]!r} in {config.labels_csv}, but {labels[wrong]!r} in {source}; drop "
            "labels_csv to use the teacher's names"
        )
        return None
    if config.teacher:
        return labels
    default = labels_for(num_classes or (len(configured) if configured else AUDIOSET_CLASSES), None)
    return configured if config.labels_csv and configured else labels or default


def _choose_pack_labels(
    config: TrainConfig, configured: list[str] | None, pack: Pack, faults: Faults
) -> list[str] | None:
    """Return the classes of a pack with hard labels; None if their number is not the configured one."""
    labels = configured or list_pack_classes(pack)
    if config.num_classes and config.labels_csv is None:
        found = list_classes(map(str, pack.table["labels"].unique()))
        if not set(found) <= set(labels) and not all(name.isdigit() for name in found):
            labels = found
        if len(labels) != config.num_classes:
            faults.add(
                f"num_classes is {config.num_classes}, but {pack.manifest} has {len(found)} classes: {some(found)}; "
                "drop num_classes to use these, or give all names with labels_csv"
            )
            return None
    return labels


def _read_class_indices(
    config: TrainConfig, needs: Needs, pack: Pack, labels: list[str], faults: Faults
) -> list[np.ndarray] | None:
    """Return the class indices of each clip; None if they are invalid, or several and the loss is for one."""
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


def _open_item_labels(
    config: TrainConfig,
    needs: Needs,
    pack: Pack,
    source: TargetSource,
    labels: list[str],
    seed: int,
    faults: Faults,
) -> LabelTargets | None:
    """Return the labels of every item, for objectives that use both labels and targets."""
    if "labels" not in pack.table:
        without_labels = TrainConfig.model_fields["objective"].default
        faults.add(
            f"objective {config.objective} also learns from labels, but {pack.manifest} has no `labels` column; add "
            f"it, or set objective: {without_labels} to learn from the teacher only"
        )
        return None
    known = {*labels, *(other for label in labels if (other := other_name(label)))}
    unknown = [name for name in list_pack_classes(pack) if name not in known and not name.isdigit()]
    if unknown:
        faults.add(
            f"{pack.manifest} has labels that are not classes of the teacher: {some(sorted(unknown))}; its classes "
            f"are {some(labels)}; give a teacher that was trained on the classes of these clips"
        )
        return None
    indices = _read_class_indices(config, needs, pack, labels, faults)
    return None if indices is None else LabelTargets(source.chunks, indices, len(labels), source.replay, seed)


def _balance_classes(
    pack: Pack, source: TargetSource, labels: list[str], items: np.ndarray, faults: Faults
) -> np.ndarray | None:
    """Return the sampling weight of each of `items`: 1 / (number of clips with the rarest of its classes)."""
    if "labels" not in pack.table:
        faults.add(f"sampler: balanced needs a `labels` column in {pack.manifest}; add it, or drop the sampler")
        return None
    indices = read_clip_labels(pack, labels, faults)
    if indices is None:
        return None
    counts = np.bincount(np.concatenate(indices), minlength=len(labels))
    of_clip = np.array([(1.0 / counts[i]).max() for i in indices])
    return of_clip[source.chunks.clip[items]]
