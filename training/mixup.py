"""Mixup (Zhang et al., ICLR 2018) of spectrograms or waveforms as in CED: every clip with its mirror in the batch.

CED's loss of a mixture is the mixture of the losses. Binary cross-entropy is linear in the target, so that is the loss
of the mixed target, and only targets and inputs are mixed; the same holds for cross-entropy if targets sum to one.
The weights come with the batch, drawn for each clip and epoch: see `distill.dataset.ReplayDataset`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distill.batch import Batch


def mix_targets(batch: Batch) -> Batch:
    """Return the batch with `target`, and `labels` if it has any, mixed with their mirror by `mixup_weight`."""
    labels = None if batch.labels is None else _mixed(batch.labels, batch.mixup_weight)
    return replace(batch, target=_mixed(batch.target, batch.mixup_weight), labels=labels)


def mix_spectrograms(mel: Tensor, n_frames: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mix a batch of spectrograms with its mirror.

    Args:
        mel: (B, F, T); front-ends pad with silence, so the shorter clip is silent at its end.
        n_frames: (B,) number of frames of each clip, or None if all are T.
        weight: (B,) weight of each clip.

    Returns:
        The mixtures (B, F, T) and the frames of each.
    """
    return _mixed(mel, weight), None if n_frames is None else torch.maximum(n_frames, n_frames.flip(0))


def mix_waveforms(batch: Batch) -> Batch:
    """Return the batch with its waveforms mixed with their mirror, at every rate."""
    lengths = {rate: None if n is None else torch.maximum(n, n.flip(0)) for rate, n in batch.lengths.items()}
    waveforms = {rate: _mixed(waveform, batch.mixup_weight) for rate, waveform in batch.waveforms.items()}
    return replace(batch, waveforms=waveforms, lengths=lengths)


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(x.flip(0), x, weight.view(-1, *[1] * (x.ndim - 1)))
