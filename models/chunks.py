"""Long clips in pieces: split their spectrograms, and join what a network gives for the pieces.

Chunks follow each other without overlap; only the last one can be shorter, and is filled up. A remainder shorter than a
patch makes no chunk of its own: it has no column in a patch grid, and its frames belong to the chunk before, as far as
that one's grid takes them. Chunks are joined by their own frames, so that a clip's result changes little with one frame
more or less. CED's published code does neither (one frame makes a chunk that counts as much as a whole one), and CED's
networks here do as it does.

Letters: B clips, F mel bands, T frames, R chunks of all clips, C classes.
"""

from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Average = Literal["mean", "max"]
Count = TypeVar("Count", int, Tensor)


def drop_remainder(n_frames: Count, chunk: int, least: int) -> Count:
    """Count the frames of clips without a remainder behind whole chunks that is too short for a chunk of its own.

    Args:
        n_frames: of a clip, or (B,) of clips.
        chunk: frames of a chunk.
        least: frames of the shortest remainder that is kept.
    """
    remainder = n_frames % chunk
    return n_frames - remainder * ((remainder < least) & (n_frames > chunk))


def split(mel: Tensor, n_frames: Tensor | None, chunk: int, fill: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Cut clips into chunks, the last of each filled up.

    Args:
        mel: (B,F,T).
        n_frames: (B,) frames of each clip, None where all of T belong to it.
        chunk: frames of a chunk.
        fill: what the rest of the last chunk reads.

    Returns:
        The chunks (R,F,chunk) in the order of the clips, how many of a chunk's frames are its clip's own (R,), and the
        clip of each chunk (R,).
    """
    n_total = mel.shape[2]
    n_chunks = -(-n_total // chunk)
    frames = torch.full((len(mel),), n_total, device=mel.device) if n_frames is None else n_frames
    alien = torch.arange(n_total, device=mel.device) >= frames[:, None]  # (B,T)
    mel = F.pad(mel.masked_fill(alien[:, None], fill), (0, n_chunks * chunk - n_total), value=fill)
    chunks = mel.unflatten(2, (n_chunks, chunk)).transpose(1, 2)  # (B, n_chunks, F, chunk)
    start = torch.arange(n_chunks, device=mel.device) * chunk
    used = start < frames[:, None]  # (B, n_chunks)
    inside = (frames[:, None] - start).clamp(max=chunk)
    return chunks[used], inside[used], used.nonzero()[:, 0]


def join(rows: Tensor, clip: Tensor, n_clips: int, average: Average, weights: Tensor | None = None) -> Tensor:
    """Mean or maximum over the chunks of each clip.

    Args:
        rows: (R,C).
        clip: (R,) the clip that each row belongs to, int64.
        n_clips: B.
        average: "mean" or "max".
        weights: (R,) of the rows in a mean, None where all count the same.

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
    """Logits of the joined probabilities, so that logits and probabilities of a long clip agree.

    Args:
        rows: logits (R,C).
        clip: (R,) the clip that each row belongs to, int64.
        n_clips: B.
        average: "mean" or "max" of probabilities.
        activation: "sigmoid" or "softmax".
        weights: (R,) of the rows in a mean, None where all count the same.

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
    absent = join((-rows).sigmoid(), clip, n_clips, average, weights).clamp(min=tiny)  # 1 - present rounds to 0
    return present.log() - absent.log()
