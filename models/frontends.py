"""Base class of the log-mel front-ends.

The features of a clip do not depend on its batch: in a padded batch each clip is reflected at its own end, and its
dynamic range is limited relative to its own peak. Computations are in float32, also under autocast.

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
from models.settings import Frames, MelSettings, take_settings

Count = TypeVar("Count", int, Tensor)

SILENCE_DB = -100.0  # power 1e-10, the floor of the decibel scale
_MAX_HERTZ = 1e9
_MAX_PADDED = 10_000_000  # samples


def _reflect_each(waveform: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Reflect every clip at both of its ends: (B,S), lengths (B,) -> (B, S + 2 pad); further samples are undefined."""
    n_samples = waveform.shape[1]
    last = lengths[:, None] - 1  # (B,1)
    position = torch.arange(-pad, n_samples + pad, device=waveform.device).expand(len(waveform), -1)
    index = torch.where(position > last, 2 * last - position, position.abs())
    return waveform.gather(1, index.clamp(0, n_samples - 1))


class FrontEnd(nn.Module):
    """Log-mel front-end: framing, power spectrum and mel filters; subclasses add scale and compression.

    Args:
        settings: that differ from `defaults`, see `models.settings.MelSettings`.
        center: frames are centred on multiples of the hop, the clip is reflected at both ends.
        min_frames: shorter clips are zero-padded to this many frames.

    Raises:
        TypeError: an unknown setting.
        UserError: the settings contradict each other.
    """

    defaults: ClassVar[MelSettings]
    scale: ClassVar[MelScale]
    n_added: int = 0  # samples that `filter_waveform` adds to a clip, negative where it removes some
    generator: torch.Generator | None = None  # of random draws in training; None for torch's default
    band_limit: float | None = None  # hertz, see `limit_band`

    def __init__(self, settings: Mapping[str, Any], *, center: bool, min_frames: Frames = 1) -> None:
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
        if self.min_samples > _MAX_PADDED:
            raise UserError(
                f"min_frames {self.min_frames} of hop_size {self.hop_size}: every clip would be padded to "
                f"{self.min_samples} samples; expected at most {_MAX_PADDED}"
            )

    @property
    def min_samples(self) -> int:
        """Length in samples to which shorter clips are padded."""
        first = self.n_fft // 2 + 1 if self.center else self.n_fft  # reflection needs more samples than it copies
        least = (self.min_frames - 1) * self.hop_size + (0 if self.center else self.n_fft)
        return max(least, first) - self.n_added

    @property
    def description(self) -> dict[str, Any]:
        """Class and arguments as JSON values, the input of `build_front_end`."""
        parameters = inspect.signature(type(self)).parameters.values()
        names = [each.name for each in fields(MelSettings)]
        names += [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        arguments = {name: getattr(self, name) for name in names}
        limit = {} if self.band_limit is None else {"band_limit": self.band_limit}
        return {"class": type(self).__name__} | arguments | limit

    @property
    def highest_hz(self) -> float:
        """Highest frequency that the features depend on, in hertz."""
        return self.f_max if self.band_limit is None else min(self.f_max, self.band_limit)

    def limit_band(self, hertz: float) -> None:
        """Limit the bandwidth: mel bands that reach above a frequency are silent for every input.

        The number of bands, and so the shapes of weights, stay the same. Used where sounds end at 4 kHz, for example,
        so that a model does not learn the residual of a resampler above.

        Args:
            hertz: the frequency.

        Raises:
            UserError: no band is below it.
        """
        upper = self.mel_edges_hz[2:]
        is_number = isinstance(hertz, int | float) and not isinstance(hertz, bool)
        if not is_number or not float(upper[0]) <= hertz <= _MAX_HERTZ:
            raise UserError(
                f"band_limit is {hertz!r}; expected hertz, at least {float(upper[0]):g}, the end of the lowest mel band"
            )
        self.band_limit = float(hertz)
        self.register_buffer("_kept_bands", (upper <= hertz).float(), persistent=False)

    def _apply_band_limit(self, mel_weights: Tensor) -> Tensor:
        """Set the filters (.., F) of bands above `band_limit` to zero."""
        return mel_weights if self.band_limit is None else mel_weights * self.get_buffer("_kept_bands")

    def silence_bands(self, mel: Tensor) -> Tensor:
        """Silence the bands above `band_limit` in features (B,F,T) that were computed without the limit."""
        if self.band_limit is None:
            return mel
        return torch.where(self.get_buffer("_kept_bands")[:, None] > 0, mel, self._compute_silence(mel))

    def _compute_silence(self, mel: Tensor) -> Tensor:
        """Return the value of a band without power in features (B,F,T); broadcasts to their shape."""
        return mel.new_tensor(self.power_db_to_value(SILENCE_DB))

    def _register_filters(self, window: Tensor, mel_weights: Tensor) -> None:
        """Register window (win_size,) and filters (n_fft/2 + 1, F) as buffers that are not part of a checkpoint."""
        self.register_buffer("_window", window, persistent=False)
        self.register_buffer("_mel_weights", mel_weights, persistent=False)

    @property
    def window(self) -> Tensor:
        """Analysis window (win_size,)."""
        return cast(Tensor, self.get_buffer("_window"))

    @property
    def mel_weights(self) -> Tensor:
        """Mel filters (n_fft/2 + 1, F)."""
        return self._apply_band_limit(cast(Tensor, self.get_buffer("_mel_weights")))

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
        """Convert a band power of `db` decibels to the scale of this front-end."""
        raise NotImplementedError

    def n_frames(self, n_samples: Count) -> Count:
        """Return the number of frames T of clips of `n_samples` samples, an integer or a tensor."""
        n_samples = self._count_framed_samples(n_samples)
        return n_samples // self.hop_size + 1 if self.center else (n_samples - self.n_fft) // self.hop_size + 1

    def spectrogram(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the input of a network: (B,S), samples of each (B,) or None -> (B,F,T), frames (B,) or None."""
        return self(waveform, lengths), None if lengths is None else self.n_frames(lengths)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the log-mel spectrogram.

        Args:
            waveform: (B,S) in [-1, 1] at `sample_rate`.
            lengths: (B,) samples of each clip, None for S; later samples are ignored.

        Returns:
            (B,F,T) float32; the first `n_frames(lengths[b])` frames of clip b are valid, the others are silence.

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
                        f"lengths {lengths.tolist()} must be one number per clip, 1 to {waveform.shape[1]} samples"
                    )
                is_padding = torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None]
                waveform = waveform.masked_fill(is_padding, 0.0)
            if waveform.shape[1] < self.min_samples:
                waveform = F.pad(waveform, (0, self.min_samples - waveform.shape[1]))
            n_framed = None if lengths is None else self._count_framed_samples(lengths)
            mel = self._mel_power(self.filter_waveform(waveform), n_framed)
            if lengths is None:
                return self.compress(mel, None)
            is_padding = torch.arange(mel.shape[2], device=mel.device) >= self.n_frames(lengths)[:, None]  # (B,T)
            value = self.compress(mel, is_padding[:, None])
            return value.masked_fill(is_padding[:, None], self.power_db_to_value(SILENCE_DB))

    def _count_framed_samples(self, n_samples: Count) -> Count:
        """Return the number of samples that are framed, of clips of `n_samples`."""
        if isinstance(n_samples, Tensor):
            return n_samples.clamp(min=self.min_samples) + self.n_added
        return max(n_samples, self.min_samples) + self.n_added

    def filter_waveform(self, waveform: Tensor) -> Tensor:
        """Filter the waveform before framing, (B,S) -> (B,S')."""
        return waveform

    def condition_frames(self, frames: Tensor) -> Tensor:
        """Process frames before windowing, (B,T,n_fft) -> (B,T,n_fft); a shorter window is centred.

        Used in exports; a subclass that overrides it overrides `_mel_power` as well.
        """
        return frames

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Convert mel power (B,F,T) to the scale of the model; `is_padding` (B,1,T) marks padding frames."""
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
        return self._draw_filters().T @ power

    def _draw_filters(self) -> Tensor:
        """Return the mel filters of one batch, (n_fft/2 + 1, F)."""
        return self.mel_weights


def build_front_end(description: Mapping[str, Any]) -> FrontEnd:
    """Build a front-end from its `description`.

    Raises:
        UserError: an unknown class or argument.
    """
    arguments = dict(description)
    name, limit = arguments.pop("class", None), arguments.pop("band_limit", None)
    known = {kind.__name__: kind for kind in FrontEnd.__subclasses__()}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"no front-end is called {name!r}; known are {some(known)}")
    try:
        front_end = known[name](**arguments)
    except TypeError as error:
        raise UserError(f"the front-end {name} cannot be built with {arguments}: {error}") from None
    if limit is not None:
        front_end.limit_band(limit)
    return front_end
