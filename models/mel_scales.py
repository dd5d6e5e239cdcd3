"""Mel scales, and triangular filters that are evenly spaced on them.

Letters: F mel bands, N frequencies.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LINEAR_HERTZ = 200 / 3  # hertz per mel below the corner, after Slaney
_CORNER_HERTZ = 1000.0
_CORNER_MEL = _CORNER_HERTZ / _LINEAR_HERTZ
_LOG_STEP = math.log(6.4) / 27  # log of the ratio of frequencies one mel apart, above the corner


class MelScale(NamedTuple):
    """Conversions of a mel scale.

    Attributes:
        to_mel: hertz to mel.
        to_hertz: mel to hertz.
    """

    to_mel: Callable[[Tensor], Tensor]
    to_hertz: Callable[[Tensor], Tensor]


def slaney_mel(hertz: Tensor) -> Tensor:
    """Convert hertz to mel as in Slaney's Auditory Toolbox: linear up to 1 kHz, logarithmic above."""
    above = _CORNER_MEL + (hertz.clamp(min=_CORNER_HERTZ) / _CORNER_HERTZ).log() / _LOG_STEP
    return torch.where(hertz < _CORNER_HERTZ, hertz / _LINEAR_HERTZ, above)


def slaney_hertz(mel: Tensor) -> Tensor:
    """Convert Slaney's mel to hertz."""
    above = _CORNER_HERTZ * ((mel - _CORNER_MEL) * _LOG_STEP).exp()
    return torch.where(mel < _CORNER_MEL, mel * _LINEAR_HERTZ, above)


HTK = MelScale(lambda hertz: 2595 * torch.log10(1 + hertz / 700), lambda mel: 700 * (10 ** (mel / 2595) - 1))
KALDI = MelScale(lambda hertz: 1127 * torch.log(1 + hertz / 700), lambda mel: 700 * (torch.exp(mel / 1127) - 1))
SLANEY = MelScale(slaney_mel, slaney_hertz)


def band_edges(scale: MelScale, f_min: float, f_max: float, n_mels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the n_mels + 2 corners of the filters in mel, evenly spaced from `f_min` to `f_max` hertz."""
    low, high = scale.to_mel(torch.tensor([f_min, f_max], dtype=torch.float64)).tolist()
    return torch.linspace(low, high, n_mels + 2, dtype=dtype)


def triangles(bins: Tensor, edges: Tensor) -> Tensor:
    """Compute triangular filters: bins (N,), edges (F+2,) on the same axis -> weights (N,F), peak 1 at edges[1:-1]."""
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


def equal_area_triangles(bins: Tensor, edges: Tensor) -> Tensor:
    """Compute triangular filters of area 1: bins (N,), edges (F+2,) in hertz -> weights (N,F), as Slaney's are."""
    return triangles(bins, edges) * 2 / (edges[2:] - edges[:-2])
