"""Conversion of clips to the waveform batches of networks, and batches of clips of several lengths.

Letters: B batch, S samples, T frames or samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import UserError, some
from common.samples import EXPECTED, FULL_SCALE_16_BIT, to_floats

_MAX_PEAK = 16.0  # 24 dB above full scale, as for files: floating-point recordings and mixes stay below
_MAX_CHANNELS, _MIN_SAMPLES = 32, 1000  # of an array that looks like (S, channels)


def as_waveform(
    sound: Any,
    lengths: Any = None,
    *,
    device: str | torch.device | None = None,
    check_values: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Convert clips to a batch of waveforms, float32 with full scale 1.0, and their lengths.

    (channels, samples) cannot be distinguished from (B,S): average the channels first.

    Args:
        sound: a tensor or array (B,S), or (S,) for one clip; or a list of clips (S,) of any lengths, which are padded.
            Floats of any width with full scale 1.0, or int16, which is divided by 32768.
        lengths: (B,) samples of each clip: a tensor, an array or a list; None for S.
        device: of the batch; None keeps that of the input.
        check_values: check the values too, which takes a pass over them.

    Returns:
        (B,S), and (B,) or None. A float32 tensor (B,S) on the device is returned as it is.

    Raises:
        UserError: another type or shape, no clips, no samples; with `check_values`, samples that are not finite or
            whose full scale is not 1.0.
    """
    if isinstance(sound, list | tuple):
        waveform, sizes = _join(sound)
    else:
        waveform, sizes = _to_float_tensor(sound, "the waveform"), None
    waveform = _check_shape(waveform)
    lengths = _read_lengths(lengths, sizes, waveform)
    waveform = waveform if device is None else waveform.to(device)
    lengths = None if lengths is None else lengths.to(waveform.device)
    if check_values:
        _check_values(waveform.detach(), lengths)
    return waveform, lengths


def _join(clips: Sequence[Any]) -> tuple[Tensor, list[int] | None]:
    """Join a list of clips into one zero-padded batch; sizes are None for a list of samples."""
    if not clips:
        raise UserError("the waveform: found an empty list; expected (B,S), (S,) or a list of clips (S,)")
    if all(isinstance(value, bool | int | float) for value in clips):
        return _to_float_tensor(clips, "the waveform"), None
    parts = [_to_float_tensor(clip, f"clip {i}") for i, clip in enumerate(clips)]
    for i, part in enumerate(parts):
        if part.ndim != 1:
            raise UserError(
                f"clip {i} of the list has shape {tuple(part.shape)}; expected one channel, (S,): average the channels"
            )
    return pad_sequence([part.to(parts[0].device) for part in parts], batch_first=True), [len(part) for part in parts]


def _to_float_tensor(samples: Any, name: str) -> Tensor:
    if not isinstance(samples, Tensor):
        floats = to_floats(samples, name)
        return torch.from_numpy(floats if floats.flags.writeable and floats.flags.c_contiguous else floats.copy())
    if samples.is_floating_point():
        return samples.float()
    if samples.dtype == torch.int16:
        return samples.float() / FULL_SCALE_16_BIT
    raise UserError(f"{name}: found values of type {samples.dtype}; {EXPECTED}: divide integers by their full scale")


def _check_shape(waveform: Tensor) -> Tensor:
    """Return (B,S)."""
    if waveform.ndim == 1:
        waveform = waveform[None]
    shape = tuple(waveform.shape)
    if waveform.ndim == 3:
        raise UserError(f"the waveform has shape {shape}; expected (B,S): average the channels, `waveform.mean(1)`")
    if waveform.ndim != 2:
        raise UserError(f"the waveform has shape {shape}; expected clips of one channel, (B,S), or one clip, (S,)")
    if waveform.shape[0] == 0:
        raise UserError(f"the waveform has shape {shape}: no clips; expected (B,S) with at least one")
    if waveform.shape[1] == 0:
        raise UserError(f"the waveform has shape {shape}: no samples; expected at least one in each clip")
    if waveform.shape[1] <= _MAX_CHANNELS and waveform.shape[0] >= _MIN_SAMPLES:
        raise UserError(
            f"the waveform has shape {shape}, which looks like (S, channels); expected (B,S): average the channels, "
            "`waveform.mean(1)`"
        )
    return waveform


