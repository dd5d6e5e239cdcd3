"""The front-end of S-SONDO's students: logarithms of mel bands of equal area on Slaney's scale.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.frontends import FrontEnd
from models.mel_scales import SLANEY, band_edges, equal_area_triangles
from models.settings import Frames, MelSettings


class SlaneyMel(FrontEnd):
    """S-SONDO's front-end: ln(power + 1e-3) of mel bands of equal area, periodic window, frames within the clip.

    Its tensors are not part of a checkpoint, as published.

    Args:
        min_frames: shorter clips are zero-padded to this many frames.
        **settings: see `models.settings.MelSettings`, by default `defaults`.
    """

    FLOOR = 1e-3
    defaults = MelSettings(
        sample_rate=32000, n_mels=128, n_fft=1024, win_size=1024, hop_size=512, f_min=50.0, f_max=16000.0
    )

    def __init__(self, *, min_frames: Frames = 1, **settings: Any) -> None:
        super().__init__(settings, center=False, min_frames=min_frames)
        weights = equal_area_triangles(self._bins_hz, self.mel_edges_hz)
        self._register_filters(torch.hann_window(self.win_size), weights.float())

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,), computed in single precision as in the published code."""
        return SLANEY.to_hertz(band_edges(SLANEY, self.f_min, self.f_max, self.n_mels, torch.float32)).double()

    def power_db_to_value(self, db: float) -> float:
        """ln(10^(db/10) + 1e-3)."""
        return math.log(10 ** (db / 10) + self.FLOOR)

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to a logarithm with a floor."""
        return (mel + self.FLOOR).log()
