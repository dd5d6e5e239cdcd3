"""Sounds made by formula, and batches of them."""

import torch
from torch import Tensor


def noise(n_samples: int, seed: int = 0, level: float = 0.1) -> Tensor:
    """White noise (S,) that is the same at every call."""
    return torch.randn(n_samples, generator=torch.Generator().manual_seed(seed)) * level


def padded(clips: list[Tensor], filling: float = 0.7) -> tuple[Tensor, Tensor]:
    """A batch (B,S) with loud padding, which finds out who looks behind a clip's end, and the lengths (B,)."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.full((len(clips), int(lengths.max())), filling)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch, lengths
