"""Splitting of long spectrograms into chunks, and joining of the outputs for the chunks of a clip.

Chunks do not overlap; only the last one can be shorter, and is padded. A remainder shorter than a patch is dropped: it
would have no column in the patch grid. Chunks are weighted by their valid frames, so that one frame more or less
changes a clip's output little. CED's published code does neither (a single frame makes a chunk with the weight of a
full one), and CED's networks here follow it.

Letters: B clips, F mel bands, T frames, R chunks of all clips, C classes.
"""

from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Average = Literal["mean", "max"]
Count = TypeVar("Count", int, Tensor)


def drop_remainder(n_frames: Count, chunk: int, least: int) -> Count:
    """Subtract a remainder after full chunks that is too short for a chunk of its own.

    Args:
        n_frames: frames of a clip, or (B,) of clips.
        chunk: frames of a chunk.
        least: shortest remainder that is kept, in frames.
    """
    remainder = n_frames % chunk
    return n_frames - remainder * ((remainder < least) & (n_frames > chunk))


def split(mel: Tensor, n_frames: Tensor | None, chunk: int, fill: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Split clips into chunks, the last one of each padded.

    Args:
        mel: (B,F,T).
        n_frames: (B,) frames of each clip, None for T.
        chunk: frames of a chunk.
        fill: value of the padding.

    Returns:
        The chunks (R,F,chunk) in the order of the clips, the valid frames of each (R,), and its clip (R,).
    """
    n_total = mel.shape[2]
    n_chunks = -(-n_total // chunk)
    frames = torch.full((len(mel),), n_total, device=mel.device) if n_frames is None else n_frames
    is_padding = torch.arange(n_total, device=mel.device) >= frames[:, None]  # (B,T)
    mel = F.pad(mel.masked_fill(is_padding[:, None], fill), (0, n_chunks * chunk - n_total), value=fill)
    chunks = mel.unflatten(2, (n_chunks, chunk)).transpose(1, 2)  # (B, n_chunks, F, chunk)
    start = torch.arange(n_chunks, device=mel.device) * chunk
    used = start < frames[:, None]  # (B, n_chunks)
    n_valid = (frames[:, None] - start).clamp(max=chunk)
    return chunks[used], n_valid[used], used.nonzero()[:, 0]


def join(rows: Tensor, clip: Tensor, n_clips: int, average: Average, weights: Tensor | None = None) -> Tensor:
    """Compute the mean or maximum over the chunks of each clip.

    Args:
        rows: (R,C).
        clip: (R,) clip of each row, int64.
        n_clips: B.
        average: "mean" or "max".
        weights: (R,) of the rows in a mean, None for equal weights.

    Returns:
        (B,C).
    """
    joined = rows.new_zeros(n_clips, rows.shape[1])
    if average == "max" or weights is None:
        how = "amax" if average == "max" else "mean"
        return joined.scatter_reduce(0, clip[:, None].expand_as(rows), rows, how, include_self=False)
    weights = weights.to(rows.dtype)
    share = weights / weights.new_zeros(n_clips).index_add_(0, clip, weights)[clip]
    return joined.index_add_(0, clip, rows * share[:, None])


def join_logits(
    rows: Tensor, clip: Tensor, n_clips: int, average: Average, activation: str, weights: Tensor | None = None
) -> Tensor:
    """Compute the logits of the joined probabilities, so that logits and probabilities of a long clip agree.

    Args:
        rows: logits (R,C).
        clip: (R,) clip of each row, int64.
        n_clips: B.
        average: "mean" or "max" of probabilities.
        activation: "sigmoid" or "softmax".
        weights: (R,) of the rows in a mean, None for equal weights.

    Returns:
        (B,C) float32, whose activation is the joined probability.
    """
    rows = rows.float()
    tiny = torch.finfo(rows.dtype).tiny
    if activation == "softmax":
        return join(rows.softmax(-1), clip, n_clips, average, weights).clamp(min=tiny).log()
    if average == "max":
        return join(rows, clip, n_clips, average)  # the sigmoid is monotonous
    present = join(rows.sigmoid(), clip, n_clips, average, weights).clamp(min=tiny)
    absent = join((-rows).sigmoid(), clip, n_clips, average, weights).clamp(min=tiny)  # 1 - present would round to 0
    return present.log() - absent.log()


def join_steps(steps: Tensor, own: Tensor, clip: Tensor | None, n_clips: int) -> tuple[Tensor, Tensor]:
    """Join the time steps of the chunks of each clip.

    Args:
        steps: (R,t,D).
        own: which of them are their clip's (R,t).
        clip: (R,) clip of each row, ascending; None where every clip is one row.
        n_clips: B.

    Returns:
        A clip's own steps, in the places that they have where every clip is one row, else side by side; zero elsewhere,
        (B,T',D), and their number (B,).
    """
    number = own.sum(1)
    if clip is None:
        return steps.masked_fill(~own[..., None], 0.0), number
    number = number.new_zeros(n_clips).index_add_(0, clip, number)
    joined = steps.new_zeros(n_clips, int(number.max()), steps.shape[2])
    joined[torch.arange(joined.shape[1], device=steps.device) < number[:, None]] = steps[own]
    return joined, number


def mean_of_chunks(x: Tensor, inside: Tensor) -> Tensor:
    """Mean over the chunks of each clip, by their frames: (B,chunks,D), own frames 1 (chunks,frames) -> (B,D)."""
    share = inside.sum(1, keepdim=True) / inside.sum()  # (chunks,1)
    return (x * share).sum(1)
