"""The embeddings of a whole pack, stored."""

from pathlib import Path
from typing import Any

from audio.dataset import Pack
from distill.embeddings import EmbeddingStore
from models import AudioTagger, Ensemble
from training.config import SoftTargetConfig
from training.store_writer import EmbeddingContent, StoreWriter


def store_embeddings(
    model: AudioTagger,
    pack: Pack,
    folder: Path,
    *,
    chunk_length: float = 10.0,
    batch_size: int = 32,
    num_workers: int = 4,
    device: str = "auto",
    mode: str | None = None,
) -> EmbeddingStore:
    """Store a model's embeddings of all of a pack's sound, or what is left of them to do; return the store.

    Args:
        model: whose.
        pack: the clips.
        folder: to write into.
        chunk_length: seconds.
        batch_size: chunks at once.
        num_workers: loader processes.
        device: auto, cpu or cuda.
        mode: see `training.config.Mode`.

    Raises:
        UserError: the folder holds embeddings of another model, pack or setting.
    """
    settings: dict[str, Any] = {"train_data": str(pack.manifest), "model": model.name, "targets": "embeddings"}
    settings["keep_tails"] = True
    settings |= {"chunk_length": chunk_length, "batch_size": batch_size, "num_workers": num_workers}
    settings |= {"device": device, "mode": mode}
    config = SoftTargetConfig.model_validate(settings)
    asked = EmbeddingContent(Ensemble([model]))
    return EmbeddingStore(StoreWriter(config, pack, asked, folder).save())
