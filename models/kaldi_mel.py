"""Kaldi's log mel filter bank, as AST and PSLA hear it.

Facts: Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011; `torchaudio.compliance.kaldi.fbank` with
`window_type="hanning"`, `htk_compat=True`, `use_energy=False`, `dither=0`; Gong, Chung, Glass, "AST: Audio Spectrogram
Transformer", Interspeech 2021, for the normalisation.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.frontends import Count, FrontEnd, band_edges, kaldi_hertz, kaldi_mel, triangles


class KaldiMel(FrontEnd):
    """Kaldi's front-end: (ln(mel power, at least `FLOOR`) - mean) / (2 std).

    Frame t is the samples t hop_size to t hop_size + win_size, and only whole frames count, so a clip of S samples has
    (S - win_size) // hop_size + 1 of them. Every frame loses its mean and is pre-emphasised by itself.
    Its tensors are no part of a checkpoint, as published.

    Args:
        sample_rate: hertz.
        n_mels: mel bands F.
        n_fft: samples of a Fourier transform; Kaldi takes the next power of two from `win_size` on.
        win_size: samples of a frame and of its (symmetric) Hann window.
        hop_size: samples between frames.
        f_min: hertz.
        f_max: hertz, None for half the sample rate.
        mean: of the logarithms over a data set, by default AudioSet's as AST has it.
        std: standard deviation of the logarithms.
    """

    PREEMPHASIS = 0.97
    FLOOR = torch.finfo(torch.float32).eps

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_mels: int = 128,
        n_fft: int = 512,
        win_size: int = 400,
        hop_size: int = 160,
        f_min: float = 20.0,
        f_max: float | None = None,
        mean: float = -4.2677393,
        std: float = 4.5689974,
    ) -> None:
        f_max = sample_rate / 2 if f_max is None else f_max
        super().__init__(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
            center=False,
            min_samples=win_size,
        )
        self.mean, self.std = mean, std
        self._left = (n_fft - win_size) // 2  # the window lies in the middle of the transform, as everywhere here
        bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
        weights = triangles(kaldi_mel(bins), band_edges(kaldi_mel, f_min, f_max, n_mels))
        self._keep(torch.hann_window(win_size, periodic=False), weights.float())

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,)."""
        return kaldi_hertz(band_edges(kaldi_mel, self.f_min, self.f_max, self.n_mels))

    @property
    def zero_value(self) -> float:
        """What a 0 put into the logarithms reads after normalisation: the padding of short clips in published AST."""
        return self._normalised(0.0)

    def power_db_to_value(self, db: float) -> float:
        """(ln(max(10^(db/10), FLOOR)) - mean) / (2 std)."""
        return self._normalised(math.log(max(10 ** (db / 10), self.FLOOR)))

    def _normalised(self, logarithm: float) -> float:
        return (logarithm - self.mean) / (2 * self.std)

    def _usable(self, n_samples: Count) -> Count:
        return super()._usable(n_samples) + (self.n_fft - self.win_size)

    def filtered(self, waveform: Tensor) -> Tensor:
        """Extend both ends with what transforms have around their window, (B,S) -> (B, S + n_fft - win_size)."""
        return F.pad(waveform, (self._left, self.n_fft - self.win_size - self._left))

    def conditioned(self, frames: Tensor) -> Tensor:
        """Take its mean from every frame and pre-emphasise it, (B,T,n_fft) -> (B,T,n_fft).

        Kaldi puts a frame's first sample in place of the one before it; the window is 0 there, as it is on all that
        lies around it.
        """
        own = frames.narrow(2, self._left, self.win_size)
        frames = frames - own.mean(2, keepdim=True)
        return frames - self.PREEMPHASIS * F.pad(frames, (1, -1))

    def compressed(self, mel: Tensor, alien: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to normalised natural logarithms."""
        return (mel.clamp(min=self.FLOOR).log() - self.mean) / (2 * self.std)

    def _mel_power(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        frames = self.conditioned(waveform.unfold(1, self.n_fft, self.hop_size))  # (B,T,n_fft)
        window = F.pad(self.window, (self._left, self.n_fft - self.win_size - self._left))
        spectrum = torch.fft.rfft(frames * window)
        real, imag = spectrum.real, spectrum.imag
        power = torch.addcmul(real.square(), imag, imag)  # (B, T, n_fft/2 + 1)
        return self.mel_weights.T @ power.transpose(1, 2)
