"""The objective `target`: a loss between the student's output and targets of classes, hard or soft.

Shapes: B batch · C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, did_you_mean
from distill.batch import Batch
from distill.objectives.base import Needs, Objective, TrainingFacts, register_objective
from models.base import Activation, AudioTagger, Outputs


class _SoftBCE(nn.BCELoss):
    """Binary cross-entropy of probabilities, computed in float32 at any precision."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return super().forward(output.float(), target.float())


class _SoftCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with a distribution for a target; multi-hot or top-k targets are scaled to sum to one."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output, to_distribution(target))


# name in a configuration → loss, required output of the model
LOSSES: dict[str, tuple[type[nn.Module], Outputs]] = {
    "BCELoss": (_SoftBCE, "probabilities"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, "logits"),
    "CrossEntropyLoss": (_SoftCrossEntropy, "logits"),
}


def to_distribution(target: Tensor) -> Tensor:
    """Scale multi-hot or top-k targets (B, C) so that those of a clip sum to one."""
    return target / target.sum(dim=1, keepdim=True).clamp_min(1e-8)


class ClassLoss:
    """A loss of `LOSSES` between an output and targets of classes.

    Args:
        loss: its name.
        loss_args: its arguments, as `torch.nn` spells them. `reduction: none` is averaged over clips and classes.
        label_smoothing: weight of the uniform target: 0.5, or 1/C under softmax.

    Attributes:
        outputs: the required output of the model.
        activation: from logits to probabilities.

    Raises:
        UserError: an unknown loss or argument.
    """

    def __init__(self, loss: str, loss_args: Mapping[str, Any], label_smoothing: float = 0.0) -> None:
        if loss not in LOSSES:
            raise UserError(f"unknown loss {loss!r}{did_you_mean(loss, LOSSES)}; known are {', '.join(LOSSES)}")
        factory, self.outputs = LOSSES[loss]
        self.activation: Activation = "softmax" if loss == "CrossEntropyLoss" else "sigmoid"
        self.label_smoothing, self.loss_args = label_smoothing, dict(loss_args)
        try:
            self.loss = factory(**loss_args)
            self.loss(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))  # a wrong `reduction` is found when called
        except (TypeError, ValueError) as error:
            raise UserError(f"loss {loss}: {error}".replace("__init__() ", "")) from None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `output` (B, C), as in `outputs`, for `target` (B, C): a scalar."""
        return self.loss(output, self._smooth(target)).mean()

    def _smooth(self, target: Tensor) -> Tensor:
        if not self.label_smoothing:
            return target
        if self.activation == "softmax":  # smoothing mixes two distributions, so the target must be one
            target = to_distribution(target)
        uniform = 1 / target.shape[1] if self.activation == "softmax" else 0.5
        return target + self.label_smoothing * (uniform - target)

    def compute_mean_target(self, target: Tensor) -> Tensor:
        """Return the mean over clips of the smoothed and scaled `target` (B, C): (C,)."""
        target = self._smooth(target.float())
        return (to_distribution(target) if self.activation == "softmax" else target).mean(dim=0)

    def constant_loss(self, mean_target: Tensor) -> float | None:
        """Return the loss of the mean target (C,) as the output for all clips: its entropy.

        The loss is linear in the target, so that its mean over clips is that of the mean target. None where `loss_args`
        weight classes, or sum instead of averaging.
        """
        if self.loss_args.get("reduction", "mean") == "sum" or self.loss_args.keys() - {"reduction"}:
            return None
        return compute_mean_entropy(mean_target.double(), self.activation)


def compute_mean_entropy(target: Tensor, activation: str) -> float:
    """Return the entropy of a mean target (C,): the mean over classes, or of the distribution under softmax.

    Under softmax a mean target sums to less than one if clips have no label; the best output is scaled to one.
    """
    if activation == "softmax":
        total = target.sum()
        return float(torch.special.entr(target).sum() + torch.special.xlogy(total, total))
    return float((torch.special.entr(target) + torch.special.entr(1 - target)).mean())


@dataclass(frozen=True)
class TargetSettings:
    """Settings of `target`, which are keys of a configuration, not of `objective_args`.

    Attributes:
        loss: see `ClassLoss`.
        loss_args: likewise.
        label_smoothing: likewise.
    """

    loss: str = "BCEWithLogitsLoss"
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        self.build_class_loss()  # raises before data are opened

    def build_class_loss(self) -> ClassLoss:
        """Build the loss."""
        return ClassLoss(self.loss, self.loss_args, self.label_smoothing)


@register_objective("target")
class TargetLoss(Objective):
    """The loss of the student's output for `Batch.target`: labels, stored soft targets, or a teacher's output."""

    Settings = TargetSettings

    def __init__(self, settings: TargetSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.class_loss = settings.build_class_loss()

    @classmethod
    def needs(cls, settings: TargetSettings) -> Needs:
        """Return: targets of classes, from labels or a teacher."""
        loss = settings.build_class_loss()
        return Needs("classes", loss.outputs, loss.activation, teacher="optional")

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar}."""
        return {"loss": self.class_loss(student.forward_spectrogram(batch.mel, batch.n_frames), batch.target)}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean target (C,), smoothed and scaled as in the loss."""
        return {"target": self.class_loss.compute_mean_target(batch.target)}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the entropy of the mean target."""
        return self.class_loss.constant_loss(means["target"])
