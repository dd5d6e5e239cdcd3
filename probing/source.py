"""The source of the embeddings of a probe: a model, or stores of embeddings.

Letters: N clips, E embedding width.
"""

import json
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults, UserError, some
from common.files import sha256
from distill.embeddings import EmbeddingStore, compute_clip_embeddings, read_chunk_embeddings
from distill.sound_check import compute_fingerprint
from models import AudioTagger, Ensemble, load_model
from models.devices import choose_device
from models.head_inputs import MAX_STEPS, HeadInput, count_model_steps, measure_layers
from models.heads import weights_sha256
from models.other_heads import PrototypeHead
from probing.data import ProbeSet
from probing.fit import ChunkRows, Examples, FitSettings
from probing.options import ProbeOptions
from training.store_writer import store_embeddings

logger = logging.getLogger(__name__)

MAX_STORED_BYTES = 3 * 2**30  # of the time steps of all clips of a probe; more are averaged


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


def choose_input(source: EmbeddingSource, clips: ProbeSet, options: ProbeOptions, settings: FitSettings) -> FitSettings:
    """Set what a head takes of a model: layers with their widths, or a number of time steps.

    Raises:
        UserError: the model has no such layers, or no time steps.
    """
    (choice,), model = options.layer_choices, source.model
    if model is None:
        return settings
    if settings.kind == PrototypeHead.kind:
        stride, steps = _choose_steps(model, clips, options.chunk_length)
        return replace(settings, stride=stride, steps=steps)
    if choice == "last":
        return settings
    numbers = range(model.n_layers) if choice == "all" else [int(number) for number in choice.split(",")]
    model.check_layers(list(numbers))
    layers = tuple(sorted({number % model.n_layers for number in numbers}))
    widths = measure_layers(model)
    return replace(settings, layers=layers, widths=tuple(widths[layer] for layer in layers))


def _choose_steps(model: AudioTagger, clips: ProbeSet, seconds: float) -> tuple[int, int]:
    """Return how many adjacent time steps of the model to average, and how many averages to store of each chunk.

    Those of the longest chunk, within `MAX_STEPS` and `MAX_STORED_BYTES`.
    """
    packs = clips.packs.values()
    cut = [Chunks.cut(pack.n_samples, pack.sample_rate, seconds, drop_short_tail=False) for pack in packs]
    longest = max(float(chunks.seconds.max()) for chunks in cut)
    room = MAX_STORED_BYTES // (2 * model.embed_dim * sum(map(len, cut)))
    n_steps = count_model_steps(model, longest)
    stride = -(-n_steps // max(1, min(MAX_STEPS, room)))
    if stride > 1:
        logger.info("%s has %d time steps in %g s: %d at a time are averaged", model.name, n_steps, longest, stride)
    return stride, -(-n_steps // stride)


def embed(
    source: EmbeddingSource, pack: Pack, targets: np.ndarray, options: ProbeOptions, settings: FitSettings
) -> Examples:
    """Return the clips of a pack with their embeddings; those of a model are cached in `options.cache`.

    Args:
        source: of the embeddings.
        pack: N clips.
        targets: float32 (N,C) of 0 and 1.
        options: of the probe.
        settings: of its heads; `layers` and `steps` choose the embeddings.

    Raises:
        UserError: clips have no embedding, or one that is not finite.
    """
    model = source.model
    if settings.steps:
        assert model is not None
        chunks = read_chunk_embeddings(
            _store(model, pack, options, HeadInput(stride=settings.stride, steps=settings.steps)), pack
        )
        starts = np.searchsorted(chunks.clip, np.arange(len(pack) + 1))
        examples = Examples(pack.names, chunks.values, targets, ChunkRows(starts, chunks.shares))
        clips = chunks.clip
    else:
        values = _read_embeddings(source, pack) if model is None else _read_layers(model, pack, options, settings)
        examples, clips = Examples(pack.names, values, targets), np.arange(len(pack))
    invalid = np.unique(clips[~np.isfinite(examples.embeddings).all(axis=1)])
    if len(invalid):
        raise UserError(
            f"{source.name}: the embeddings of {len(invalid)} clips of {pack.manifest} are not finite: "
            f"{some(pack.names[row] for row in invalid)}; check these sounds, and whether the model has diverged"
        )
    return examples


def _read_layers(model: AudioTagger, pack: Pack, options: ProbeOptions, settings: FitSettings) -> np.ndarray:
    """Return the clip embeddings of a model (N,E), or those of the chosen layers, from a store that has all layers."""
    if not settings.layers:
        return compute_clip_embeddings(_store(model, pack, options), pack)
    store = _store(model, pack, options, HeadInput(layers=tuple(range(model.n_layers))))
    parts = np.split(compute_clip_embeddings(store, pack), np.cumsum(measure_layers(model))[:-1], axis=1)
    return np.concatenate([parts[layer] for layer in settings.layers], axis=1)


def _store(
    model: AudioTagger, pack: Pack, options: ProbeOptions, head_input: HeadInput | None = None
) -> EmbeddingStore:
    """Store what heads take of a model in the cache, unless it is there."""
    model_folder = f"{model.name}_{Ensemble([model]).fingerprint()[:12]}"
    pack_folder = f"{pack.manifest.stem}_{sha256(pack.manifest)[:8]}_{compute_fingerprint(pack)[:8]}"
    chunk = f"chunk_{options.chunk_length:g}" + ("" if options.mode == "fp32" else f"_{options.mode}")
    if head_input is not None:
        chunk += f"_steps_{head_input.steps}_{head_input.stride}" if head_input.stride else "_layers"
    return store_embeddings(
        model,
        pack,
        Path(options.cache) / "probe" / model_folder / pack_folder / chunk,
        head_input,
        chunk_length=options.chunk_length,
        num_workers=options.num_workers,
        device=options.device,
        mode=options.mode,
    )


def _read_embeddings(source: EmbeddingSource, pack: Pack) -> np.ndarray:
    """Return the embeddings of a pack from the first store that has all of its clips."""
    faults = Faults(f"the embeddings of {pack.manifest}")
    for store in source.stores:
        with faults.noted():
            return compute_clip_embeddings(store, pack)
    faults.raise_if_any()
    raise AssertionError("a source without a model has a store")
