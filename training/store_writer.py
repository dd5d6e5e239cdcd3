"""Writes stores of targets: a teacher's output for every chunk of a pack, in every epoch, augmented by stored seeds."""

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from audio.cutting import Chunks
from audio.dataset import ClipLoader, Pack
from common.errors import UserError
from common.files import remove_dead_partials, sha256, write_json
from common.locks import SHARES_LOCK, lock_shares
from common.parsing import read_json
from distill.batch import Batch
from distill.dataset import ReplayDataset, collate
from distill.embeddings import EmbeddingStore
from distill.published_layout import convert_rows, write_published_meta
from distill.replay import REFERENCE_RATE, Replay
from distill.sound_check import compute_fingerprint
from distill.sources import SeededItems
from distill.store import TargetStore
from distill.targets import SoftTargetStore
from models import AudioTagger, Ensemble
from models.devices import choose_device
from models.ensemble import ComputeSpectrogram
from models.head_inputs import HeadInput
from models.heads import weights_sha256
from training.config import SoftTargetConfig
from training.embedders import Embedder
from training.precision import Precision

logger = logging.getLogger(__name__)

# Keys of meta.json and of the configuration that must be equal for new files to belong to a store, besides
# `StoreContent.identity`.
IDENTITY = ("wavtransforms", "spectransforms", "mask_fill", "teacher", "manifest_sha256", "pack_rate", "seed", "mode")
CONFIG_IDENTITY = ("chunk_length", "keep_tails", "layout")
MAX_SHARED_PARTS, MIN_PART_SIZE = 64, 256  # number of parts of a small store, and chunks of each of them


class StoreContent:
    """The values that a store has of each chunk, and the model that computes them.

    Args:
        source: a teacher, or another source of embeddings.

    Attributes:
        store: the class of the store.
        identity: keys of `facts` that must be equal for new files to belong to a store.
    """

    store: ClassVar[type[TargetStore]]
    identity: ClassVar[tuple[str, ...]]

    def __init__(self, source: Embedder) -> None:
        self.source = source

    def facts(self) -> dict[str, Any]:
        """Return further entries of `meta.json`."""
        raise NotImplementedError

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return the number of files for an epoch of `n_items`."""
        raise NotImplementedError

    def list_items(self, n_items: int) -> np.ndarray:
        """Return which of `n_items` items can be computed, ascending."""
        return np.arange(n_items)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the datasets of the store except the seeds, (B, ...) each."""
        raise NotImplementedError


