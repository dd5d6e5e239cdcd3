"""Seed → augmentation: the same shift and the same masks for teacher and student.

Consistent distillation (Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024) stores
one seed per chunk and epoch beside the teacher's output. All random numbers of the augmentation of that chunk are a
function of this seed, drawn in the published order:

1. each waveform transform in turn (`Shift`: one Bernoulli draw, then, if it applies, one integer);
2. `value`, one uniform number: the width of the masks;
3. `min_value`, one uniform number: their position. All masks of a chunk share these two numbers, as published.

Draws are made on the reference grid (16 kHz, 10 ms frames, 64 HTK mel bands up to 8 kHz) and applied in seconds and
hertz, so that the same part of the sound is masked for models of other rates and mel scales.

Shapes: B batch · S samples · F mel bands · T frames.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import Faults, UserError, did_you_mean
from distill.batch import Batch
from models.frontends import FrontEnd

REFERENCE_RATE = 16_000  # Hz
_MAX_SHIFT = 1000.0  # chunk lengths
_MAX_WIDTH = 1_000_000  # of a mask, in frames or bands
REFERENCE_HOP_SECONDS = 0.01
REFERENCE_BANDS = 64
REFERENCE_F_MAX = 8_000.0  # Hz


class MelGrid(Protocol):
    """The part of a front-end that masks depend on: positions of frames and bands, and the scale of values."""

    sample_rate: int  # hertz
    hop_size: int  # samples between frame centres; frame 0 is centred on time 0

    @property
    def band_centers_hz(self) -> Tensor:
        """Centre frequency of each mel band, (F,)."""

    def power_db_to_value(self, db: float) -> float:
        """Return the value of a power of `db` dB in the scale of this front-end."""


class WaveTransform(Protocol):
    """A change of the waveform with one random number."""

    def draw(self, n_samples: int, generator: torch.Generator) -> float:
        """Draw the number for a chunk of `n_samples` at the reference rate, in units independent of the sample rate."""

    def apply(self, waveform: np.ndarray, amount: float, sample_rate: int) -> np.ndarray:
        """Return the changed waveform (S,)."""


class SpecTransform(Protocol):
    """A mask on the spectrogram, with the two random numbers that all masks of a chunk share."""

    def compute_mask(self, seconds: Tensor, hertz: Tensor, draws: tuple[Tensor, Tensor], n_reference: Tensor) -> Tensor:
        """Return which bins are masked.

        Args:
            seconds: (T,) frame centres.
            hertz: (F,) band centres.
            draws: `value` and `min_value`, each (B,) float32.
            n_reference: (B,) chunk lengths in samples at the reference rate.

        Returns:
            Booleans that broadcast to (B, F, T).
        """


class Shift:
    """Circular shift of the waveform by a random fraction of its length.

    Draws as `torch_audiomentations.Shift` does (unit: fraction, with rollover), as in published stores.

    Args:
        min_shift: smallest shift, a fraction of the chunk's length; negative is to the left.
        max_shift: largest shift, likewise.
        p: probability that a chunk is shifted at all.
    """

    def __init__(self, min_shift: float = -0.5, max_shift: float = 0.5, p: float = 0.5) -> None:
        if not all(-_MAX_SHIFT <= shift <= _MAX_SHIFT for shift in (min_shift, max_shift)):  # also where one is NaN
            raise UserError(f"Shift: {min_shift} to {max_shift}; expected fractions of the chunk, -0.5 to 0.5")
        if min_shift > max_shift:
            raise UserError(f"Shift: min_shift {min_shift} is larger than max_shift {max_shift}; exchange them")
        if not 0 <= p <= 1:
            raise UserError(f"Shift: p is {p}; expected a probability, from 0 to 1")
        self.min_shift, self.max_shift, self.p = float(min_shift), float(max_shift), float(p)

    def draw(self, n_samples: int, generator: torch.Generator) -> float:
        """Return the shift in seconds for a chunk of `n_samples` at the reference rate."""
        if not torch.bernoulli(torch.tensor([self.p]), generator=generator).item():
            return 0.0
        low, high = round(self.min_shift * n_samples), round(self.max_shift * n_samples)
        shift = torch.randint(low, high + 1, (1,), dtype=torch.int32, generator=generator).item()
        return shift / REFERENCE_RATE

    def apply(self, waveform: np.ndarray, seconds: float, sample_rate: int) -> np.ndarray:
        """Return `waveform` (S,) rolled to the right by `seconds`."""
        return np.roll(waveform, round(seconds * sample_rate))


def _compute_bounds(
    value: Tensor, min_value: Tensor, size: Tensor | int, limit: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return first and past-the-last masked index on the reference grid, in the published float32 arithmetic.

    Args:
        value: (B,) float32, the width draws.
        min_value: (B,) float32, the position draws.
        size: frames of each clip (B,), or bands.
        limit: largest width of a mask, in frames or bands; one number for all clips, or (B,).
    """
    width = value * limit
    start = (min_value * (size - width)).long()
    return start, start + width.long()


