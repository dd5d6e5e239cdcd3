"""The objective `cmkd`: a weighted sum of the losses of labels and of a teacher.

Method: cross-model knowledge distillation (Gong, Khurana, Rouditchenko, Glass, "CMKD: CNN/transformer-based cross-model
knowledge distillation for audio classification", arXiv 2203.06760, 2022) as FastAST trains (Behera et al., Interspeech
2024, equation 1).

Shapes: B batch · C classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Needs, Objective, TrainingFacts, register_objective
from distill.objectives.numbers import read_label_share, read_number
from distill.objectives.target import ClassLoss, TargetSettings, to_distribution
from models.base import AudioTagger

_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = 1 - torch.finfo(torch.float32).eps / 2  # the largest number below 1


@dataclass(frozen=True)
class CmkdSettings(TargetSettings):
    """Settings of `cmkd`.

    Attributes:
        loss: of the labels, see `ClassLoss`; it determines the activation.
        loss_args: of the loss of the labels; that of the teacher has none.
        label_smoothing: of the labels.
        lambda_: share of the labels, 0 to 1.
        tau: divides the teacher's logits, which are recomputed from its probabilities; 1 leaves these unchanged.
    """

    lambda_: Any = 0.1
    tau: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lambda_", read_label_share(self.lambda_))
        tau = read_number("tau", self.tau, lambda tau: 0 < tau < math.inf, "a number above 0")
        object.__setattr__(self, "tau", tau)


@register_objective("cmkd")
class CrossModelDistillation(Objective):
    """The weighted losses of labels and of a teacher's output.

    lambda * Loss_g(psi(Zs), y) + (1 - lambda) * Loss_d(psi(Zs), psi(Zt / tau)). The loss determines psi: sigmoid, where
    Loss_g is the binary cross-entropy and Loss_d the mean divergence of the classes' Bernoulli distributions; or
    softmax, with the cross-entropy and KL(teacher || student). As published, tau acts on the teacher alone and is not
    compensated by tau^2.
    """

    Settings = CmkdSettings

    def __init__(self, settings: CmkdSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.label_loss, self.teacher_loss = settings.build_class_loss(), ClassLoss(settings.loss, {})
        self.share, self.tau = settings.lambda_, settings.tau

    @classmethod
    def needs(cls, settings: CmkdSettings) -> Needs:
        """Return: a teacher's probabilities, and labels."""
        loss = settings.build_class_loss()
        return Needs("classes", loss.outputs, loss.activation, labels=True, teacher="required")

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses.

        Returns:
            `loss`, and its unweighted terms: `loss_labels`, and `loss_teacher`, which is 0 if student and teacher
            agree.
        """
        assert batch.labels is not None
        output = student.forward_spectrogram(batch.mel, batch.n_frames)
        label_loss = self.label_loss(output, batch.labels)
        # A difference of two similar numbers loses its digits in half precision.
        with torch.autocast(output.device.type, enabled=False):
            target = self._soften(batch.target.float())
            teacher_loss = self.teacher_loss(output.float(), target) - self._entropy(target)
        loss = self.share * label_loss + (1 - self.share) * teacher_loss
        return {"loss": loss, "loss_labels": label_loss, "loss_teacher": teacher_loss}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean of labels and teacher, weighted as the losses, and the teacher's mean entropy."""
        assert batch.labels is not None
        teacher = self._soften(batch.target.float())
        target = self.share * self.label_loss.compute_mean_target(batch.labels) + (1 - self.share) * teacher.mean(dim=0)
        return {"target": target, "teacher_entropy": self._entropy(teacher)}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of one output for all clips, the best one for labels and teacher together."""
        total = self.label_loss.constant_loss(means["target"])
        return None if total is None else total - (1 - self.share) * float(means["teacher_entropy"])

    def _soften(self, target: Tensor) -> Tensor:
        """Return psi(Zt / tau) for psi(Zt), (B, C) each; stored softmax probabilities are scaled to sum to one."""
        if self.label_loss.activation == "softmax":
            if self.tau == 1:
                return to_distribution(target)
            return (target.clamp_min(_SMALLEST).log() / self.tau).softmax(dim=1)
        return target if self.tau == 1 else (target.clamp(_SMALLEST, _LARGEST).logit() / self.tau).sigmoid()

    def _entropy(self, target: Tensor) -> Tensor:
        """Return the mean entropy of the distributions in `target` (B, C): one per class, or one per clip."""
        if self.label_loss.activation == "softmax":
            return torch.special.entr(target).sum(dim=1).mean()
        return (torch.special.entr(target) + torch.special.entr(1 - target)).mean()
