"""A run in small: a minute on a CPU through everything that a configuration would do, before it is given days.

Data that exist are read by the ordinary path, a little of them; where they do not, sounds made by formula stand in,
packed and taught with the project's own writers, so that the same readers and checks see them.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from audio.dataset import Pack
from audio.io import to_int16
from audio.manifest import read_manifest
from audio.shards import ShardWriter
from common.errors import Faults, UserError
from common.files import whole_file
from distill.clusters import write_clusters
from distill.objectives import Needs
from models import AudioTagger, Ensemble, create_model, get_model_entry, save_checkpoint
from models.base import Activation
from models.labels import audioset_labels, labels_for, read_labels
from training.config import SoftTargetConfig, TrainConfig
from training.data import open_training
from training.embedding import store_embeddings
from training.labelled import open_labelled, open_pack
from training.teacher import load_teacher
from training.teaching import SoftTargets, Teaching

logger = logging.getLogger(__name__)

EPOCHS = EPOCH_LENGTH = 2
BATCH = 4
CLIPS = 16  # of an evaluation pack, and of each made-up one
SECONDS, SAMPLE_RATE = 2.0, 16000  # of made-up sounds
NAMES = [f"sound {index}" for index in range(10)]  # classes where nothing says any
TEACHER = "audiotransformer_pico"
SEED = 0


def smoke(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return a configuration that takes about a minute on a CPU and goes through everything that `config` would.

    The same configuration and data give the same files. Of processes that train together, one calls it.

    Args:
        config: of the long run; what it learns, how and with which model stays.
        folder: gets what stands in for missing data, and shortened evaluation lists.

    Raises:
        UserError: a label table that cannot be read. Other faults of data that exist are left to be told, all at once,
            where the run opens them.
    """
    config = config.model_copy(update=_little(config))
    wanted = (config.train_data, config.logitspath, config.embeddingspath, config.clusters, config.labels_csv)
    named = [path for path in wanted if path]
    missing = [path for path in named if not Path(path).exists()]
    taught = None
    if config.teacher and _has_teacher(config):
        try:
            taught = load_teacher(config.teacher, config.teacher_weights, heads=config.teacher_head).labels
        except UserError:  # told where the run loads it
            return config
    elif config.teacher:
        config, taught = _teacher_stands_in(config, folder, made_up=bool(missing))
    labels = None
    if missing:
        config, labels = _stand_in(config, missing, taught, folder)
    elif any(path and not Path(path).exists() for path in (config.valid_data, config.eval_data)):
        labels = _labels_of(config, taught)
        if labels is None:  # the training data have faults, which matter more
            return config
    judges = dict.fromkeys(path for path in (config.valid_data, config.eval_data) if path)
    short = {
        path: _judge(path, f"judge_{number}", labels, made_up=bool(missing), folder=folder)
        for number, path in enumerate(judges, 1)
    }
    return config.model_copy(
        update={key: short[path] for key in ("valid_data", "eval_data") if (path := getattr(config, key))}
        | {"valid_fraction": _few_held_out(config)}
    )


def _little(config: TrainConfig) -> dict[str, object]:
    """Return the settings that make a run short."""
    pretrained = config.pretrained
    if not (isinstance(pretrained, str) and Path(pretrained).exists()):
        wanted = get_model_entry(config.model).initialisation if pretrained in (None, True) else pretrained
        if wanted:
            logger.info("smoke: random weights in place of %s: nothing is downloaded", wanted)
        pretrained = False
    return {
        "pretrained": pretrained,
        "epochs": EPOCHS,
        "epoch_length": EPOCH_LENGTH,
        "batch_size": min(config.batch_size, BATCH),
        "eval_batch_size": min(config.eval_batch_size or config.batch_size, BATCH),
        "accumulate": min(config.accumulate, 2),
        "num_workers": min(config.num_workers, 1),
        "warmup_iters": min(config.warmup_iters or 0, 1),
        "warmup_epochs": None if config.warmup_epochs is None else min(config.warmup_epochs, 1),
        "max_aug_epochs": min(config.max_aug_epochs or EPOCHS, EPOCHS),
        "valid_every": 1,
        "n_saved": min(config.n_saved, 2),
        "checkpoint_every": None if config.checkpoint_every is None else min(config.checkpoint_every, EPOCH_LENGTH),
        "log_every": 1,
        "device": "cpu",
        "compile": False,
        "baseline": False,  # it would read up to hours of training clips
    }


