"""Long clips in pieces: split their spectrograms, and join what a network says about the pieces.

Letters: B clips, F mel bands, T frames, R chunks of all clips, C classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Average = Literal["mean", "max"]


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


def join(rows: Tensor, clip: Tensor, n_clips: int, average: Average) -> Tensor:
    """Mean or maximum over the chunks of each clip.

    Args:
        rows: (R,C).
        clip: (R,) the clip that each row belongs to, int64.
        n_clips: B.
        average: "mean" or "max".

    Returns:
        (B,C).
    """
    joined = rows.new_zeros(n_clips, rows.shape[1])
    how = "amax" if average == "max" else "mean"
    return joined.scatter_reduce(0, clip[:, None].expand_as(rows), rows, how, include_self=False)


def join_logits(rows: Tensor, clip: Tensor, n_clips: int, average: Average, activation: str) -> Tensor:
    """Logits of the joined probabilities, so that logits and probabilities of a long clip agree.

    Args:
        rows: logits (R,C).
        clip: (R,) the clip that each row belongs to, int64.
        n_clips: B.
        average: "mean" or "max" of probabilities.
        activation: "sigmoid" or "softmax".

    Returns:
        (B,C) float32, whose activation is the joined probability.
    """
    rows = rows.float()
    tiny = torch.finfo(rows.dtype).tiny
    if activation == "softmax":
        return join(rows.softmax(-1), clip, n_clips, average).clamp(min=tiny).log()
    if average == "max":
        return join(rows, clip, n_clips, average)  # the sigmoid is monotonous
    present = join(rows.sigmoid(), clip, n_clips, average).clamp(min=tiny)
    absent = join((-rows).sigmoid(), clip, n_clips, average).clamp(min=tiny)  # not 1 - present: that rounds to 0
    return present.log() - absent.log()
