"""Waveform to log-mel: what the front-ends of all taggers have in common.

A clip's features depend on that clip alone: in a padded batch each clip is reflected at its own end and the dynamic
range is clamped below its own peak. Everything is computed in float32, whatever autocast says.

Letters: B batch, S samples, F mel bands, T frames.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some
from models.mel_scales import MelScale, band_edges
from models.settings import MelSettings, take_settings

Count = TypeVar("Count", int, Tensor)

SILENCE_DB = -100.0  # power 1e-10, the smallest the decibel scale here tells apart


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
        settings: what differs from `defaults`, by the names of `models.settings.MelSettings`.
        center: frames are centred on multiples of the hop, the clip is reflected at both ends.
        min_frames: shorter clips are extended with zeros until they have this many frames.

    Raises:
        TypeError: a setting that there is not.
        UserError: the settings contradict each other.
    """

    defaults: ClassVar[MelSettings]
    scale: ClassVar[MelScale]
    n_added: int = 0  # samples that `filtered` puts around a clip, below 0 where it takes some away
    generator: torch.Generator | None = None  # draws what varies in training; None means torch's default one
    band_limit: float | None = None  # hertz, see `limit_band`

    def __init__(self, settings: Mapping[str, Any], *, center: bool, min_frames: int = 1) -> None:
        super().__init__()
        (mel,) = take_settings((self.defaults,), settings)
        self.sample_rate, self.n_mels, self.n_fft = mel.sample_rate, mel.n_mels, mel.n_fft
        self.win_size, self.hop_size, self.f_min = mel.win_size, mel.hop_size, mel.f_min
        self.f_max = mel.sample_rate / 2 if mel.f_max is None else mel.f_max
        self.center, self.min_frames = center, min_frames
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise UserError(
                f"mel bands from {self.f_min} to {self.f_max} Hz do not fit into 0 to {self.sample_rate / 2} Hz"
            )
        if not 0 < self.win_size <= self.n_fft or self.hop_size < 1 or self.n_mels < 1:
            raise UserError(
                f"win_size {self.win_size}, n_fft {self.n_fft}, hop_size {self.hop_size}, n_mels {self.n_mels}: "
                "the window must fit into n_fft, hop and bands must be at least 1"
            )

    @property
    def min_samples(self) -> int:
        """Samples to which shorter clips are extended."""
        first = self.n_fft // 2 + 1 if self.center else self.n_fft  # reflection needs more samples than it copies
        least = (self.min_frames - 1) * self.hop_size + (0 if self.center else self.n_fft)
        return max(least, first) - self.n_added

    @property
    def description(self) -> dict[str, Any]:
        """Its class and arguments, ready for JSON; `described_front_end` builds it again."""
        own = inspect.signature(type(self)).parameters.values()
        names = [each.name for each in fields(MelSettings)]
        names += [each.name for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        arguments = {name: getattr(self, name) for name in names}
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
        return self.scale.to_hertz(band_edges(self.scale, self.f_min, self.f_max, self.n_mels))

    @property
    def _bins_hz(self) -> Tensor:
        """Frequencies of a Fourier transform, (n_fft/2 + 1,)."""
        return torch.arange(self.n_fft // 2 + 1, dtype=torch.float64) * self.sample_rate / self.n_fft

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
            is_padding = torch.arange(mel.shape[2], device=mel.device) >= self.n_frames(lengths)[:, None]  # (B,T)
            value = self.compressed(mel, is_padding[:, None])
            return value.masked_fill(is_padding[:, None], self.power_db_to_value(SILENCE_DB))

    def _usable(self, n_samples: Count) -> Count:
        """Samples that are framed, of clips of `n_samples`."""
        if isinstance(n_samples, Tensor):
            return n_samples.clamp(min=self.min_samples) + self.n_added
        return max(n_samples, self.min_samples) + self.n_added

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

    def compressed(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to the scale of the model; `is_padding` (B,1,T) marks frames that are padding."""
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
