"""Asking a teacher: every chunk of a pack, in every epoch, with the augmentation that its seed says."""

import importlib.metadata
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from audio.dataset import Pack, chunk_bounds, loader_workers
from common.errors import UserError
from common.files import sha256, write_json
from distill.dataset import ReplayDataset, collate, prepare_batch
from distill.replay import REFERENCE_RATE, Replay
from distill.sources import SeededItems
from distill.targets import epoch_file, write_epoch
from models.devices import choose_device
from training.config import SoftTargetConfig
from training.precision import Precision
from training.teacher import Teacher

logger = logging.getLogger(__name__)

# What must stay as it is for files of another day to belong to the same store.
IDENTITY = (
    *("wavtransforms", "spectransforms", "mask_fill", "teacher", "manifest_sha256", "pack_rate", "seed", "topk"),
    *("mode", "world_size"),
)


class _Batches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, item), epoch after epoch, clips of like length together so that little is padded."""

    def __init__(self, epochs: list[int], items: np.ndarray, lengths: np.ndarray, batch_size: int) -> None:
        self.epochs, self.batch_size = epochs, batch_size
        self.items = items[np.argsort(lengths[items], kind="stable")]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            for first in range(0, len(self.items), self.batch_size):
                yield [(epoch, int(item)) for item in self.items[first : first + self.batch_size]]


class Teaching:
    """A soft-target store in the making.

    Args:
        config: what to make.
        pack: the clips.
        teacher: who is asked.
        folder: to write into.
        rank: of this process.
        world_size: how many processes share the work.

    Raises:
        UserError: the folder holds targets made with other settings.
    """

    def __init__(
        self,
        config: SoftTargetConfig,
        pack: Pack,
        teacher: Teacher,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.pack, self.folder, self.rank, self.world_size = config, pack, folder, rank, world_size
        self.device = choose_device(config.device)
        self.precision = Precision(config.mode or "noamp", self.device)
        self.teacher = teacher.to(self.device)
        self.num_classes = len(teacher.labels)
        self.topk = min(config.topk, self.num_classes)
        if self.topk < config.topk:
            logger.info("topk %d: the teacher has %d classes, all are stored", config.topk, self.num_classes)
        self.replay = Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
        bounds = chunk_bounds(pack.n_samples, pack.sample_rate, config.chunk_length)
        self.items = SeededItems(bounds, pack.sample_rate, self.replay, config.seed)
        self.mine = np.array_split(np.arange(len(bounds)), world_size)[rank]
        self._claim_folder()

    def meta(self) -> dict[str, Any]:
        """Return what `meta.json` says of the store."""
        return {
            **self.replay.settings(),
            "teacher": self.teacher.describe(),
            "labels": self.teacher.labels,
            "num_classes": self.num_classes,
            "values": "probabilities",
            "activation": self.teacher.members[0].activation,
            "reference_rate": REFERENCE_RATE,
            "pack_rate": self.pack.sample_rate,
            "manifest": str(self.pack.manifest),
            "manifest_sha256": sha256(self.pack.manifest),
            "seed": self.config.seed,
            "topk": self.topk,
            "mode": self.config.mode,
            "world_size": self.world_size,
            "config": self.config.model_dump(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "numpy", "soxr")},
        }

    def _claim_folder(self) -> None:
        target, meta = self.folder / "meta.json", json.loads(json.dumps(self.meta()))
        if target.is_file():
            there = json.loads(target.read_text(encoding="utf-8"))
            other = [key for key in IDENTITY if there.get(key) != meta[key]]
            if there.get("config", {}).get("chunk_length") != self.config.chunk_length:
                other.append("chunk_length")
            if other:
                raise UserError(
                    f"{self.folder} holds soft targets made with another {', '.join(other)}; give another "
                    "outputpath or name, or delete the folder to make them anew"
                    + (f"; it was begun by {there['world_size']} processes" if "world_size" in other else "")
                )
        elif any(self.folder.glob("logits_ep*")):
            raise UserError(
                f"{self.folder} holds soft targets without a meta.json, so whether they fit is unknown; give another "
                "outputpath or name"
            )
        write_json(target, meta)  # by every rank, the same: files never stand without it

    def save(self) -> Path:
        """Write every epoch that is not there yet; return the folder."""
        epochs = [e for e in range(1, self.config.epochs + 1) if not epoch_file(self.folder, e, self.rank).is_file()]
        if len(epochs) < self.config.epochs:
            logger.info("%d of %d epochs are there already", self.config.epochs - len(epochs), self.config.epochs)
        lengths = self.items.bounds[:, 2] - self.items.bounds[:, 1]
        dataset = ReplayDataset(self.pack, self.items, self.teacher.sample_rates)
        loader = DataLoader(
            dataset,
            batch_sampler=_Batches(epochs, self.mine, lengths, self.config.batch_size),
            num_workers=loader_workers(self.config.num_workers),
            collate_fn=collate,
        )
        stream = iter(loader)
        with tqdm(total=len(epochs) * len(self.mine), desc="soft targets", unit="chunk") as progress:
            for epoch in epochs:
                values = np.empty((len(self.mine), self.topk), np.float16)
                indexes = np.empty((len(self.mine), self.topk), np.int16)
                done = 0
                while done < len(self.mine):
                    batch = prepare_batch(next(stream), self.device)
                    top = self._probabilities(dataset, batch).topk(self.topk)
                    rows = batch["item"].cpu().numpy() - (self.mine[0] if len(self.mine) else 0)
                    values[rows], indexes[rows] = top.values.cpu().numpy(), top.indices.cpu().numpy()
                    done += len(rows)
                    progress.update(len(rows))
                seeds = self.items.seeds(epoch)[self.mine]
                write_epoch(self.folder, epoch, self.rank, self._rows(), values, indexes, seeds)
        return self.folder

    def _probabilities(self, dataset: ReplayDataset, batch: dict[str, Any]) -> Tensor:
        with self.precision.context():
            probabilities = self.teacher.probabilities(batch, self.replay.spectrogram)
        if not bool(torch.isfinite(probabilities).all()):
            bad = batch["item"][~torch.isfinite(probabilities).all(dim=1)]
            raise UserError(f"the teacher's answer to {dataset.name(int(bad[0]))} is not a number; look at that clip")
        return probabilities

    def _rows(self) -> pd.DataFrame:
        clips, starts, stops = self.items.bounds[self.mine].T
        return pd.DataFrame(
            {
                "filename": [self.pack.names[clip] for clip in clips],
                "start": starts / self.pack.sample_rate,
                "end": stops / self.pack.sample_rate,
                "n_reference": self.items.n_reference[self.mine],
            }
        )
