"""Kaldi's log mel filter bank, the front-end of AST and PSLA.

References: Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011; `torchaudio.compliance.kaldi.fbank` with
`window_type="hanning"`, `htk_compat=True`, `use_energy=False`, `dither=0`; Gong, Chung, Glass, "AST: Audio Spectrogram
Transformer", Interspeech 2021, for the normalisation.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.frontends import FrontEnd
from models.mel_scales import KALDI, band_edges, triangles
from models.settings import MelSettings, Number, Positive

Value = TypeVar("Value", float, Tensor)


class KaldiMel(FrontEnd):
    """Kaldi's front-end: (ln(mel power, at least `FLOOR`) - mean) / (2 std).

    Frame t consists of the samples t hop_size to t hop_size + win_size; a clip of S samples has
    (S - win_size) // hop_size + 1 of them. The mean of every frame is subtracted, and it is pre-emphasised by itself.
    Tensors are not part of a checkpoint, as published.

    Args:
        mean: of the logarithms over a data set, by default AST's for AudioSet.
        std: standard deviation of the logarithms.
        **settings: see `models.settings.MelSettings`, by default `defaults`. A frame and its symmetric window have
            `win_size` samples; Kaldi sets `n_fft` to the next power of two.
    """

    PREEMPHASIS = 0.97
    FLOOR = torch.finfo(torch.float32).eps
    scale = KALDI
    defaults = MelSettings(sample_rate=16000, n_mels=128, n_fft=512, win_size=400, hop_size=160, f_min=20.0, f_max=None)

    def __init__(self, *, mean: Number = -4.2677393, std: Positive = 4.5689974, **settings: Any) -> None:
        super().__init__(settings, center=False)
        self.mean, self.std = mean, std
        self.n_added = self.n_fft - self.win_size
        self._left = self.n_added // 2  # the window is centred in the transform, as in all front-ends here
        edges = band_edges(KALDI, self.f_min, self.f_max, self.n_mels)
        weights = triangles(KALDI.to_mel(self._bins_hz), edges)
        self._register_filters(torch.hann_window(self.win_size, periodic=False), weights.float())

    @property
    def zero_value(self) -> float:
        """Value of a logarithm of 0 after normalisation, with which published AST pads short clips."""
        return self._normalise_value(0.0)

    def power_db_to_value(self, db: float) -> float:
        """(ln(max(10^(db/10), FLOOR)) - mean) / (2 std)."""
        return self._normalise_value(math.log(max(10 ** (db / 10), self.FLOOR)))

    def _normalise_value(self, logarithm: Value) -> Value:
        return (logarithm - self.mean) / (2 * self.std)

    def filter_waveform(self, waveform: Tensor) -> Tensor:
        """Zero-pad both ends by the margins of the window in the transform, (B,S) -> (B, S + n_fft - win_size)."""
        return F.pad(waveform, (self._left, self.n_added - self._left))

    def condition_frames(self, frames: Tensor) -> Tensor:
        """Subtract the mean of every frame and pre-emphasise it, (B,T,n_fft) -> (B,T,n_fft).

        Kaldi pre-emphasises the first sample of a frame with itself; the window is 0 there and in the margins.
        """
        mean = frames.narrow(2, self._left, self.win_size).mean(2, keepdim=True)
        frames = frames - mean
        return frames - self.PREEMPHASIS * F.pad(frames, (1, -1))

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to normalised natural logarithms."""
        return self._normalise_value(mel.clamp(min=self.FLOOR).log())

    def _mel_power(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        frames = self.condition_frames(waveform.unfold(1, self.n_fft, self.hop_size))  # (B,T,n_fft)
        window = F.pad(self.window, (self._left, self.n_added - self._left))
        spectrum = torch.fft.rfft(frames * window)
        real, imag = spectrum.real, spectrum.imag
        power = torch.addcmul(real.square(), imag, imag)  # (B, T, n_fft/2 + 1)
        return self.mel_weights.T @ power.transpose(1, 2)
