"""A batch: what a training step knows of its clips, every field with its shape and unit."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.base import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips, their augmentation and their targets, one row a clip; `dataclasses.replace` makes changed copies.

    B clips, S samples of the longest, C classes, W width of a teacher's embedding, F mel bands, T
    frames. What is None is not there: the run does not need it, or it is yet to be computed.

    Attributes:
        item: (B,) int64, numbers of the items of the `distill.sources.TargetSource`.
        epoch: (B,) int64, the epoch that each item is shown in, counted from 1; a batch may hold the end of one and
            the beginning of the next. What is random about an item is a function of (seed, epoch, item).
        waveforms: {sample rate in Hz: (B, S) float32}, full scale at 1.0, zeros after each clip's end.
        lengths: {sample rate in Hz: (B,) int64}, samples of each clip; None, after `to`, where nothing is padded.
        value: (B,) float32 in [0, 1), how wide the masks are; see `distill.replay`.
        min_value: (B,) float32 in [0, 1), where they lie.
        n_reference: (B,) int64, samples of each clip at the reference rate of `distill.replay`.
        target: (B, C) float32, labels or a teacher's probabilities; (B, W), a teacher's embeddings; (B, 0) where an
            online teacher is yet to answer.
        mixup_weight: (B,) float32, each clip's share in the mixture with its mirror in the batch; 1 without mixup.
        labels: (B, C) float32, of the clips, where they are needed beside the target.
        cluster: (B,) int64, of each clip.
        sound_hash: (B,) int64, see `distill.sound_check`.
        mel: (B, F, T) float32, the student's input in the scale of its front-end, augmented and mixed; empty until
            `training.loss_module.LossModule` has computed it.
        n_frames: (B,) int64, frames of each clip in `mel`; None where nothing is padded.
        teacher: what an online teacher computed of the same clips, where the objective wants layers of it.
    """

    item: Tensor
    epoch: Tensor
    waveforms: dict[int, Tensor]
    lengths: dict[int, Tensor | None]
    value: Tensor
    min_value: Tensor
    n_reference: Tensor
    target: Tensor
    mixup_weight: Tensor
    labels: Tensor | None = None
    cluster: Tensor | None = None
    sound_hash: Tensor | None = None
    mel: Tensor = field(default_factory=lambda: torch.empty(0))
    n_frames: Tensor | None = None
    teacher: Encoded | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.item)

    def to(self, device: torch.device) -> "Batch":
        """Move to a device, without waiting for it; lengths become None at rates where nothing is padded."""
        full = {rate for rate, n in self.lengths.items() if n is None or (n == self.waveforms[rate].shape[1]).all()}
        moved = self._changed(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, lengths={rate: None if rate in full else n for rate, n in moved.lengths.items()})

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory, from which a GPU copies in the background; loaders call this."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch after a change of every tensor."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: changed(entry) for key, entry in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{name: changed(value) for name, value in vars(self).items()})
