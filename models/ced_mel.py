"""The front-end of CED and ResNet-10: decibels of HTK mel bands.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.frontends import SILENCE_DB, FrontEnd
from models.mel_scales import HTK, triangles
from models.settings import Frames, MelSettings


class _Buffers(nn.Module):
    """A module that consists of named buffers."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


class CedMel(FrontEnd):
    """CED's front-end: HTK mel power in decibels, at most `TOP_DB` below the clip's peak.

    Window and filters have the names of published checkpoints (`0.spectrogram.window`, `0.mel_scale.fb`).

    Args:
        center: whether frames are centred, with reflected ends.
        min_frames: shorter clips are zero-padded to this many frames.
        **settings: see `models.settings.MelSettings`, by default `defaults`; the window is periodic.
    """

    TOP_DB = 120.0
    scale = HTK
    defaults = MelSettings(sample_rate=16000, n_mels=64, n_fft=512, win_size=512, hop_size=160, f_min=0.0, f_max=8000.0)

    def __init__(self, *, center: bool = True, min_frames: Frames = 1, **settings: Any) -> None:
        super().__init__(settings, center=center, min_frames=min_frames)
        bins = torch.linspace(0, self.sample_rate / 2, self.n_fft // 2 + 1, dtype=torch.float64)
        stage = nn.Module()
        stage.spectrogram = _Buffers(window=torch.hann_window(self.win_size))
        stage.mel_scale = _Buffers(fb=triangles(bins, self.mel_edges_hz).float())
        self.add_module("0", stage)

    @property
    def window(self) -> Tensor:
        """Analysis window (win_size,)."""
        return cast(Tensor, self.get_buffer("0.spectrogram.window"))

    @property
    def mel_weights(self) -> Tensor:
        """Mel filters (n_fft/2 + 1, F)."""
        return self._apply_band_limit(cast(Tensor, self.get_buffer("0.mel_scale.fb")))  # loaded from checkpoints

    def power_db_to_value(self, db: float) -> float:
        """Return `db`: the scale of this front-end is decibels."""
        return db

    def _compute_silence(self, mel: Tensor) -> Tensor:
        """Return the lowest decibels of each clip, (B,1,1)."""
        kept = mel.masked_fill(self.get_buffer("_kept_bands")[:, None] == 0, SILENCE_DB)
        return (kept.amax((1, 2), keepdim=True) - self.TOP_DB).clamp(min=SILENCE_DB)

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to decibels."""
        db = 10 * mel.clamp(min=10 ** (SILENCE_DB / 10)).log10()
        valid = db if is_padding is None else db.masked_fill(is_padding, -math.inf)
        return torch.maximum(db, valid.amax((1, 2), keepdim=True) - self.TOP_DB)
