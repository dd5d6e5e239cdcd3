"""Where the embeddings of a probe come from: a model that is asked once, or stores of what some teacher said.

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
from distill.embeddings import EmbeddingStore, clip_embeddings
from distill.sound_check import fingerprint
from models import AudioTagger, Ensemble, load_model
from models.devices import choose_device
from models.heads import weights_sha256
from probing.options import ProbeOptions
from training.store_writer import store_embeddings


@dataclass(frozen=True)
class Source:
    """Where embeddings come from.

    Attributes:
        model: computes them; None for stored ones.
        stores: stored ones, of one teacher.
        name: as it was given.
    """

    model: AudioTagger | None
    stores: list[EmbeddingStore]
    name: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the embeddings, as plain values."""
        if self.model is not None:
            facts = {"model": self.model.name, "model_args": self.model.arguments}
            return json.loads(json.dumps(facts | {"weights_sha256": weights_sha256(self.model)}))
        kept = ("teacher", "weights_sha256", "mode")
        told: list[dict[str, Any]] = [
            {key: store.meta.get(key) for key in kept} | {"seconds": store.chunk_seconds} for store in self.stores
        ]
        return {"stores": told, "weights_sha256": told[0]["weights_sha256"]}

    @property
    def given(self) -> str | None:
        """What the model was asked for by: a name, a file or a folder; None where it is no single model of ours."""
        if self.model is not None:
            return self.name
        return self.stores[0].meta.get("config", {}).get("model") if self.model_name else None

    @property
    def model_name(self) -> str | None:
        """The model's name in the registry; None where the teacher is no single model of ours."""
        if self.model is not None:
            return self.model.name
        match self.stores[0].meta.get("teacher"):
            case [{"model": str(name)}]:
                return name
        return None


def open_source(options: ProbeOptions, faults: Faults) -> Source | None:
    """Load the model of a probe, or open its stores; what is wrong with them is noted."""
    with faults.noted():
        if options.model is not None:
            device = choose_device(options.device)
            return Source(load_model(options.model, weights=options.weights, device=device), [], options.model)
    stores = []
    for folder in options.embeddings or []:
        with faults.noted():
            stores.append(EmbeddingStore(folder))
    if options.model is not None or not stores or len(stores) < len(options.embeddings or []):
        return None
    told = {json.dumps(store.meta.get("teacher"), sort_keys=True) for store in stores}
    # Folders of .npz files differ from set to set where the teacher is the same.
    alike = len(told) == 1 or all('"npz"' in teacher for teacher in told)
    if len({store.width for store in stores}) > 1 or not alike:
        faults.add(f"{', '.join(str(store.folder) for store in stores)} are of different teachers; give one's alone")
        return None
    return Source(None, stores, ",".join(options.embeddings or []))


def embed(source: Source, pack: Pack, options: ProbeOptions) -> np.ndarray:
    """Return the embeddings of a pack's clips, float32 (N,E); those of a model are kept in `options.cache`.

    Raises:
        UserError: clips without an embedding, or whose embedding is no number.
    """
    found = clip_embeddings(_asked(source.model, pack, options), pack) if source.model else _stored(source, pack)
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise UserError(
            f"{source.name}: the embeddings of {len(bad)} clips of {pack.manifest} are no numbers: "
            f"{some(pack.names[row] for row in bad)}; look at these sounds, or at a model that diverged"
        )
    return found


def _asked(model: AudioTagger, pack: Pack, options: ProbeOptions) -> EmbeddingStore:
    maker = f"{model.name}_{Ensemble([model]).fingerprint()[:12]}"
    list_of_clips = f"{pack.manifest.stem}_{sha256(pack.manifest)[:8]}_{fingerprint(pack)[:8]}"
    chunk = f"chunk_{options.chunk_length:g}" + ("" if options.mode == "fp32" else f"_{options.mode}")
    return store_embeddings(
        model,
        pack,
        Path(options.cache) / "probe" / maker / list_of_clips / chunk,
        chunk_length=options.chunk_length,
        num_workers=options.num_workers,
        device=options.device,
        mode=options.mode,
    )


def _stored(source: Source, pack: Pack) -> np.ndarray:
    """Return the embeddings of a pack from the first store that has all of its clips."""
    faults = Faults(f"the embeddings of {pack.manifest}")
    for store in source.stores:
        with faults.noted():
            return clip_embeddings(store, pack)
    faults.raise_if_any()
    raise AssertionError("a source has a model or a store")
