"""Mixup (Zhang et al., ICLR 2018) on the spectrogram or the waveform, as CED trains: every clip with its mirror.

CED's loss of a mixture is the mixture of the losses. Binary cross-entropy is linear in the target, so that is the loss
of the mixed target, and only targets and sounds are touched; so it is for cross-entropy with targets that sum to one.
The weights come with the batch, drawn for each clip and epoch: see `distill.dataset.ReplayDataset`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distill.batch import Batch


def mix_targets(batch: Batch) -> Batch:
    """Return the batch with `target`, and `labels` where it has them, mixed with their mirror by `mixup_weight`."""
    labels = None if batch.labels is None else _mixed(batch.labels, batch.mixup_weight)
    return replace(batch, target=_mixed(batch.target, batch.mixup_weight), labels=labels)


def mix_spectrograms(mel: Tensor, n_frames: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mix a batch of spectrograms with its mirror.

    Args:
        mel: (B, F, T); a front-end writes silence where a clip has ended, so a shorter partner is silent there.
        n_frames: (B,) each clip's own frames, or None where all are T.
        weight: (B,) each clip's share.

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