def _is_between(centers: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Return (B, n) booleans: which of the `centers` (n,) are between each clip's `start` and `stop` (B,)."""
    return (centers >= start[:, None]) & (centers < stop[:, None])


def _check_size(name: str, value: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= _MAX_WIDTH:
        raise UserError(f"{name} is {value!r}; expected a whole number, at least 0")
    return value


def _check_share(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; expected a share of the clip, from 0 to 1, or null for no limit")
    return float(value)


def count_reference_frames(n_reference: Any) -> Any:
    """Return the frames (10 ms each) of clips of `n_reference` samples at the reference rate; a tensor or an array."""
    return n_reference // round(REFERENCE_HOP_SECONDS * REFERENCE_RATE) + 1


class TimeMasking:
    """One masked interval of time, at most `time_mask_param` reference frames (10 ms each) wide.

    Args:
        time_mask_param: the widest mask, in reference frames.
        max_share: the widest mask as a share of each clip's frames, if that is less; None, as published, allows masks
            that are longer than a short clip and mask it completely.
    """

    def __init__(self, time_mask_param: int = 192, max_share: float | None = None) -> None:
        self.param = _check_size("TimeMasking: time_mask_param", time_mask_param)
        self.max_share = _check_share("TimeMasking: max_share", max_share)

    def compute_mask(self, seconds: Tensor, hertz: Tensor, draws: tuple[Tensor, Tensor], n_reference: Tensor) -> Tensor:
        """Return (B, 1, T) booleans for frames centred on `seconds` (T,); see `SpecTransform`."""
        n_frames = count_reference_frames(n_reference)
        limit: Tensor | int = self.param
        if self.max_share is not None:
            limit = (n_frames * self.max_share).clamp(max=self.param)
        start, stop = _compute_bounds(*draws, n_frames, limit)
        # A frame is masked if its centre is; the corners are half a frame before the centres.
        corners = ((index.double() - 0.5) * REFERENCE_HOP_SECONDS for index in (start, stop))
        return _is_between(seconds, *corners)[:, None, :]


class FrequencyMasking:
    """One masked interval of frequency, at most `freq_mask_param` reference bands (64 HTK mel to 8 kHz) wide.

    Args:
        freq_mask_param: the widest mask, in reference bands.
        max_share: the widest mask as a share of the 64 bands, if that is less; None, as published, for no limit.
    """

    def __init__(self, freq_mask_param: int = 24, max_share: float | None = None) -> None:
        self.param = _check_size("FrequencyMasking: freq_mask_param", freq_mask_param)
        self.max_share = _check_share("FrequencyMasking: max_share", max_share)

    def compute_mask(self, seconds: Tensor, hertz: Tensor, draws: tuple[Tensor, Tensor], n_reference: Tensor) -> Tensor:
        """Return (B, F, 1) booleans for bands centred on `hertz` (F,); see `SpecTransform`."""
        limit = self.param if self.max_share is None else min(self.param, self.max_share * REFERENCE_BANDS)
        start, stop = _compute_bounds(*draws, REFERENCE_BANDS, limit)
        # Band b is centred on (b + 1) / 65 of the mel range; the corners are half a band below the centres.
        mel_step = _hz_to_mel(REFERENCE_F_MAX) / (REFERENCE_BANDS + 1)
        corners = (_mel_to_hz((index.double() + 0.5) * mel_step) for index in (start, stop))
        return _is_between(hertz, *corners)[:, :, None]


def _hz_to_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def _mel_to_hz(mel: Tensor) -> Tensor:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


# Transforms by their names in configurations; a new one is a class above and a line here.
WAVE_TRANSFORMS: dict[str, Callable[..., WaveTransform]] = {"Shift": Shift}
SPEC_TRANSFORMS: dict[str, Callable[..., SpecTransform]] = {
    "TimeMasking": TimeMasking,
    "FrequencyMasking": FrequencyMasking,
}


@dataclass(frozen=True)
class Draw:
    """All random numbers of one chunk in one epoch."""

    wave: tuple[float, ...]  # one number for each waveform transform, in its unit
    value: float
    min_value: float


@dataclass(frozen=True)
class Replay:
    """The augmentation of a store: its transforms, drawn from a seed and applied in the same way for every model.

    Args:
        wavtransforms: name → arguments, as in a `logitconfig/` file.
        spectransforms: list of {name: arguments}.
        mask_fill: value of masked bins: 0 dB as published, or the mean level of the clip.
    """

    wavtransforms: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    spectransforms: Sequence[Mapping[str, Mapping[str, Any] | None]] = ()
    mask_fill: Literal["0dB", "mean"] = "0dB"
    _wave: tuple[WaveTransform, ...] = field(init=False, repr=False, compare=False)
    _spec: tuple[SpecTransform, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = Faults("the augmentation")
        wave = [_build(WAVE_TRANSFORMS, name, args, faults) for name, args in self.wavtransforms.items()]
        spec = [
            _build(SPEC_TRANSFORMS, name, args, faults) for entry in self.spectransforms for name, args in entry.items()
        ]
        if self.mask_fill not in ("0dB", "mean"):
            faults.add(f"mask_fill is {self.mask_fill!r}; use '0dB' (as published) or 'mean'")
        faults.raise_if_any()
        object.__setattr__(self, "_wave", tuple(wave))
        object.__setattr__(self, "_spec", tuple(spec))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of this object as plain JSON values."""
        return {
            "wavtransforms": {name: dict(args or {}) for name, args in self.wavtransforms.items()},
            "spectransforms": [{n: dict(a or {}) for n, a in entry.items()} for entry in self.spectransforms],
            "mask_fill": self.mask_fill,
        }

    @property
    def masks(self) -> tuple[SpecTransform, ...]:
        """The masks on the spectrogram, in their order."""
        return self._spec

    def draw(self, seed: int, n_reference: int) -> Draw:
        """Return the random numbers of `seed` for a chunk of `n_reference` samples at the reference rate."""
        generator = torch.Generator().manual_seed(int(seed))
        wave = tuple(transform.draw(n_reference, generator) for transform in self._wave)
        value = torch.rand(1, generator=generator).item()
        min_value = torch.rand(1, generator=generator).item()
        return Draw(wave, value, min_value)

    def transform_waveform(self, waveform: np.ndarray, draw: Draw, sample_rate: int) -> np.ndarray:
        """Return `waveform` (S,) after every waveform transform of `draw`."""
        for transform, amount in zip(self._wave, draw.wave, strict=True):
            waveform = transform.apply(waveform, amount, sample_rate)
        return waveform

    def mask_spectrogram(
        self,
        mel: Tensor,
        grid: MelGrid,
        value: Tensor,
        min_value: Tensor,
        n_reference: Tensor,
        n_frames: Tensor | None = None,
    ) -> Tensor:
        """Mask a batch at once.

        Args:
            mel: (B, F, T), computed by `grid`.
            grid: the front-end, for the positions of its frames and bands and its scale.
            value: (B,) float32, the width draws.
            min_value: (B,) float32, the position draws.
            n_reference: (B,) chunk lengths in samples at the reference rate.
            n_frames: (B,) frames of each clip in a padded batch; the mean level is that of these frames.

        Returns:
            (B, F, T), a new tensor; `mel` itself without masks.
        """
        if not self._spec:
            return mel
        seconds = torch.arange(mel.shape[-1], device=mel.device, dtype=torch.float64)
        seconds = seconds * (grid.hop_size / grid.sample_rate)
        hertz = grid.band_centers_hz.to(mel.device, torch.float64)
        fill = self._compute_fill(mel, grid, n_frames)
        for transform in self._spec:
            is_masked = transform.compute_mask(seconds, hertz, (value, min_value), n_reference)
            if n_frames is not None:  # padding stays silent
                is_masked = is_masked & (torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None])[:, None, :]
            mel = torch.where(is_masked, fill, mel)
        return mel

    def spectrogram(self, front_end: FrontEnd, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the masked input of a model.

        Args:
            front_end: of the model; the batch has waveforms at its rate.
            batch: on the model's device.

        Returns:
            The masked spectrogram (B, F, T), and the frames of each clip (B,), None without padding.
        """
        waveform, lengths = batch.waveforms[front_end.sample_rate], batch.lengths[front_end.sample_rate]
        mel, n_frames = front_end.spectrogram(waveform, lengths)
        draws = batch.value, batch.min_value, batch.n_reference
        return self.mask_spectrogram(mel, front_end, *draws, n_frames), n_frames

    def _compute_fill(self, mel: Tensor, grid: MelGrid, n_frames: Tensor | None) -> Tensor | float:
        if self.mask_fill == "0dB":
            return grid.power_db_to_value(0.0)
        if n_frames is None:
            return mel.mean(dim=(1, 2), keepdim=True)
        valid = torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None]  # (B, T)
        total = (mel * valid[:, None, :]).sum(dim=(1, 2), keepdim=True)
        return total / (n_frames[:, None, None] * mel.shape[1])


def _build(known: Mapping[str, Any], name: str, arguments: Mapping[str, Any] | None, faults: Faults) -> Any:
    if name not in known:
        faults.add(f"unknown transform {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}")
        return None
    try:
        return known[name](**(arguments or {}))
    except TypeError as error:
        faults.add(f"transform {name}: {error}".replace("__init__() ", ""))
    except UserError as error:
        faults.add(str(error))
    return None


def draw_epoch_seeds(seed: int, epoch: int, n: int, first: int = 0) -> np.ndarray:
    """Return one augmentation seed for each of the items `first` … `first + n` in `epoch`, int32 (n,).

    A function of its arguments for each item, so that items can be split over processes in any way.
    """
    stream = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return stream.integers(0, 2**31, size=first + n, dtype=np.int64)[first:].astype(np.int32)
