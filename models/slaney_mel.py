"""The front-end of S-SONDO's students: mel bands after Slaney's Auditory Toolbox, of equal area, logarithmic.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math

import torch
from torch import Tensor

from models.frontends import FrontEnd, triangles

_LINEAR_HERTZ = 200 / 3  # hertz a mel below the corner
_CORNER_HERTZ = 1000.0
_CORNER_MEL = _CORNER_HERTZ / _LINEAR_HERTZ
_LOG_STEP = math.log(6.4) / 27  # log of the ratio of frequencies one mel apart, above the corner


def slaney_mel(hertz: Tensor) -> Tensor:
    """Hertz to mel: linear up to 1 kHz, logarithmic above."""
    above = _CORNER_MEL + (hertz.clamp(min=_CORNER_HERTZ) / _CORNER_HERTZ).log() / _LOG_STEP
    return torch.where(hertz < _CORNER_HERTZ, hertz / _LINEAR_HERTZ, above)


def slaney_hertz(mel: Tensor) -> Tensor:
    """Mel to hertz."""
    above = _CORNER_HERTZ * ((mel - _CORNER_MEL) * _LOG_STEP).exp()
    return torch.where(mel < _CORNER_MEL, mel * _LINEAR_HERTZ, above)


class SlaneyMel(FrontEnd):
    """S-SONDO's front-end: ln(power + 1e-3) of mel bands of equal area, frames that lie within the clip.

    Its tensors are no part of a checkpoint, as published.

    Args:
        sample_rate: hertz.
        n_mels: mel bands F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the (periodic) Hann window.
        hop_size: samples between frames.
        f_min: hertz.
        f_max: hertz.
        min_frames: shorter clips are extended with zeros until they have this many frames.
    """

    FLOOR = 1e-3

    def __init__(
        self,
        *,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_fft: int = 1024,
        win_size: int = 1024,
        hop_size: int = 512,
        f_min: float = 50.0,
        f_max: float = 16000.0,
        min_frames: int = 1,
    ) -> None:
        super().__init__(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
            center=False,
            min_samples=n_fft + (min_frames - 1) * hop_size,
        )
        self.min_frames = min_frames
        bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
        edges = self.mel_edges_hz
        weights = triangles(bins, edges) * 2 / (edges[2:] - edges[:-2])
        self._keep(torch.hann_window(win_size), weights.float())

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,): single precision, as the published networks had them."""
        low, high = slaney_mel(torch.tensor([self.f_min, self.f_max], dtype=torch.float64)).tolist()
        return slaney_hertz(torch.linspace(low, high, self.n_mels + 2, dtype=torch.float32)).double()

    def power_db_to_value(self, db: float) -> float:
        """ln(10^(db/10) + 1e-3)."""
        return math.log(10 ** (db / 10) + self.FLOOR)

    def compressed(self, mel: Tensor, alien: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to a logarithm with a floor."""
        return (mel + self.FLOOR).log()