def _stand_in(
    config: TrainConfig, missing: list[str], taught: list[str] | None, folder: Path
) -> tuple[TrainConfig, list[str]]:
    """Make training data, with soft targets where they are wanted; return the configuration for them, and the labels.

    Made-up sounds replace all of it: targets, sounds and class names belong together. `taught` are the labels of an
    online teacher.
    """
    if config.labels_csv in missing:
        config = config.model_copy(update={"labels_csv": None})
    labels = taught or _said_labels(config) or (audioset_labels() if config.logitspath else NAMES)
    pack = _made_up_pack(folder, "train", labels if labels is NAMES else _numbers(labels))
    store = _made_up_store(folder / "logits", pack, labels) if config.logitspath else None
    embeddings = _made_up_embeddings(folder / "embeddings", pack) if config.embeddingspath else None
    clusters = _made_up_clusters(folder / "clusters_k2.parquet", pack) if config.clusters else None
    what = {config.train_data: f"{CLIPS} made-up sounds", config.logitspath: "an untrained teacher's answers"}
    what |= {config.embeddingspath: "an untrained teacher's embeddings", config.clusters: "two clusters"}
    for path in missing:
        logger.warning("smoke: %s is not there: %s stand in", path, what.get(path, "other class names"))
    said = {config.logitspath, config.embeddingspath, config.clusters}
    for unused in ({config.train_data} | said) - {None, *missing}:
        logger.warning("smoke: %s is there, but is no use without %s", unused, " and ".join(missing))
    update = {"train_data": pack, "logitspath": store, "embeddingspath": embeddings, "clusters": clusters}
    return config.model_copy(update=update), labels


def _said_labels(config: TrainConfig) -> list[str] | None:
    if config.labels_csv and Path(config.labels_csv).exists():
        return read_labels(config.labels_csv)
    return labels_for(config.num_classes, None) if config.num_classes else None


def _has_teacher(config: TrainConfig) -> bool:
    """Whether every member of the online teacher is a file or folder here: nothing is downloaded."""
    files = config.teacher_weights or config.teacher
    return all(Path(path).exists() for path in ([files] if isinstance(files, str) else files or []))


def _teacher_stands_in(config: TrainConfig, folder: Path, *, made_up: bool) -> tuple[TrainConfig, list[str]]:
    """Write a small, untrained teacher; return the configuration that asks it, and its labels.

    Args:
        config: names a teacher that is not there.
        folder: to write into.
        made_up: whether the training data will be, so that they say no class names.
    """
    none = {"teacher": None, "teacher_weights": None, "teacher_head": None}
    untaught = config.model_copy(update={**none, "objective": "target"})
    labels = _said_labels(config) or (NAMES if made_up else _labels_of(untaught, None) or audioset_labels())
    path = folder / "teacher.pt"
    save_checkpoint(path, _untrained(labels, "softmax" if config.loss == "CrossEntropyLoss" else "sigmoid"))
    logger.warning("smoke: teacher %s is not there: a small, untrained one stands in", config.teacher)
    return config.model_copy(update={**none, "teacher": str(path)}), labels


