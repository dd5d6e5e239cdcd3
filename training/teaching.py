"""Asking a teacher: every chunk of a pack, in every epoch, with the augmentation that its seed says."""

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from audio.cutting import Chunks
from audio.dataset import Pack, loader_workers
from common.errors import UserError
from common.files import remove_dead_partials, sha256, write_json
from distill.batch import Batch
from distill.dataset import ReplayDataset, collate
from distill.embeddings import EmbeddingStore
from distill.published_layout import published_rows, write_published_meta
from distill.replay import REFERENCE_RATE, Replay
from distill.sound_check import fingerprint
from distill.sources import SeededItems
from distill.store import TargetStore
from distill.targets import SoftTargetStore
from models import Ensemble
from models.devices import choose_device
from models.ensemble import ComputeSpectrogram
from models.heads import weights_sha256
from training.config import SoftTargetConfig
from training.embedders import Embedder
from training.precision import Precision

logger = logging.getLogger(__name__)

# What must stay as it is for files of another day to belong to the same store, beside `StoreContent.identity`.
IDENTITY = ("wavtransforms", "spectransforms", "mask_fill", "teacher", "manifest_sha256", "pack_rate", "seed", "mode")
MOST_SHARED, LEAST_SHARED = 64, 256  # parts of a small store, and what makes another one worth while


class StoreContent:
    """What a store holds of each chunk, and what computes it.

    Args:
        source: a teacher, or another source of embeddings.

    Attributes:
        store: the kind of store that is made.
        identity: which of `facts` must stay as they are for files of another day to belong to the same store.
    """

    store: ClassVar[type[TargetStore]]
    identity: ClassVar[tuple[str, ...]]

    def __init__(self, source: Embedder) -> None:
        self.source = source

    def facts(self) -> dict[str, Any]:
        """Return what else `meta.json` says."""
        raise NotImplementedError

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return how many files an epoch of `n_items` goes to."""
        raise NotImplementedError

    def list_available(self, n_items: int) -> np.ndarray:
        """Return which of `n_items` items can be computed, ascending."""
        return np.arange(n_items)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the datasets of the store but the seeds, (B, ...) each."""
        raise NotImplementedError


class SoftTargets(StoreContent):
    """Probabilities, of which the K highest are kept; one file a process, as published, or fewer of fewer items.

    Args:
        teacher: computes them.
        topk: K, at most the number of classes.
    """

    store, identity = SoftTargetStore, ("topk", "world_size")

    def __init__(self, teacher: Ensemble, topk: int) -> None:
        super().__init__(teacher)
        teacher.check_classes()
        self.teacher, self.topk = teacher, min(topk, len(teacher.labels))
        if self.topk < topk:
            logger.info("topk %d: the teacher has %d classes, all are stored", topk, len(teacher.labels))

    def facts(self) -> dict[str, Any]:
        """Return the classes and what the values are."""
        return {
            "labels": self.teacher.labels,
            "num_classes": len(self.teacher.labels),
            "values": "probabilities",
            "activation": self.teacher.taggers[0].activation,
            "topk": self.topk,
        }

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return one a process; fewer only where there are fewer items."""
        return min(world_size, n_items)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the highest probabilities (B, K) and their classes (B, K)."""
        top = self.teacher.probabilities(batch, spectrogram).topk(self.topk)
        return {"topk_values": top.values, "topk_indexes": top.indices}


class Embeddings(StoreContent):
    """Clip embeddings; any number of processes may go on with a store.

    Args:
        source: computes them.
        part_size: chunks whose embeddings go to one file.
    """

    store, identity = EmbeddingStore, ("values", "parts")

    def __init__(self, source: Embedder, part_size: int = 8192) -> None:
        super().__init__(source)
        self.part_size = part_size
        self.model = source.single if isinstance(source, Ensemble) else None  # raises for several

    def facts(self) -> dict[str, Any]:
        """Return what the values are, and whose."""
        facts: dict[str, Any] = {"values": "embeddings", "part_size": self.part_size}
        return facts if self.model is None else facts | {"weights_sha256": weights_sha256(self.model)}  # for heads

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return one for each `part_size` items, and where there are few, enough for many processes to share."""
        return max(1, -(-n_items // self.part_size), min(MOST_SHARED, n_items // LEAST_SHARED))

    def list_available(self, n_items: int) -> np.ndarray:
        """Return the items that have an embedding: all, but where files lack some."""
        lacking = getattr(self.source, "lacking", np.zeros(n_items, bool))
        if lacking.any():
            logger.info("%d of %d chunks have no embedding and are left out", lacking.sum(), n_items)
        return np.flatnonzero(~lacking)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the embeddings (B, E), clipped with a warning where half precision cannot hold them."""
        found = self.source.embeddings(batch, spectrogram)
        largest = torch.finfo(torch.float16).max
        n_over = int((found.abs() > largest).any(dim=1).sum())
        if n_over:
            logger.warning(
                "%d embeddings hold numbers beyond those of half precision, and are clipped at %g: the network has "
                "diverged, or these clips are unlike all that it learnt from",
                n_over,
                largest,
            )
        return {"embedding": found.clamp(-largest, largest)}