class SoftTargetContent(StoreContent):
    """The K highest probabilities; one file a process, as published.

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
        """Return the classes and the kind of the values."""
        return {
            "labels": self.teacher.labels,
            "num_classes": len(self.teacher.labels),
            "values": "probabilities",
            "activation": self.teacher.taggers[0].activation,
            "topk": self.topk,
        }

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return one file a process, fewer if there are fewer items."""
        return min(world_size, n_items)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the highest probabilities (B, K) and their classes (B, K)."""
        top = self.teacher.probabilities(batch, spectrogram).topk(self.topk)
        return {"topk_values": top.values, "topk_indexes": top.indices}


class EmbeddingContent(StoreContent):
    """Clip embeddings; a store may be completed by another number of processes.

    Args:
        source: computes them.
        part_size: number of chunks in one file.
        head_input: what is stored of a model in place of its clip embeddings.
    """

    store, identity = EmbeddingStore, ("values", "parts")

    def __init__(self, source: Embedder, part_size: int = 8192, head_input: HeadInput | None = None) -> None:
        super().__init__(source)
        self.part_size, self.head_input = part_size, head_input
        self.model = source.single if isinstance(source, Ensemble) else None  # raises for several

    def facts(self) -> dict[str, Any]:
        """Return the kind of the values, and the hash of the model."""
        facts: dict[str, Any] = {"values": "embeddings", "part_size": self.part_size}
        facts |= {} if self.head_input is None else {"head_input": asdict(self.head_input)}
        return facts if self.model is None else facts | {"weights_sha256": weights_sha256(self.model)}  # for heads

    def n_parts(self, n_items: int, world_size: int) -> int:
        """Return one file for each `part_size` items, and more in small stores, for many processes to share."""
        return max(1, -(-n_items // self.part_size), min(MAX_SHARED_PARTS, n_items // MIN_PART_SIZE))

    def list_items(self, n_items: int) -> np.ndarray:
        """Return the items that have an embedding; .npz files may not have all."""
        missing = getattr(self.source, "missing", np.zeros(n_items, bool))
        if missing.any():
            logger.info("%d of %d chunks have no embedding and are skipped", missing.sum(), n_items)
        return np.flatnonzero(~missing)

    def compute(self, batch: Batch, spectrogram: ComputeSpectrogram) -> dict[str, Tensor]:
        """Return the embeddings (B, E), clipped to the range of half precision with a warning."""
        if self.head_input is None or self.model is None:
            embeddings = self.source.embeddings(batch, spectrogram)
        else:
            with torch.no_grad():
                embeddings = self.head_input.compute(self.model, *spectrogram(self.model.front_end, batch)).float()
        largest = torch.finfo(torch.float16).max
        n_clipped = int((embeddings.abs() > largest).any(dim=1).sum())
        if n_clipped:
            logger.warning(
                "%d embeddings exceed the range of half precision and are clipped at %g: the network has diverged, or "
                "these clips are very different from its training data",
                n_clipped,
                largest,
            )
        return {"embedding": embeddings.clamp(-largest, largest)}


class _Part(NamedTuple):
    """One file to be written: `items` (n,) of an epoch from 1, as its part `number` from 0."""

    epoch: int
    number: int
    items: np.ndarray  # ascending


class _PartBatches(Sampler[list[tuple[int, int]]]):
    """Yields batches of (epoch, item), part after part, clips of similar length together to reduce padding."""

    def __init__(self, parts: Sequence[_Part], lengths: np.ndarray, batch_size: int) -> None:
        self.parts, self.lengths, self.batch_size = parts, lengths, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, _, items in self.parts:
            items = items[np.argsort(self.lengths[items], kind="stable")]
            for first in range(0, len(items), self.batch_size):
                yield [(epoch, int(item)) for item in items[first : first + self.batch_size]]


class StoreWriter:
    """Computes a store of targets for a pack and writes it; a store that is incomplete is completed.

    Args:
        config: settings of the store.
        pack: the clips.
        content: what is stored.
        folder: folder of the store.
        rank: rank of this process.
        world_size: number of processes that share the work.

    Raises:
        UserError: the folder has a store with other settings.
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
        items = content.list_items(len(chunks))
        self.parts = np.array_split(items, content.n_parts(len(items), world_size))
        self.numbers = range(rank, len(self.parts), world_size)  # of the parts of this rank
        sample_rates = content.source.sample_rates
        self.hash_sounds = config.layout == "native" and bool(sample_rates)  # without rates no sound is read
        self.dataset = ReplayDataset(pack, self.items, sample_rates, hash_sounds=self.hash_sounds)
        self._prepare_folder()

    def meta(self) -> dict[str, Any]:
        """Return the content of `meta.json`."""
        return {
            **self.replay.settings(),
            "teacher": self.content.source.describe(),
            **self.content.facts(),
            "reference_rate": REFERENCE_RATE,
            "pack_rate": self.pack.sample_rate,
            "manifest": str(self.pack.manifest),
            "manifest_sha256": sha256(self.pack.manifest),
            "sounds_sha256": compute_fingerprint(self.pack),
            "seed": self.config.seed,
            "mode": self.config.mode,
            "world_size": self.world_size,
            "parts": len(self.parts),
            "config": self.config.model_dump(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "numpy", "soxr")},
        }

    def _prepare_folder(self) -> None:
        """Check that a store in the folder has the same settings, and write `meta.json`."""
        remove_dead_partials(self.folder)
        path, meta = self.folder / "meta.json", json.loads(json.dumps(self.meta()))
        what, prefix = self.content.store.what, self.content.store.prefix
        if path.is_file():
            stored = read_json(path, f"restore it, or delete the folder to make the {what} again")
            stored_config = {"keep_tails": False, "layout": "native"} | dict(stored.get("config") or {})
            different = [key for key in (*IDENTITY, *self.content.identity) if stored.get(key) != meta[key]]
            different += [key for key in CONFIG_IDENTITY if stored_config.get(key) != getattr(self.config, key)]
            self._check_sounds(stored.get("sounds_sha256"), meta["sounds_sha256"])
            if different:
                raise UserError(
                    f"{self.folder} has {what} made with another {', '.join(different)}; give another "
                    "outputpath or name, or delete the folder to make them again"
                    + (f"; it was started by {stored['world_size']} processes" if "world_size" in different else "")
                )
            if stored_config.get("epochs") == self.config.epochs:
                return  # runs that use this store identify it by the hash of this file
        elif any(self.folder.glob(f"{prefix}_ep*")):
            raise UserError(
                f"{self.folder} has {what} without a meta.json, so their settings are unknown; give another "
                "outputpath or name"
            )
        if self.config.layout == "published":
            write_published_meta(self.folder / "meta.pt", self.replay, meta["config"])
        write_json(path, meta)  # by every rank, the same: no part is ever written without it

    def _check_sounds(self, stored: str | None, found: str) -> None:
        """Raise if the pack has been made again with other sounds under the same names."""
        what = self.content.store.what
        if stored is None:
            logger.info("%s has no hash of the sounds of its %s: they are not compared", self.folder, what)
        elif stored != found:
            raise UserError(
                f"{self.folder} was started with other sounds than {self.pack.manifest} has now under the same names "
                f"(hash of lengths and samples: found {found[:16]}, expected {stored[:16]}); delete the folder to save "
                f"the {what} again, give another outputpath or name, or pack the former sounds again"
            )

    def save(self) -> Path:
        """Write all parts that do not exist yet; return the folder.

        Where another process writes parts of this rank, they are awaited, and only what is missing then is written.
        """
        lock = lock_shares(self.folder, self.numbers, self.content.store.what)
        # A finished store may lie in a folder that cannot be written. Locking removes what a killed process has left.
        needs_lock = self._find_missing() or (self.folder / SHARES_LOCK).exists()
        with lock if needs_lock else nullcontext():
            return self._save()

    def _find_missing(self) -> list[_Part]:
        """Return the parts of this rank that are not written yet."""
        store = self.content.store
        of_rank = [
            _Part(epoch, number, self.parts[number])
            for epoch in range(1, self.config.epochs + 1)
            for number in self.numbers
        ]
        return [part for part in of_rank if not store.get_path(self.folder, part.epoch, part.number).is_file()]

    def _save(self) -> Path:
        missing, n_parts = self._find_missing(), self.config.epochs * len(self.numbers)
        if len(missing) < n_parts:
            logger.info("%d of %d files exist already", n_parts - len(missing), n_parts)
        loader = ClipLoader(
            self.dataset,
            self.config.num_workers,
            batch_sampler=_PartBatches(missing, self.items.chunks.n_samples, self.config.batch_size),
            collate_fn=collate,
        )
        batches = iter(loader)
        with tqdm(
            total=sum(len(part.items) for part in missing), desc=self.content.store.what, unit="chunk"
        ) as progress:
            for part in missing:
                self._write_part(part, batches, progress)
        return self.folder

    def _write_part(self, part: _Part, batches: Iterator[Batch], progress: "tqdm[Any]") -> None:
        """Compute and write one part."""
        store, n_items = self.content.store, len(part.items)
        arrays: dict[str, np.ndarray] = {}
        hashes = np.empty(n_items, np.int64)
        n_done = 0
        while n_done < n_items:
            batch = next(batches).to(self.device)
            rows = np.searchsorted(part.items, batch.item.cpu().numpy())
            for name, values in self._compute(batch).items():
                array = arrays.setdefault(name, np.empty((n_items, *values.shape[1:]), store.types[name]))
                if array.shape[1:] != values.shape[1:]:
                    raise UserError(
                        f"the teacher's output for {self.dataset.name(int(batch.item[0]))} has the shape "
                        f"{tuple(values.shape[1:])}, expected {array.shape[1:]} as for the clips before it"
                    )
                array[rows] = values.cpu().numpy()
            if batch.sound_hash is not None:
                hashes[rows] = batch.sound_hash.cpu().numpy()
            n_done += len(rows)
            progress.update(len(rows))
        arrays["seeds"] = self.items.seeds(part.epoch)[part.items]
        names = self._build_rows(part.items, hashes if self.hash_sounds else None)
        store.write(self.folder, part.epoch, part.number, names, **arrays)

    def _compute(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs for a batch; raise if they are not finite."""
        with self.precision.context():
            outputs = self.content.compute(batch, self.replay.spectrogram)
        for values in outputs.values():
            finite = values.isfinite().all(dim=1)
            if not bool(finite.all()):
                name = self.dataset.name(int(batch.item[~finite][0]))
                raise UserError(f"the teacher's output for {name} is not finite; check that clip")
        return outputs

    def _build_rows(self, items: np.ndarray, hashes: np.ndarray | None) -> pd.DataFrame:
        """Return the table that names the chunks of a part."""
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
        return convert_rows(rows) if self.config.layout == "published" else rows


def store_embeddings(
    model: AudioTagger, pack: Pack, folder: Path, head_input: HeadInput | None = None, **settings: Any
) -> EmbeddingStore:
    """Store a model's embeddings of all chunks of a pack, or those that are missing; return the store.

    Args:
        model: the model.
        pack: the clips.
        folder: folder of the store, one for each `head_input`.
        head_input: what to store in place of clip embeddings.
        **settings: keys of `SoftTargetConfig`, such as `chunk_length`, `batch_size`, `num_workers` and `device`.

    Raises:
        UserError: the folder has embeddings of another model, pack or setting.
    """
    settings = {"batch_size": 32, "num_workers": 4, "keep_tails": True} | settings
    settings |= {"train_data": str(pack.manifest), "model": model.name, "targets": "embeddings"}
    config = SoftTargetConfig.model_validate(settings)
    part_size = 8192 if head_input is None else 512  # rows of several layers or time steps are long
    content = EmbeddingContent(Ensemble([model]), part_size, head_input)
    return EmbeddingStore(StoreWriter(config, pack, content, folder).save())
