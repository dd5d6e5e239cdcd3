"""Prepares a store of targets: configuration, pack and teacher, with all faults at once."""

import logging
from pathlib import Path
from typing import Any

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import Faults
from distill.mask_check import check_masks
from distill.published_layout import check_published
from distill.replay import Replay
from distill.sources import compute_reference_lengths
from models.weight_sources import needs_download
from training.config import SoftTargetConfig
from training.embedders import open_embedder
from training.labelled import open_pack
from training.settings import read_config
from training.store_writer import EmbeddingContent, SoftTargetContent, StoreContent, StoreWriter
from training.teacher import load_teacher

logger = logging.getLogger(__name__)


def prepare_store(config_file: str, overrides: dict[str, Any], rank: int = 0, world_size: int = 1) -> StoreWriter:
    """Open everything that a store of targets needs.

    Args:
        config_file: a YAML file, see `logitconfig/`.
        overrides: key → value, nested keys with a dot.
        rank: of this process.
        world_size: number of processes that share the work.

    Raises:
        UserError: all faults of the configuration, the pack and the teacher.
    """
    faults = Faults(config_file)
    config = read_config(SoftTargetConfig, config_file, overrides, faults)
    pack = open_pack(config.train_data, faults, verify=config.verify) if config else None
    content, name = None, ""
    if config:
        with faults.noted():
            replay = Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
            if pack is not None:
                _check_lengths(config, replay, pack, faults, is_main=rank == 0)
                if config.layout == "published":
                    check_published(replay, pack, faults)
        with faults.noted():
            origins = config.weights or config.model or []
            # before a download, which may take long, other faults are reported
            if not (faults.sentences and any(map(needs_download, [origins] if isinstance(origins, str) else origins))):
                content, name = _open_content(config, pack)
    faults.raise_if_any()
    assert config is not None
    assert pack is not None
    assert content is not None
    folder = Path(config.outputpath) / (config.name or name) / Path(config.train_data).stem
    return StoreWriter(config, pack, content, folder / f"chunk_{config.chunk_length:g}", rank, world_size)


def _open_content(config: SoftTargetConfig, pack: Pack | None) -> tuple[StoreContent | None, str]:
    """Return the content of the store and the name of its source; embeddings may need the pack."""
    if config.targets == "embeddings":
        embedder = None if pack is None else open_embedder(config, pack)
        return (None, "") if embedder is None else (EmbeddingContent(embedder, config.part_size), embedder.name)
    assert config.model is not None
    teacher = load_teacher(config.model, config.weights, config.model_args, config.head)
    return SoftTargetContent(teacher, config.topk), teacher.name


def _check_lengths(config: SoftTargetConfig, replay: Replay, pack: Pack, faults: Faults, *, is_main: bool) -> None:
    """Add masks that hide too much of the pack's chunks to `faults`; log a warning about single chunks."""
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length, not config.keep_tails)
    found = check_masks(replay, compute_reference_lengths(chunks))
    if found.fault:
        faults.add(found.fault)
    if found.warning and is_main:
        logger.warning("%s", found.warning)
