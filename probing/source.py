"""The source of the embeddings of a probe: a model, or stores of embeddings.

Letters: N clips, E embedding width.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from audio.dataset import Pack
from common.errors import Faults, UserError, some
from common.files import sha256
from distill.embeddings import EmbeddingStore, compute_clip_embeddings
from distill.sound_check import compute_fingerprint
from models import AudioTagger, Ensemble, load_model
from models.devices import choose_device
from models.heads import weights_sha256
from probing.options import ProbeOptions
from training.store_writer import store_embeddings


@dataclass(frozen=True)
class EmbeddingSource:
    """A model, or stores of embeddings.

    Attributes:
        model: computes them; None for stored ones.
        stores: stored ones, of one teacher.
        name: as given on the command line.
    """

    model: AudioTagger | None
    stores: list[EmbeddingStore]
    name: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the embeddings depend on, as plain values."""
        if self.model is not None:
            facts = {"model": self.model.name, "model_args": self.model.arguments}
            return json.loads(json.dumps(facts | {"weights_sha256": weights_sha256(self.model)}))
        keys = ("teacher", "weights_sha256", "mode")
        stores: list[dict[str, Any]] = [
            {key: store.meta.get(key) for key in keys} | {"seconds": store.chunk_seconds} for store in self.stores
        ]
        return {"stores": stores, "weights_sha256": stores[0]["weights_sha256"]}

    @property
    def given(self) -> str | None:
        """The name, file or folder of the model; None if the teacher of stores is no single model of this project."""
        if self.model is not None:
            return self.name
        return self.stores[0].meta.get("config", {}).get("model") if self.model_name else None

    @property
    def model_name(self) -> str | None:
        """The model's name in the registry; None if the teacher of stores is no single model of this project."""
        if self.model is not None:
            return self.model.name
        match self.stores[0].meta.get("teacher"):
            case [{"model": str(name)}]:
                return name
        return None


def open_source(options: ProbeOptions, faults: Faults) -> EmbeddingSource | None:
    """Load the model of a probe, or open its stores; their faults are added to `faults`."""
    with faults.noted():
        if options.model is not None:
            device = choose_device(options.device)
            return EmbeddingSource(load_model(options.model, weights=options.weights, device=device), [], options.model)
    stores = []
    for folder in options.embeddings or []:
        with faults.noted():
            stores.append(EmbeddingStore(folder))
    if options.model is not None or not stores or len(stores) < len(options.embeddings or []):
        return None
    teachers = {json.dumps(store.meta.get("teacher"), sort_keys=True) for store in stores}
    # Stores of one teacher differ in their folders of .npz files.
    same_teacher = len(teachers) == 1 or all('"npz"' in teacher for teacher in teachers)
    if len({store.width for store in stores}) > 1 or not same_teacher:
        faults.add(f"{', '.join(str(store.folder) for store in stores)} are of different teachers; give those of one")
        return None
    return EmbeddingSource(None, stores, ",".join(options.embeddings or []))


def embed(source: EmbeddingSource, pack: Pack, options: ProbeOptions) -> np.ndarray:
    """Return the embeddings of a pack's clips, float32 (N,E); those of a model are cached in `options.cache`.

    Raises:
        UserError: clips have no embedding, or one that is not finite.
    """
    model = source.model
    embeddings = _read_embeddings(source, pack) if model is None else _compute_embeddings(model, pack, options)
    invalid = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(invalid):
        raise UserError(
            f"{source.name}: the embeddings of {len(invalid)} clips of {pack.manifest} are not finite: "
            f"{some(pack.names[row] for row in invalid)}; check these sounds, and whether the model has diverged"
        )
    return embeddings


def _compute_embeddings(model: AudioTagger, pack: Pack, options: ProbeOptions) -> np.ndarray:
    model_folder = f"{model.name}_{Ensemble([model]).fingerprint()[:12]}"
    pack_folder = f"{pack.manifest.stem}_{sha256(pack.manifest)[:8]}_{compute_fingerprint(pack)[:8]}"
    chunk = f"chunk_{options.chunk_length:g}" + ("" if options.mode == "fp32" else f"_{options.mode}")
    store = store_embeddings(
        model,
        pack,
        Path(options.cache) / "probe" / model_folder / pack_folder / chunk,
        chunk_length=options.chunk_length,
        num_workers=options.num_workers,
        device=options.device,
        mode=options.mode,
    )
    return compute_clip_embeddings(store, pack)


def _read_embeddings(source: EmbeddingSource, pack: Pack) -> np.ndarray:
    """Return the embeddings of a pack from the first store that has all of its clips."""
    faults = Faults(f"the embeddings of {pack.manifest}")
    for store in source.stores:
        with faults.noted():
            return compute_clip_embeddings(store, pack)
    faults.raise_if_any()
    raise AssertionError("a source without a model has a store")
