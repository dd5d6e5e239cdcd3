"""A small model for all of tagging."""

from pathlib import Path

import pytest
import torch

from models import create_model, load_model, save_checkpoint
from tagging.engines import TorchEngine

LABELS = ["Speech", "Chirp, tweet", "Bell", "Siren", "Rain", "Rumble"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of pico whose probabilities differ from window to window."""
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=len(LABELS), labels=LABELS).eval()
    for parameter in model.parameters():
        parameter.data *= 1.5  # else random weights say 0.5 to everything
    save_checkpoint(path, model, {})
    return path


@pytest.fixture(scope="session")
def pico(checkpoint: Path) -> TorchEngine:
    """The checkpoint's engine, with two threads."""
    return TorchEngine(load_model(checkpoint), n_threads=2)
