"""HEAR's common API for every model of this project: embeddings of clips and of time steps.

    from scripts.hear_api import get_scene_embeddings, get_timestamp_embeddings, load_model

    model = load_model("experiments/mine/latest")  # a name, a checkpoint, a run, a folder
    clips = get_scene_embeddings(audio, model)  # audio (n_sounds, n_samples) in [-1, 1] at model.sample_rate
    steps, milliseconds = get_timestamp_embeddings(audio, model)

From another folder, or for HEAR's evaluation, `PYTHONPATH=/path/to/this/project/scripts` and the module `hear_api`.

Interface: https://hearbenchmark.com/hear-api.html; Turian et al., "HEAR: Holistic evaluation of audio representations",
NeurIPS 2021 competition track, PMLR 176.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from typing import Any, cast

import torch
from torch import Tensor

import models
from models.base import AudioTagger
from models.step_times import find_step_centers


def load_model(model_file_path: str, model_hub: str = "") -> AudioTagger:
    """Load a model, in evaluation mode, with the attributes that HEAR reads.

    Args:
        model_file_path: whatever `-m` takes: a name with published weights, a checkpoint, a run's folder, a URL.
        model_hub: name of the model, for a file of weights that does not name it.

    Returns:
        The model, with `sample_rate` (Hz), `scene_embedding_size` and `timestamp_embedding_size`.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    if model_hub and model_file_path:
        model = models.load_tagger(model_hub, weights=model_file_path)
    else:
        model = models.load_tagger(model_file_path or model_hub)
    attributes = cast(Any, model)
    attributes.scene_embedding_size = attributes.timestamp_embedding_size = model.embed_dim
    return model


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: AudioTagger) -> Tensor:
    """Embed clips.

    Args:
        audio: (n_sounds, n_samples) in [-1, 1] at the model's rate.
        model: see `load_model`.

    Returns:
        (n_sounds, scene_embedding_size) float32.

    Raises:
        UserError: another type or shape, or samples that are not finite.
    """
    return model.embed(audio)[0].float()


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: AudioTagger) -> tuple[Tensor, Tensor]:
    """Embed time steps.

    Args:
        audio: (n_sounds, n_samples) in [-1, 1] at the model's rate.
        model: see `load_model`.

    Returns:
        (n_sounds, n_timestamps, timestamp_embedding_size) float32, and the centre of each step in milliseconds
        (n_sounds, n_timestamps), see `models.step_times.find_step_centers`.

    Raises:
        UserError: another type or shape, or samples that are not finite.
    """
    steps = model.embed(audio)[1].float()
    milliseconds = 1000 * find_step_centers(model, audio.shape[1]).to(steps.device)
    return steps, milliseconds.expand(len(steps), -1).contiguous()