def _untrained(labels: list[str], activation: Activation) -> AudioTagger:
    """Return a small teacher that knows nothing; the student's own random start stays what it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return create_model(TEACHER, num_classes=len(labels), labels=labels, activation=activation, depth=1)


def _made_up_pack(folder: Path, name: str, cells: Sequence[str]) -> str:
    """Pack noisy tones, one pitch a class; return the manifest.

    Args:
        folder: to write into, `hdf5/NAME.h5` and `labels/NAME.tsv` as every pack.
        name: of the pack; other names, other sounds.
        cells: what stands in the column `labels`, one of them for each clip in turn.
    """
    random = np.random.default_rng([SEED, *name.encode()])
    time = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    shard, rows = folder / "hdf5" / f"{name}.h5", []
    with ShardWriter(shard, SAMPLE_RATE) as writer:
        for index in range(CLIPS):
            kind = index % len(cells)
            pitch = 150 * 1.25**kind * random.uniform(0.97, 1.03)
            sound = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.05 * random.standard_normal(len(time))
            rows.append((f"{name}/{index:02d}.wav", cells[kind], str(shard)))
            writer.append(rows[-1][0], to_int16(sound))
    return _write_manifest(folder, name, pd.DataFrame(rows, columns=["filename", "labels", "hdf5path"]))


def _made_up_store(folder: Path, manifest: str, labels: list[str]) -> str:
    """Store what a small, untrained teacher answers to every clip; return the folder."""
    settings = {"epochs": EPOCHS, "topk": 5, "num_workers": 0, "device": "cpu"}
    config = SoftTargetConfig.model_validate({"train_data": manifest, "model": TEACHER, **settings})
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps over other classes
    teacher = Ensemble([_untrained(labels, "sigmoid")])
    with torch.random.fork_rng(devices=[]):  # a loader draws from it
        return str(Teaching(config, Pack.open(manifest), SoftTargets(teacher, config.topk), folder).save())


def _made_up_embeddings(folder: Path, manifest: str) -> str:
    """Store what a small, untrained teacher makes of every clip; return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        store = store_embeddings(_untrained([], "sigmoid"), Pack.open(manifest), folder, num_workers=0, device="cpu")
    return str(store.folder)


def _made_up_clusters(path: Path, manifest: str) -> str:
    """Write which half of the clips each one is in; return the path."""
    names = Pack.open(manifest).names
    rows = pd.DataFrame({"filename": names, "start": 0.0, "end": SECONDS})
    write_clusters(path, rows, np.arange(len(names)) * 2 // len(names), {"k": 2})
    return str(path)


def _labels_of(config: TrainConfig, taught: list[str] | None) -> list[str] | None:
    """Return the class names of training data that exist, `taught` by a teacher; None where they cannot be opened."""
    alone = {"valid_data": None, "eval_data": None, "valid_fraction": None, "select_on": None}
    config = config.model_copy(update=alone)
    data = open_training(config, SEED, Faults("the training data"), Needs("classes"), taught)
    return data.labels if data else None


def _judge(path: str, name: str, labels: list[str] | None, *, made_up: bool, folder: Path) -> str:
    """Return the manifest of a few labelled clips: of `path`, or made-up ones.

    Args:
        path: of the evaluation or validation pack.
        name: of what is written for it.
        labels: the class names; wanted where clips have to be made up.
        made_up: whether the training data, and so perhaps the class names, are.
        folder: to write into.
    """
    faults = Faults(path)
    if Path(path).exists():
        if not made_up:
            pack = open_pack(path, faults, labelled=True)
            return path if pack is None else _cut(pack, folder, name)  # faults are told where the run opens it
        data = open_labelled(path, labels or [], faults)
        if data is not None:
            return _cut(data.pack, folder, name)
        why = f"does not go with made-up training data ({faults.sentences[0]})"
    else:
        why = "is not there"
    logger.warning("smoke: %s %s: %d made-up sounds stand in", path, why, CLIPS)
    return _made_up_pack(folder, name, _numbers(labels or []))


def _cut(pack: Pack, folder: Path, name: str) -> str:
    """Return a manifest of at most `CLIPS` clips from all over a pack: lists are often sorted by class."""
    if len(pack) <= CLIPS:
        return str(pack.manifest)
    rows = np.linspace(0, len(pack) - 1, CLIPS).round().astype(int)
    table = pack.table.iloc[rows].copy()
    table["hdf5path"] = [str(pack.shard_path(row).resolve()) for row in rows]  # relative ones start from the old list
    logger.info("smoke: %d of the %d clips of %s are judged by", CLIPS, len(pack), pack.manifest)
    return _write_manifest(folder, name, table)


def _write_manifest(folder: Path, name: str, table: pd.DataFrame) -> str:
    path = folder / "labels" / f"{name}.tsv"
    with whole_file(path) as partial:
        table.to_csv(partial, sep="\t", index=False)
    return str(path)


def _few_held_out(config: TrainConfig) -> float | None:
    """Return `valid_fraction`, or less of it where that would be more than `CLIPS` clips."""
    if config.valid_fraction is None:
        return None
    try:
        return min(config.valid_fraction, CLIPS / len(read_manifest(config.train_data)))
    except UserError:  # told where the run opens it
        return config.valid_fraction


def _numbers(labels: list[str]) -> list[str]:
    return [str(index) for index in range(len(labels))]