class _Unit(NamedTuple):
    """One file to be written.

    Attributes:
        epoch: from 1.
        part: from 0.
        items: (n,) those it holds, ascending.
    """

    epoch: int
    part: int
    items: np.ndarray


class _Batches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, item), file after file, clips of like length together so that little is padded."""

    def __init__(self, units: Sequence[_Unit], lengths: np.ndarray, batch_size: int) -> None:
        self.units, self.lengths, self.batch_size = units, lengths, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, _, items in self.units:
            items = items[np.argsort(self.lengths[items], kind="stable")]
            for first in range(0, len(items), self.batch_size):
                yield [(epoch, int(item)) for item in items[first : first + self.batch_size]]


class Teaching:
    """A store of what a teacher says, in the making.

    Args:
        config: what to make.
        pack: the clips.
        content: what is stored.
        folder: to write into.
        rank: of this process.
        world_size: how many processes share the work.

    Raises:
        UserError: the folder holds what was made with other settings.
    """

    def __init__(
        self,
        config: SoftTargetConfig,
        pack: Pack,
        content: StoreContent,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.pack, self.folder, self.rank, self.world_size = config, pack, folder, rank, world_size
        self.device = choose_device(config.device)
        self.precision = Precision(config.mode or "noamp", self.device)
        self.content = content
        content.source.to(self.device)
        self.replay = Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
        chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length, not config.keep_tails)
        self.items = SeededItems(chunks, self.replay, config.seed)
        items = content.list_available(len(chunks))
        self.parts = np.array_split(items, content.n_parts(len(items), world_size))
        self._claim_folder()

    def meta(self) -> dict[str, Any]:
        """Return what `meta.json` says of the store."""
        return {
            **self.replay.settings(),
            "teacher": self.content.source.describe(),
            **self.content.facts(),
            "reference_rate": REFERENCE_RATE,
            "pack_rate": self.pack.sample_rate,
            "manifest": str(self.pack.manifest),
            "manifest_sha256": sha256(self.pack.manifest),
            "sounds_sha256": fingerprint(self.pack),
            "seed": self.config.seed,
            "mode": self.config.mode,
            "world_size": self.world_size,
            "parts": len(self.parts),
            "config": self.config.model_dump(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "numpy", "soxr")},
        }

    def _claim_folder(self) -> None:
        remove_dead_partials(self.folder)
        target, meta = self.folder / "meta.json", json.loads(json.dumps(self.meta()))
        what, prefix = self.content.store.what, self.content.store.prefix
        if target.is_file():
            there = json.loads(target.read_text(encoding="utf-8"))
            other = [key for key in (*IDENTITY, *self.content.identity) if there.get(key) != meta[key]]
            was = there.get("config", {})
            if was.get("chunk_length") != self.config.chunk_length:
                other.append("chunk_length")
            if was.get("keep_tails", False) != self.config.keep_tails:
                other.append("keep_tails")
            if was.get("layout", "native") != self.config.layout:
                other.append("layout")
            self._check_sounds(there.get("sounds_sha256"), meta["sounds_sha256"])
            if other:
                raise UserError(
                    f"{self.folder} holds {what} made with another {', '.join(other)}; give another "
                    "outputpath or name, or delete the folder to make them anew"
                    + (f"; it was begun by {there['world_size']} processes" if "world_size" in other else "")
                )
            if was.get("epochs") == self.config.epochs:
                return  # a run that was begun with this store knows it by its description
        elif any(self.folder.glob(f"{prefix}_ep*")):
            raise UserError(
                f"{self.folder} holds {what} without a meta.json, so whether they fit is unknown; give another "
                "outputpath or name"
            )
        if self.config.layout == "published":
            write_published_meta(self.folder / "meta.pt", self.replay, meta["config"])
        write_json(target, meta)  # by every rank, the same: files never stand without it

    def _check_sounds(self, stored: str | None, found: str) -> None:
        """Refuse to go on where the pack was made anew with other sounds under the same names."""
        what = self.content.store.what
        if stored is None:
            logger.info("%s does not say what sounds its %s are of: this is not compared", self.folder, what)
        elif stored != found:
            raise UserError(
                f"{self.folder} was begun with other sounds than {self.pack.manifest} holds now under the same names "
                f"(hash of lengths and samples: found {found[:16]}, wanted {stored[:16]}); delete the folder to save "
                f"the {what} anew, give another outputpath or name, or pack the former sounds again"
            )

    def save(self) -> Path:
        """Write every file that is not there yet; return the folder."""
        store = self.content.store
        wanted = [
            _Unit(epoch, part, items)
            for epoch in range(1, self.config.epochs + 1)
            for part, items in enumerate(self.parts)
            if part % self.world_size == self.rank
        ]
        units = [unit for unit in wanted if not store.path_of(self.folder, unit.epoch, unit.part).is_file()]
        if len(units) < len(wanted):
            logger.info("%d of %d files are there already", len(wanted) - len(units), len(wanted))
        hashed = self.config.layout == "native" and bool(self.content.source.sample_rates)  # else no sound is read
        dataset = ReplayDataset(self.pack, self.items, self.content.source.sample_rates, hash_sounds=hashed)
        loader = DataLoader(
            dataset,
            batch_sampler=_Batches(units, self.items.chunks.n_samples, self.config.batch_size),
            num_workers=loader_workers(self.config.num_workers),
            collate_fn=collate,
        )
        stream = iter(loader)
        with tqdm(total=sum(len(unit.items) for unit in units), desc=store.what, unit="chunk") as progress:
            for unit in units:
                arrays: dict[str, np.ndarray] = {}
                hashes = np.empty(len(unit.items), np.int64)
                done = 0
                while done < len(unit.items):
                    batch = next(stream).to(self.device)
                    rows = np.searchsorted(unit.items, batch.item.cpu().numpy())
                    for name, answer in self._answers(dataset, batch).items():
                        if name not in arrays:
                            arrays[name] = np.empty((len(unit.items), *answer.shape[1:]), store.types[name])
                        if arrays[name].shape[1:] != answer.shape[1:]:
                            raise UserError(
                                f"the teacher's answer to {dataset.name(int(batch.item[0]))} has the shape "
                                f"{tuple(answer.shape[1:])}, those before it {arrays[name].shape[1:]}; wanted one width"
                            )
                        arrays[name][rows] = answer.cpu().numpy()
                    if hashed:
                        hashes[rows] = batch.sound_hash.cpu().numpy()
                    done += len(rows)
                    progress.update(len(rows))
                arrays["seeds"] = self.items.seeds(unit.epoch)[unit.items]
                rows_of_unit = self._rows(unit.items, hashes if hashed else None)
                store.write(self.folder, unit.epoch, unit.part, rows_of_unit, **arrays)
        return self.folder

    def _answers(self, dataset: ReplayDataset, batch: Batch) -> dict[str, Tensor]:
        with self.precision.context():
            answers = self.content.compute(batch, self.replay.spectrogram)
        for answer in answers.values():
            finite = answer.isfinite().all(dim=1)
            if not bool(finite.all()):
                name = dataset.name(int(batch.item[~finite][0]))
                raise UserError(f"the teacher's answer to {name} is not a number; look at that clip")
        return answers

    def _rows(self, items: np.ndarray, hashes: np.ndarray | None) -> pd.DataFrame:
        chunks = self.items.chunks.select(items)
        rows = pd.DataFrame(
            {
                "filename": [self.pack.names[clip] for clip in chunks.clip],
                "start": chunks.start / self.pack.sample_rate,
                "end": chunks.stop / self.pack.sample_rate,
                "n_reference": self.items.n_reference[items],
                "clip_samples": self.pack.n_samples[chunks.clip],
            }
        )
        if hashes is not None:
            rows["sound_hash"] = hashes
        return published_rows(rows) if self.config.layout == "published" else rows
