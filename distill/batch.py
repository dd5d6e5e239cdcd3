"""A batch: the input of a training step, every field with its shape and unit."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.base import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips, their augmentation and their targets, one row a clip; `dataclasses.replace` makes changed copies.

    B clips, S samples of the longest, C classes, W width of a teacher's embedding (of several: the sum), F mel bands, T
    frames. A field is None if the run does not need it, or if it is not computed yet.

    Attributes:
        item: (B,) int64, numbers of the items of the `distill.sources.TargetSource`.
        epoch: (B,) int64, the epoch of each item, counted from 1; a batch may contain the end of one and the beginning
            of the next. All random numbers of an item are a function of (seed, epoch, item).
        waveforms: {sample rate in Hz: (B, S) float32}, full scale at 1.0, zeros after each clip's end.
        lengths: {sample rate in Hz: (B,) int64}, samples of each clip; None, after `to`, without padding.
        value: (B,) float32 in [0, 1), width of the masks, see `distill.replay`.
        min_value: (B,) float32 in [0, 1), position of the masks.
        n_reference: (B,) int64, samples of each clip at the reference rate of `distill.replay`.
        target: (B, C) float32, labels or a teacher's probabilities; (B, W), the embeddings of one teacher, or of
            several side by side; (B, 0) before an online teacher has run.
        mixup_weight: (B,) float32, each clip's share in the mixture with its mirror in the batch; 1 without mixup.
        labels: (B, C) float32, of the clips, if they are needed besides the target.
        cluster: (B,) int64, of each clip.
        sound_hash: (B,) int64, see `distill.sound_check`.
        mel: (B, F, T) float32, the student's input in the scale of its front-end, augmented and mixed; empty until
            `training.loss_module.LossModule` has computed it.
        n_frames: (B,) int64, frames of each clip in `mel`; None without padding.
        teacher: output of an online teacher for the same clips, if the objective needs its layers.
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
        """Move to a device asynchronously; lengths become None at rates without padding."""
        full = {rate for rate, n in self.lengths.items() if n is None or (n == self.waveforms[rate].shape[1]).all()}
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, lengths={rate: None if rate in full else n for rate, n in moved.lengths.items()})

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory, from which a GPU copies in the background; loaders call this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch after a change of every tensor."""

        def map_value(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: map_value(entry) for key, entry in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{name: map_value(value) for name, value in vars(self).items()})
