"""Every model of this project as an encoder of X-ARES, which rates audio encoders on tasks from speech to music.

    pip install xares
    CED_MODEL=experiments/mine/latest python -m xares.run scripts/xares_encoder.py TASK.py

`CED_MODEL` is whatever `-m` takes: a name with published weights, a checkpoint, a run's folder, a URL. X-ARES fetches
the data of its tasks itself, and keeps what it computes below `env/` by the name of the encoder, which has that of the
model in it.

Interface: https://github.com/jimbozhang/xares, version 0.1.3.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

import os
import re

import torch
from torch import Tensor, nn

import models
from common.errors import UserError
from models.base import AudioTagger
from models.step_times import find_step_seconds

MODEL = "CED_MODEL"  # environment variable; X-ARES passes no arguments


class TaggerEncoder(nn.Module):
    """A model that embeds time steps, for X-ARES.

    Args:
        model: a model, or whatever `-m` takes; by default the environment's `CED_MODEL`.

    Attributes:
        sampling_rate: of the waveforms, in hertz.
        output_dim: D.
        hop_size_in_ms: milliseconds from one step to the next.

    Raises:
        UserError: no model is given, or it cannot be loaded.
    """

    def __init__(self, model: AudioTagger | str | None = None) -> None:
        super().__init__()
        source = os.environ.get(MODEL) if model is None else model
        if not source:
            raise UserError(f"{MODEL} is not set: give the model, as in {MODEL}=ced_mini python -m xares.run ...")
        self.model = source if isinstance(source, AudioTagger) else models.load_tagger(source)
        self.model.eval()
        self.sampling_rate = self.model.sample_rate
        self.output_dim = self.model.embed_dim
        self.hop_size_in_ms = 1000 * find_step_seconds(self.model)
        # X-ARES keeps its results by the name of the class: those of several models must not be taken for each other.
        name = re.sub(r"\W+", "_", self.model.full_name if isinstance(source, AudioTagger) else source)
        self.__class__ = type(f"{name}_{type(self).__name__}", (type(self),), {})

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Embed time steps of waveforms at `sampling_rate`: (B,S) -> (B,T,D)."""
        return self.model.embed_waveform(audio.float())[1]