def _read_lengths(lengths: Any, sizes: list[int] | None, waveform: Tensor) -> Tensor | None:
    """Return lengths (B,), None where no clip is padded."""
    n_clips, n_samples = waveform.shape
    if lengths is None:
        if sizes is None or len(set(sizes)) == 1:
            return None
        if min(sizes) < 1:
            raise UserError(f"clip {sizes.index(0)} of the list has no samples; expected at least one: leave it out")
        return torch.tensor(sizes)
    try:
        read = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"lengths are {type(lengths).__name__}; expected one whole number per clip, (B,)") from None
    read = read[None] if read.ndim == 0 else read
    if read.is_floating_point() or read.is_complex() or read.dtype == torch.bool:
        raise UserError(f"lengths are of type {read.dtype}; expected whole numbers of samples, one per clip")
    if read.shape != (n_clips,) or int(read.min()) < 1 or bool((read.cpu() > torch.tensor(sizes or n_samples)).any()):
        raise UserError(f"lengths {read.tolist()} must be one number per clip, 1 to {sizes or n_samples} samples")
    return read


def _check_values(waveform: Tensor, lengths: Tensor | None) -> None:
    """Check that samples are finite and have full scale 1.0, by the criteria of sound files."""
    if lengths is not None:
        is_padding = torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None]
        waveform = waveform.masked_fill(is_padding, 0.0)
    peaks = waveform.abs().amax(1).tolist()
    if invalid := [i for i, peak in enumerate(peaks) if not peak < float("inf")]:
        raise UserError(f"clips {some(map(str, invalid))} of the batch contain NaN or infinite samples")
    for i, peak in enumerate(peaks):
        if peak > 1 and _is_unscaled(waveform[i], peak):
            raise UserError(
                f"clip {i} of the batch has values of up to {peak:.6g}, like integer samples; expected full scale 1.0: "
                "divide 16-bit samples by 32768"
            )


def _is_unscaled(samples: Tensor, peak: float) -> bool:
    """Whether all samples are whole numbers, or half are above full scale and the peak above `_MAX_PEAK`."""
    if bool((samples == samples.round()).all()):
        return True
    values = samples.abs()
    return peak > _MAX_PEAK and int((values > 1).sum()) * 2 >= int((values > 0).sum())


def trim_common_padding(waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Trim the padding that all clips share; lengths become None where no padding remains."""
    if waveform.ndim != 2 or not waveform.is_floating_point():
        raise UserError(
            f"the waveform is {waveform.dtype} of shape {tuple(waveform.shape)}; expected (B,S), floats with full "
            "scale 1.0: `predict` and `embed` take other types and shapes"
        )
    if lengths is None or lengths.numel() == 0:
        return waveform, None
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > waveform.shape[1] or lengths.shape != waveform.shape[:1]:
        raise UserError(f"lengths {lengths.tolist()} must be one number per clip, 1 to {waveform.shape[1]} samples")
    return waveform[:, :longest], None if shortest == longest else lengths


def run_by_length(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Run the clips of each length as a batch of their own, for networks that do not mask padding.

    Args:
        function: takes a batch without padding, returns tensors whose first axis is the batch.
        x: (B,...,T), padded along its last axis.
        lengths: (B,) valid length of each clip along T.

    Returns:
        The results in the order of the batch, shorter axes zero-padded.
    """
    pieces: list[tuple[Tensor, ...]] = []
    rows: list[Tensor] = []
    for length in lengths.unique().tolist():
        row = (lengths == length).nonzero().flatten().to(x.device)
        pieces.append(function(x[row][..., :length]))
        rows.append(row)
    original_order = torch.cat(rows).argsort()
    joined = []
    for results in zip(*pieces, strict=True):
        shape = [max(sizes) for sizes in zip(*(result.shape[1:] for result in results), strict=True)]
        padded = [result.new_zeros(len(result), *shape) for result in results]
        for target, result in zip(padded, results, strict=True):
            target[tuple(slice(size) for size in result.shape)] = result
        joined.append(torch.cat(padded)[original_order])
    return tuple(joined)
