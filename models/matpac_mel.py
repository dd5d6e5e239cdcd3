"""The front-end of MATPAC and M2D: standardised logarithms of mel bands of equal area on Slaney's scale.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.frontends import FrontEnd
from models.mel_scales import SLANEY, equal_area_triangles
from models.settings import MelSettings, Number, Positive

Value = TypeVar("Value", float, Tensor)


class MatpacMel(FrontEnd):
    """MATPAC's front-end: (ln(power + float32's epsilon) - mean) / std, periodic window.

    Its tensors are not part of a checkpoint.

    Args:
        mean: of the logarithms over a data set, by default MATPAC's for AudioSet.
        std: standard deviation of the logarithms.
        center: whether frames are centred, with reflected ends, as M2D has them. MATPAC's lie within the clip.
        **settings: see `models.settings.MelSettings`, by default `defaults`.
    """

    OFFSET = torch.finfo(torch.float32).eps
    scale = SLANEY
    defaults = MelSettings(
        sample_rate=16000, n_mels=80, n_fft=400, win_size=400, hop_size=160, f_min=50.0, f_max=8000.0
    )

    def __init__(self, *, mean: Number = -7.056, std: Positive = 4.193, center: bool = False, **settings: Any) -> None:
        super().__init__(settings, center=center)
        self.mean, self.std = mean, std
        weights = equal_area_triangles(self._bins_hz, self.mel_edges_hz)
        self._register_filters(torch.hann_window(self.win_size), weights.float())

    def power_db_to_value(self, db: float) -> float:
        """(ln(10^(db/10) + OFFSET) - mean) / std."""
        return self._standardise(math.log(10 ** (db / 10) + self.OFFSET))

    def _standardise(self, logarithm: Value) -> Value:
        return (logarithm - self.mean) / self.std

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to standardised natural logarithms."""
        return self._standardise((mel + self.OFFSET).log())
