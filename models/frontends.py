"""Waveform to log-mel: the two front-ends of the published taggers.

A clip's features depend on that clip alone: in a padded batch each clip is reflected at its own end and the dynamic
range is clamped below its own peak. Everything is computed in float32, whatever autocast says.

Letters: B batch, S samples, F mel bands, T frames.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some

Count = TypeVar("Count", int, Tensor)

SILENCE_DB = -100.0  # power 1e-10, the smallest the decibel scale here tells apart


def triangles(bins: Tensor, edges: Tensor) -> Tensor:
    """Triangular filters: bins (N,), edges (F+2,) on the same axis -> weights (N,F), peak 1 at edges[1:-1]."""
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


def _htk_mel(hertz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hertz / 700)


def _htk_hertz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)


def kaldi_mel(hertz: Tensor) -> Tensor:
    """Hertz to mel as Kaldi has it."""
    return 1127 * torch.log(1 + hertz / 700)


def kaldi_hertz(mel: Tensor) -> Tensor:
    """Mel as Kaldi has it to hertz."""
    return 700 * (torch.exp(mel / 1127) - 1)


def band_edges(to_mel: Callable[[Tensor], Tensor], f_min: float, f_max: float, n_mels: int) -> Tensor:
    """The n_mels + 2 corners of the filters, evenly spaced on the mel axis, float64."""
    low, high = to_mel(torch.tensor([f_min, f_max], dtype=torch.float64)).tolist()
    return torch.linspace(low, high, n_mels + 2, dtype=torch.float64)


def _reflect_each(waveform: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Reflect every clip at its own two ends: (B,S), lengths (B,) -> (B, S + 2 pad); what lies beyond is unused."""
    n_samples = waveform.shape[1]
    last = lengths[:, None] - 1  # (B,1)
    position = torch.arange(-pad, n_samples + pad, device=waveform.device).expand(len(waveform), -1)
    index = torch.where(position > last, 2 * last - position, position.abs())
    return waveform.gather(1, index.clamp(0, n_samples - 1))


