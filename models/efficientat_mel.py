"""The front-end of EfficientAT and PaSST: logarithms of Kaldi's mel bands, with random edges in training.

Letters: B batch, S samples, F mel bands, T frames.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from models.frontends import FrontEnd
from models.mel_scales import KALDI, band_edges, triangles
from models.settings import Frames, MelSettings


class EfficientAtMel(FrontEnd):
    """EfficientAT's front-end: pre-emphasis, Kaldi-style mel bands, (ln(power + 1e-5) + 4.5) / 5.

    Its tensors are not part of a checkpoint, as published.

    Args:
        min_frames: shorter clips are zero-padded to this many frames.
        **settings: see `models.settings.MelSettings`, by default `defaults`; the window is symmetric.
    """

    PREEMPHASIS = 0.97
    scale = KALDI
    n_added = -1
    defaults = MelSettings(
        sample_rate=32000, n_mels=128, n_fft=1024, win_size=800, hop_size=320, f_min=0.0, f_max=15000.0
    )

    def __init__(self, *, min_frames: Frames = 1, **settings: Any) -> None:
        super().__init__(settings, center=True, min_frames=min_frames)
        edges = band_edges(KALDI, self.f_min, self.f_max, self.n_mels)
        weights = triangles(KALDI.to_mel(self._bins_hz), edges)
        self._register_filters(torch.hann_window(self.win_size, periodic=False), weights.float())
        self._ranges = (1, 1)

    def vary_edges(self, low_range: int, high_range: int) -> None:
        """Draw the band edges at random for each training batch, as published; evaluation uses `f_min` and `f_max`.

        Args:
            low_range: `f_min` is raised by a random whole number of hertz below this; 10 in published training, 1 for
                none.
            high_range: `f_max` is moved to one of this many whole hertz around it; 2000 in published training, 1 for
                none.

        Raises:
            UserError: a range is no whole number from 1, or leads above half the sample rate or below `f_min`.
        """
        ranges = (low_range, high_range)
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in ranges):
            raise UserError(
                f"fmin_aug_range {low_range!r}, fmax_aug_range {high_range!r}: expected whole numbers from 1"
            )
        highest, lowest = self.f_max + high_range // 2, self.f_max + high_range // 2 - (high_range - 1)
        if highest > self.sample_rate / 2 or lowest <= self.f_min + low_range - 1:
            raise UserError(
                f"fmin_aug_range {low_range} and fmax_aug_range {high_range} move the mel bands from {self.f_min:g} to "
                f"{self.f_max:g} Hz up to {highest:g} or down to {lowest:g} Hz; expected at most "
                f"{self.sample_rate / 2:g} Hz, and f_max above f_min: give smaller ranges or another f_max"
            )
        self._ranges = ranges

    def _draw_filters(self) -> Tensor:
        kept = self.mel_weights
        if not self.training or self._ranges == (1, 1):
            return kept
        where = kept.device if self.generator is None else self.generator.device
        raised, lowered = (torch.randint(size, (), generator=self.generator, device=where) for size in self._ranges)
        hertz = torch.stack([self.f_min + raised, self.f_max + self._ranges[1] // 2 - lowered])
        low, high = KALDI.to_mel(hertz.to(kept.device, torch.float64))
        share = torch.linspace(0, 1, self.n_mels + 2, dtype=torch.float64, device=kept.device)
        bins = torch.arange(len(kept), dtype=torch.float64, device=kept.device) * self.sample_rate / self.n_fft
        return self._apply_band_limit(triangles(KALDI.to_mel(bins), low + (high - low) * share).to(kept.dtype))

    def power_db_to_value(self, db: float) -> float:
        """(ln(10^(db/10) + 1e-5) + 4.5) / 5."""
        return (math.log(10 ** (db / 10) + 1e-5) + 4.5) / 5

    def filter_waveform(self, waveform: Tensor) -> Tensor:
        """Emphasise high frequencies, (B,S) -> (B,S-1)."""
        return waveform[:, 1:] - self.PREEMPHASIS * waveform[:, :-1]

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to a shifted and scaled logarithm."""
        return ((mel + 1e-5).log() + 4.5) / 5
