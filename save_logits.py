"""Save a teacher's soft targets or embeddings for a pack.

    python save_logits.py CONFIG.yaml [--key value ...]
    torchrun --nproc_per_node N save_logits.py CONFIG.yaml [--key value ...]
    python save_logits.py CONFIG.yaml -m MODEL --head NAME

Any key of the configuration can be overridden. The folder is printed at the end; the same command completes a store
that was interrupted.
"""

import logging
import os
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from audio.cutting import Chunks
from audio.dataset import Pack
from common.commands import run_commands
from common.errors import Faults, print_user_errors
from distill.mask_check import check_masks
from distill.published_layout import check_published
from distill.replay import Replay
from distill.sources import reference_lengths
from training.config import SoftTargetConfig
from training.embedders import open_embedder
from training.labelled import open_pack
from training.settings import read_config
from training.store_writer import EmbeddingContent, SoftTargetContent, StoreContent, StoreWriter
from training.teacher import load_teacher

logger = logging.getLogger(__name__)


def open_content(config: SoftTargetConfig, pack: Pack | None) -> tuple[StoreContent | None, str]:
    """Return the content of the store and the name of its source; embeddings may need the pack."""
    if config.targets == "embeddings":
        embedder = None if pack is None else open_embedder(config, pack)
        return (None, "") if embedder is None else (EmbeddingContent(embedder, config.part_size), embedder.name)
    assert config.model is not None
    teacher = load_teacher(config.model, config.weights, config.model_args, config.head)
    return SoftTargetContent(teacher, config.topk), teacher.name


def store_folder(config: SoftTargetConfig, name: str) -> Path:
    """Return outputpath/NAMES/TSV_STEM/chunk_SECONDS, as published."""
    return (
        Path(config.outputpath)
        / (config.name or name)
        / Path(config.train_data).stem
        / f"chunk_{config.chunk_length:g}"
    )


def check_lengths(config: SoftTargetConfig, replay: Replay, pack: Pack, faults: Faults) -> None:
    """Add masks that hide too much of the pack's chunks to `faults`; log a warning about single chunks."""
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, config.chunk_length, not config.keep_tails)
    found = check_masks(replay, reference_lengths(chunks))
    if found.fault:
        faults.add(found.fault)
    if found.warning and int(os.environ.get("RANK", 0)) == 0:
        logger.warning("%s", found.warning)


@print_user_errors
def save_logits(config_file: str, *, m: str | None = None, **overrides: Any) -> None:
    """Save soft targets or embeddings.

    Args:
        config_file: a YAML file, see `logitconfig/`.
        m: short for --model.
        overrides: any key of the configuration; nested ones with a dot, --model_args.token_merging 8.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides |= {} if m is None else {"model": m}
    faults = Faults(config_file)
    config = read_config(SoftTargetConfig, config_file, overrides, faults)
    pack = open_pack(config.train_data, faults) if config else None
    content, name = None, ""
    if config:
        with faults.noted():
            replay = Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
            if pack is not None:
                check_lengths(config, replay, pack, faults)
                if config.layout == "published":
                    check_published(replay, pack, faults)
        with faults.noted():
            content, name = open_content(config, pack)
    faults.raise_if_any()
    if config is None or pack is None or content is None:
        raise AssertionError("a part is missing, and no fault was noted")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = StoreWriter(config, pack, content, store_folder(config, name), rank, world_size).save()
    if rank == 0:
        key = "embeddingspath" if config.targets == "embeddings" else "logitspath"
        print(f"{content.store.what}: {folder}\nnext: python run.py train CONFIG.yaml --{key} {folder}")


if __name__ == "__main__":
    run_commands(save_logits, keys={"": SoftTargetConfig})