class FrontEnd(nn.Module):
    """What every front-end has in common: framing, power spectrum, mel filters.

    Args:
        sample_rate: of the waveform it takes, in hertz.
        n_mels: number of mel bands F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the Hann window, at most `n_fft`.
        hop_size: samples from one frame to the next.
        f_min: lower edge of the lowest band, in hertz.
        f_max: upper edge of the highest band, in hertz.
        center: frames are centred on multiples of the hop, the clip is reflected at both ends.
        min_samples: shorter clips are extended with zeros to this length.

    Raises:
        UserError: the settings contradict each other.
    """

    generator: torch.Generator | None = None  # draws what varies in training; None means torch's default one
    band_limit: float | None = None  # hertz, see `limit_band`

    def __init__(
        self,
        *,
        sample_rate: int,
        n_mels: int,
        n_fft: int,
        win_size: int,
        hop_size: int,
        f_min: float,
        f_max: float,
        center: bool,
        min_samples: int,
    ) -> None:
        super().__init__()
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise UserError(f"mel bands from {f_min} to {f_max} Hz do not fit into 0 to {sample_rate / 2} Hz")
        if not 0 < win_size <= n_fft or hop_size < 1 or n_mels < 1:
            raise UserError(
                f"win_size {win_size}, n_fft {n_fft}, hop_size {hop_size}, n_mels {n_mels}: "
                "the window must fit into n_fft, hop and bands must be at least 1"
            )
        self.sample_rate, self.n_mels, self.n_fft = sample_rate, n_mels, n_fft
        self.win_size, self.hop_size, self.center = win_size, hop_size, center
        self.f_min, self.f_max, self.min_samples = f_min, f_max, min_samples

    @property
    def description(self) -> dict[str, Any]:
        """Its class and arguments, ready for JSON; `described_front_end` builds it again."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        limit = {} if self.band_limit is None else {"band_limit": self.band_limit}
        return {"class": type(self).__name__} | arguments | limit

    @property
    def highest_hz(self) -> float:
        """Frequency up to which sound changes the features, in hertz."""
        return self.f_max if self.band_limit is None else min(self.f_max, self.band_limit)

    def limit_band(self, hertz: float) -> None:
        """Ignore what lies above a frequency from now on: mel bands that reach above it are silent for every sound.

        Weights that were trained with these bands still fit. It is how a model of sounds that end at 4 kHz, say, keeps
        from learning what a resampler leaves above, and from tags that depend on it.

        Args:
            hertz: the frequency.

        Raises:
            UserError: no band lies below it.
        """
        upper = self.mel_edges_hz[2:]
        if isinstance(hertz, bool) or not isinstance(hertz, int | float) or not upper[0] <= hertz:
            raise UserError(
                f"band_limit is {hertz!r}; wanted hertz, at least {float(upper[0]):g}, where the lowest mel band ends"
            )
        self.band_limit = float(hertz)
        self.register_buffer("_kept_bands", (upper <= hertz).float(), persistent=False)

    def _limited(self, mel_weights: Tensor) -> Tensor:
        """Filters (.., F) with the bands above `band_limit` zero."""
        return mel_weights if self.band_limit is None else mel_weights * self.get_buffer("_kept_bands")

    def silence_bands(self, mel: Tensor) -> Tensor:
        """Silence the bands above `band_limit` in features (B,F,T) that were computed elsewhere, without it."""
        if self.band_limit is None:
            return mel
        return torch.where(self.get_buffer("_kept_bands")[:, None] > 0, mel, self._silence_of(mel))

    def _silence_of(self, mel: Tensor) -> Tensor:
        """What a band without power reads in features (B,F,T), to be broadcast to them."""
        return mel.new_tensor(self.power_db_to_value(SILENCE_DB))

    def _keep(self, window: Tensor, mel_weights: Tensor) -> None:
        """Hold the window (win_size,) and the filters (n_fft/2 + 1, F), which are no part of a checkpoint."""
        self.register_buffer("_window", window, persistent=False)
        self.register_buffer("_mel_weights", mel_weights, persistent=False)

    @property
    def window(self) -> Tensor:
        """Analysis window (win_size,)."""
        return cast(Tensor, self.get_buffer("_window"))

    @property
    def mel_weights(self) -> Tensor:
        """Mel filters (n_fft/2 + 1, F)."""
        return self._limited(cast(Tensor, self.get_buffer("_mel_weights")))

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,)."""
        raise NotImplementedError

    @property
    def band_centers_hz(self) -> Tensor:
        """Centre frequency of each band in hertz, (F,)."""
        return self.mel_edges_hz[1:-1]

    def power_db_to_value(self, db: float) -> float:
        """What a band whose power is `db` decibels reads in this front-end's own scale."""
        raise NotImplementedError

    def n_frames(self, n_samples: Count) -> Count:
        """Number of frames T of clips of `n_samples` samples, an integer or a tensor of them."""
        return self._framed(self._usable(n_samples))

    def spectrogram(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute what a network takes: (B,S), own samples (B,) or None -> (B,F,T), own frames (B,) or None.

        In training and in use alike; see `forward`.
        """
        return self(waveform, lengths), None if lengths is None else self.n_frames(lengths)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the log-mel spectrogram.

        Args:
            waveform: (B,S) in [-1, 1] at `sample_rate`.
            lengths: (B,) samples that belong to each clip, None where all of S do. What lies behind is not looked at.

        Returns:
            (B,F,T) float32; clip b owns its first `n_frames(lengths[b])` frames, the rest reads as silence.

        Raises:
            UserError: the waveform is not (B,S) with S > 0, or a length is outside 1..S.
        """
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise UserError(f"a front-end takes waveforms (B,S) of at least one sample, not {tuple(waveform.shape)}")
        with torch.autocast(waveform.device.type, enabled=False):
            waveform = waveform.float()
            if lengths is not None:
                lengths = lengths.to(waveform.device)
                if lengths.shape != waveform.shape[:1] or bool(((lengths < 1) | (lengths > waveform.shape[1])).any()):
                    raise UserError(
                        f"lengths {lengths.tolist()} must be one number a clip, 1 to {waveform.shape[1]} samples"
                    )
                behind = torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None]
                waveform = waveform.masked_fill(behind, 0.0)
            if waveform.shape[1] < self.min_samples:
                waveform = F.pad(waveform, (0, self.min_samples - waveform.shape[1]))
            mel = self._mel_power(self.filtered(waveform), None if lengths is None else self._usable(lengths))
            if lengths is None:
                return self.compressed(mel, None)
            alien = torch.arange(mel.shape[2], device=mel.device) >= self.n_frames(lengths)[:, None]  # (B,T)
            value = self.compressed(mel, alien[:, None])
            return value.masked_fill(alien[:, None], self.power_db_to_value(SILENCE_DB))

    def _usable(self, n_samples: Count) -> Count:
        """Samples that are framed, of clips of `n_samples`."""
        if isinstance(n_samples, Tensor):
            return n_samples.clamp(min=self.min_samples)
        return max(n_samples, self.min_samples)

    def _framed(self, n_samples: Count) -> Count:
        return n_samples // self.hop_size + 1 if self.center else (n_samples - self.n_fft) // self.hop_size + 1

    def filtered(self, waveform: Tensor) -> Tensor:
        """Give the waveform as it is framed, (B,S) -> (B,S')."""
        return waveform

    def conditioned(self, frames: Tensor) -> Tensor:
        """Give the frames as they are windowed, (B,T,n_fft) -> (B,T,n_fft); a short window lies in their middle.

        A front-end that has something to do here has a `_mel_power` of its own that does it too.
        """
        return frames

    def compressed(self, mel: Tensor, alien: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to the scale of the model; `alien` (B,1,T) marks frames that are padding."""
        raise NotImplementedError

    def _mel_power(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        if self.center:
            pad = self.n_fft // 2
            if lengths is None:
                waveform = F.pad(waveform, (pad, pad), mode="reflect")
            else:
                waveform = _reflect_each(waveform, lengths, pad)
        spectrum = torch.stft(
            waveform, self.n_fft, self.hop_size, self.win_size, self.window, center=False, return_complex=True
        )
        real, imag = spectrum.real, spectrum.imag
        power = torch.addcmul(real.square(), imag, imag)  # (B, n_fft/2 + 1, T), 6 times faster than abs().square()
        return self._filters().T @ power

    def _filters(self) -> Tensor:
        """Give the mel filters of one batch, (n_fft/2 + 1, F)."""
        return self.mel_weights


class _Buffers(nn.Module):
    """A module that holds tensors under given names."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


class CedMel(FrontEnd):
    """CED's front-end: HTK mel power in decibels, at most `TOP_DB` below the clip's own peak.

    The window and the filters have the names they have in published checkpoints (`0.spectrogram.window`,
    `0.mel_scale.fb`).

    Args:
        sample_rate: hertz.
        n_mels: mel bands F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the (periodic) Hann window.
        hop_size: samples between frames.
        f_min: hertz.
        f_max: hertz, None for half the sample rate.
        center: whether frames are centred, with reflected ends.
        min_frames: shorter clips are extended with zeros until they have this many frames.
    """

    TOP_DB = 120.0

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_mels: int = 64,
        n_fft: int = 512,
        win_size: int = 512,
        hop_size: int = 160,
        f_min: float = 0.0,
        f_max: float | None = 8000.0,
        center: bool = True,
        min_frames: int = 1,
    ) -> None:
        reach = n_fft // 2 + 1 if center else n_fft  # reflection needs more samples than it copies
        min_samples = max((min_frames - 1) * hop_size + (0 if center else n_fft), reach)
        f_max = sample_rate / 2 if f_max is None else f_max
        super().__init__(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
            center=center,
            min_samples=min_samples,
        )
        self.min_frames = min_frames
        bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
        stage = nn.Module()
        stage.spectrogram = _Buffers(window=torch.hann_window(win_size))
        stage.mel_scale = _Buffers(fb=triangles(bins, self.mel_edges_hz).float())
        self.add_module("0", stage)

    @property
    def window(self) -> Tensor:
        """Analysis window (win_size,)."""
        return cast(Tensor, self.get_buffer("0.spectrogram.window"))

    @property
    def mel_weights(self) -> Tensor:
        """Mel filters (n_fft/2 + 1, F)."""
        return self._limited(cast(Tensor, self.get_buffer("0.mel_scale.fb")))  # whose values checkpoints bring

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,)."""
        return _htk_hertz(band_edges(_htk_mel, self.f_min, self.f_max, self.n_mels))

    def power_db_to_value(self, db: float) -> float:
        """Decibels are this front-end's own scale."""
        return db

    def _silence_of(self, mel: Tensor) -> Tensor:
        """The lowest decibels of each clip, (B,1,1)."""
        kept = mel.masked_fill(self.get_buffer("_kept_bands")[:, None] == 0, SILENCE_DB)
        return (kept.amax((1, 2), keepdim=True) - self.TOP_DB).clamp(min=SILENCE_DB)

    def compressed(self, mel: Tensor, alien: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to decibels."""
        db = 10 * mel.clamp(min=10 ** (SILENCE_DB / 10)).log10()
        own = db if alien is None else db.masked_fill(alien, -math.inf)
        return torch.maximum(db, own.amax((1, 2), keepdim=True) - self.TOP_DB)


class EfficientAtMel(FrontEnd):
    """EfficientAT's front-end: pre-emphasis, Kaldi-style mel bands, (ln(power + 1e-5) + 4.5) / 5.

    Its tensors are no part of a checkpoint, as published.

    Args:
        sample_rate: hertz.
        n_mels: mel bands F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the (symmetric) Hann window.
        hop_size: samples between frames.
        f_min: hertz.
        f_max: hertz.
        min_frames: shorter clips are extended with zeros until they have this many frames.
    """

    PREEMPHASIS = 0.97

    def __init__(
        self,
        *,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_fft: int = 1024,
        win_size: int = 800,
        hop_size: int = 320,
        f_min: float = 0.0,
        f_max: float = 15000.0,
        min_frames: int = 1,
    ) -> None:
        reach = n_fft // 2 + 2  # one sample is lost to pre-emphasis, and reflection needs more than it copies
        super().__init__(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
            center=True,
            min_samples=max((min_frames - 1) * hop_size + 1, reach),
        )
        self.min_frames = min_frames
        bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
        weights = triangles(kaldi_mel(bins), band_edges(kaldi_mel, f_min, f_max, n_mels))
        self._keep(torch.hann_window(win_size, periodic=False), weights.float())
        self._ranges = (1, 1)

    def vary_edges(self, low_range: int, high_range: int) -> None:
        """Draw the edges of the bands anew for each batch of training from now on, as published; not in evaluation.

        What was drawn is no part of `description`: the features that a model is used with have the edges given.

        Args:
            low_range: `f_min` is raised by a whole number of hertz below this, 10 in published training; 1 for never.
            high_range: whole numbers of hertz that `f_max` may become, half of them above it, 2000 in published
                training; 1 for never.

        Raises:
            UserError: they are no such numbers, or lead out of what can be heard at this sample rate.
        """
        ranges = (low_range, high_range)
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in ranges):
            raise UserError(f"fmin_aug_range {low_range!r}, fmax_aug_range {high_range!r}: wanted whole numbers from 1")
        highest, lowest = self.f_max + high_range // 2, self.f_max + high_range // 2 - (high_range - 1)
        if highest > self.sample_rate / 2 or lowest <= self.f_min + low_range - 1:
            raise UserError(
                f"fmin_aug_range {low_range} and fmax_aug_range {high_range} move the mel bands from {self.f_min:g} to "
                f"{self.f_max:g} Hz up to {highest:g} or down to {lowest:g} Hz; wanted at most "
                f"{self.sample_rate / 2:g} Hz and some room: give smaller ranges or another f_max"
            )
        self._ranges = ranges

    def _filters(self) -> Tensor:
        kept = self.mel_weights
        if not self.training or self._ranges == (1, 1):
            return kept
        where = kept.device if self.generator is None else self.generator.device
        raised, lowered = (torch.randint(size, (), generator=self.generator, device=where) for size in self._ranges)
        hertz = torch.stack([self.f_min + raised, self.f_max + self._ranges[1] // 2 - lowered])
        low, high = kaldi_mel(hertz.to(kept.device, torch.float64))
        share = torch.linspace(0, 1, self.n_mels + 2, dtype=torch.float64, device=kept.device)
        bins = torch.arange(len(kept), dtype=torch.float64, device=kept.device) * self.sample_rate / self.n_fft
        return self._limited(triangles(kaldi_mel(bins), low + (high - low) * share).to(kept.dtype))

    @property
    def mel_edges_hz(self) -> Tensor:
        """Corners of the triangular bands in hertz, (F+2,)."""
        return kaldi_hertz(band_edges(kaldi_mel, self.f_min, self.f_max, self.n_mels))

    def power_db_to_value(self, db: float) -> float:
        """(ln(10^(db/10) + 1e-5) + 4.5) / 5."""
        return (math.log(10 ** (db / 10) + 1e-5) + 4.5) / 5

    def _usable(self, n_samples: Count) -> Count:
        return super()._usable(n_samples) - 1

    def filtered(self, waveform: Tensor) -> Tensor:
        """Emphasise high frequencies, (B,S) -> (B,S-1)."""
        return waveform[:, 1:] - self.PREEMPHASIS * waveform[:, :-1]

    def compressed(self, mel: Tensor, alien: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to a shifted and scaled logarithm."""
        return ((mel + 1e-5).log() + 4.5) / 5


def described_front_end(description: Mapping[str, Any]) -> FrontEnd:
    """Build a front-end from its `description`.

    Raises:
        UserError: there is no front-end of that class, or not with these arguments.
    """
    arguments = dict(description)
    name, limit = arguments.pop("class", None), arguments.pop("band_limit", None)
    known = {kind.__name__: kind for kind in FrontEnd.__subclasses__()}
    if name not in known:
        raise UserError(f"no front-end is called {name!r}; known are {some(known)}")
    try:
        front_end = known[name](**arguments)
    except TypeError as error:
        raise UserError(f"the front-end {name} cannot be built with {arguments}: {error}") from None
    if limit is not None:
        front_end.limit_band(limit)
    return front_end
