"""`--smoke true`: the run of a configuration in about a minute on a CPU, before it is given days.

Where all data and teachers that a configuration names exist, few of them are used. Where any is missing, generated
sounds replace all data: they are written as files, packed, and their targets stored by the functions of the ordinary
commands.
"""

import logging
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

from audio.dataset import Pack
from audio.manifest import read_manifest
from audio.pack import pack as pack_sounds
from common.errors import Faults, UserError, some
from common.files import whole_file
from distill.clusters import write_clusters
from models import AudioTagger, Ensemble, create_model, get_model_entry, save_checkpoint
from models.base import Activation
from models.labels import audioset_labels, labels_for, read_labels
from training.config import SoftTargetConfig, TrainConfig
from training.labelled import open_pack
from training.store_writer import SoftTargetContent, StoreWriter, store_embeddings

logger = logging.getLogger(__name__)

EPOCHS = EPOCH_LENGTH = 2
BATCH = 4
CLIPS = 16  # of an evaluation pack, and of each generated one
SECONDS, SAMPLE_RATE = 2.0, 16000  # of generated sounds
NAMES = [f"sound {index}" for index in range(10)]  # classes where the configuration implies none
TEACHER = "audiotransformer_pico"
SEED = 0


def smoke(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return a configuration that takes about a minute on a CPU and runs all the code that `config` would run.

    The same configuration and data give the same files. Of processes that train together, one calls it.

    Args:
        config: of the long run; model, objective and augmentation stay as they are.
        folder: for generated data and shortened evaluation lists.

    Raises:
        UserError: the label table cannot be read. Other faults of existing data are reported when the run opens them.
    """
    config = config.model_copy(update=_shorten(config))
    missing = [path for path in _list_files(config) if not Path(path).exists()]
    if missing:
        logger.warning("smoke: not found: %s; generated sounds replace all data of this run", some(missing, 10))
        config = config.model_copy(update=_generate(config, folder))
    else:
        named = dict.fromkeys(path for path in (config.valid_data, config.eval_data) if path)
        short = {path: _cut(path, folder, f"short_{number}") for number, path in enumerate(named)}
        update = {key: short.get(getattr(config, key)) for key in ("valid_data", "eval_data")}
        config = config.model_copy(update=update)
    return config.model_copy(update={"valid_fraction": _limit_valid_fraction(config)})


def _shorten(config: TrainConfig) -> dict[str, object]:
    """Return the settings that make a run short."""
    pretrained = config.pretrained
    if not (isinstance(pretrained, str) and Path(pretrained).exists()):
        source = get_model_entry(config.model).initialisation if pretrained in (None, True) else pretrained
        if source:
            logger.info("smoke: random weights in place of %s: nothing is downloaded", source)
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


def _list_files(config: TrainConfig) -> list[str]:
    """Return every file and folder that a configuration names; teachers count by their weights, if these are given."""
    names, weights = _list(config.teacher or []), _list(config.teacher_weights or [])
    teachers = [file or name for name, file in zip_longest(names, weights)]
    keys = ("train_data", "valid_data", "eval_data", "clusters", "labels_csv")
    named = [*(getattr(config, key) for key in keys), *config.stores, *teachers]
    return [path for path in named if path]


def _list(given: str | Sequence[str | None]) -> Sequence[str | None]:
    return [given] if isinstance(given, str) else given


def _generate(config: TrainConfig, folder: Path) -> dict[str, object]:
    """Write packs, and whatever else the configuration names, for its classes; return the settings that name them."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps with other classes
    labels_csv = config.labels_csv if config.labels_csv and Path(config.labels_csv).exists() else None
    labels = NAMES
    if labels_csv:
        labels = read_labels(labels_csv)
    elif config.num_classes or config.logitspath:
        labels = labels_for(config.num_classes, None) if config.num_classes else audioset_labels()
    # A label table is for numbers; text is read as the name of a class.
    cells = NAMES if labels is NAMES else [str(index) for index in range(len(labels))]
    train_data = _pack(folder, "train", cells)
    update: dict[str, object] = {"train_data": train_data, "labels_csv": labels_csv}
    update |= {key: _pack(folder, key, cells) for key in ("valid_data", "eval_data") if getattr(config, key)}
    activation: Activation = "softmax" if config.loss == "CrossEntropyLoss" else "sigmoid"
    with torch.random.fork_rng(devices=[]):  # the random start of the student stays what it is without --smoke
        torch.manual_seed(SEED)
        if config.teacher:
            paths = [folder / f"teacher{number}.pt" for number in range(len(_list(config.teacher)))]
            for path in paths:
                save_checkpoint(path, _create_teacher(labels, activation))
            update |= {"teacher": list(map(str, paths)), "teacher_weights": None, "teacher_head": None}
        if config.logitspath:
            update["logitspath"] = _store_targets(folder / "logits", train_data, labels)
        if config.embeddingspath:
            targets = [folder / f"embeddings{number}" for number in range(len(config.embedding_stores))]
            for target in targets:
                teacher = _create_teacher([], activation)
                store_embeddings(teacher, Pack.open(train_data), target, num_workers=0, device="cpu")
            update["embeddingspath"] = list(map(str, targets))
    if config.clusters:
        update["clusters"] = str(folder / "clusters_k2.parquet")
        rows = pd.DataFrame({"filename": Pack.open(train_data).names, "start": 0.0, "end": SECONDS})
        write_clusters(folder / "clusters_k2.parquet", rows, np.arange(CLIPS) * 2 // CLIPS, {"k": 2})
    return update


def _create_teacher(labels: list[str], activation: Activation) -> AudioTagger:
    return create_model(TEACHER, num_classes=len(labels), labels=labels, activation=activation, depth=1)


def _pack(folder: Path, name: str, cells: list[str]) -> str:
    """Write noisy tones, one pitch a class, and pack them; return the manifest. Other names have other sounds."""
    random = np.random.default_rng([SEED, *name.encode()])
    time = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    rows = []
    (folder / name).mkdir(parents=True)
    for index in range(CLIPS):
        kind = index % len(cells)
        pitch = 150 * 1.25**kind * random.uniform(0.97, 1.03)
        sound = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.05 * random.standard_normal(len(time))
        path = folder / name / f"{index:02d}.wav"
        soundfile.write(path, sound, SAMPLE_RATE)
        rows.append((str(path), cells[kind]))
    table = pd.DataFrame(rows, columns=["filename", "labels"])
    pack_sounds(table, folder / f"{name}.tsv", folder, name, sample_rate=SAMPLE_RATE, n_workers=0, progress=False)
    return str(folder / "labels" / f"{name}.tsv")


def _store_targets(folder: Path, manifest: str, labels: list[str]) -> str:
    """Store the soft targets of a small, untrained teacher; return the folder."""
    settings = {"epochs": EPOCHS, "topk": 5, "num_workers": 0, "device": "cpu"}
    config = SoftTargetConfig.model_validate({"train_data": manifest, "model": TEACHER, **settings})
    teacher = Ensemble([_create_teacher(labels, "sigmoid")])
    return str(StoreWriter(config, Pack.open(manifest), SoftTargetContent(teacher, config.topk), folder).save())


def _cut(path: str, folder: Path, name: str) -> str:
    """Write a list of at most `CLIPS` clips from all over a pack, since lists are often sorted by class."""
    pack = open_pack(path, Faults(path), labelled=True)
    if pack is None or len(pack) <= CLIPS:  # faults are reported when the run opens it
        return path
    rows = np.linspace(0, len(pack) - 1, CLIPS).round().astype(int)
    table = pack.table.iloc[rows].copy()
    table["hdf5path"] = [str(pack.shard_path(row).resolve()) for row in rows]  # relative ones start from the old list
    logger.info("smoke: %d of the %d clips of %s are used", CLIPS, len(pack), path)
    target = folder / "labels" / f"{name}.tsv"
    with whole_file(target) as file:
        table.to_csv(file, sep="\t", index=False)
    return str(target)


def _limit_valid_fraction(config: TrainConfig) -> float | None:
    """Return `valid_fraction`, or less of it where that would be more than `CLIPS` clips."""
    if config.valid_fraction is None:
        return None
    try:
        return min(config.valid_fraction, CLIPS / len(read_manifest(config.train_data)))
    except UserError:  # reported when the run opens it
        return config.valid_fraction
