"""Mixup on the spectrogram (Zhang et al., ICLR 2018), as CED trains: every clip with its mirror in the batch.

CED's loss of a mixture is the mixture of the losses. Binary cross-entropy is linear in the target, so that is the loss
of the mixed target, and only targets and spectrograms are touched; so it is for cross-entropy with targets that sum to
one.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def mix_with_flipped(
    mel: Tensor,
    n_frames: Tensor | None,
    batch: dict[str, Any],
    alpha: float,
    stream: np.random.Generator,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Mix a batch with itself in reverse order, each clip with a weight of its own.

    Args:
        mel: (B, F, T); a front-end writes silence where a clip has ended, so a shorter partner is silent there.
        n_frames: (B,) each clip's own frames, or None where all are T.
        batch: holds `target` (B, C).
        alpha: the weights are drawn from Beta(alpha, alpha).
        stream: to draw from.

    Returns:
        The mixed spectrogram, the frames of each mixture, and the batch with mixed targets and `mixup_weight` (B,).
    """
    weight = torch.from_numpy(stream.beta(alpha, alpha, len(mel)).astype(np.float32)).to(mel.device)  # (B,)
    if n_frames is not None:
        n_frames = torch.maximum(n_frames, n_frames.flip(0))
    target = batch["target"]
    mixed = torch.lerp(mel.flip(0), mel, weight[:, None, None])
    mixed_target = torch.lerp(target.flip(0), target, weight[:, None])
    return mixed, n_frames, batch | {"target": mixed_target, "mixup_weight": weight}
