"""What a student is trained towards: an objective is an object that turns an output and a batch into losses.

Adding one is a class here with `@register_objective("name")`; a configuration names it with `objective: name` and
gives its arguments with `objective_args`.

Shapes: B batch · C classes.
"""

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError, did_you_mean
from distill.batch import Batch


class Objective(Protocol):
    """Turns what a model said and what the batch holds into named losses.

    One that is an `nn.Module` has its parameters trained with the student's. Under mixup the batch holds `mixup_weight`
    (B,): each clip's own share, the rest is its mirror's in the batch; `target` and `labels` are mixed already. With
    an online teacher, `target` is what it answered to the mixture.

    Attributes that may be left out: `activation`, "sigmoid" or "softmax", what turns the student's and the teacher's
    logits into probabilities; `needs_labels`, true where the batch must hold `labels` (B, C) beside `target`;
    `needs_embedding`, true where `target` is a teacher's embedding (B, W) and the batch must hold the student's,
    `embedding` (B, E): such an objective has `attach(E, W)`, called once before training, and with `wants` None it is
    given no output at all; and `needs_clusters`, true where the batch must hold `cluster` (B,) of each clip.

    Two methods that may be left out say what constant answers cost, which a network that learns nothing gives:
    `target_statistics(batch)` returns means over the clips of a batch, tensors by name, and `constant_loss(means)` the
    loss of the best constant answer, given these means over any number of clips; None where that is not known.
    """

    @property
    def wants(self) -> str | None:
        """What `output` must be: `logits`, `probabilities`, or None where it does not matter."""

    @property
    def sample_rates(self) -> Sequence[int]:
        """Rates at which it wants waveforms in the batch, beside the student's own (an online teacher's, say)."""

    def __call__(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the losses; `loss` is the one that is minimised, the others are logged."""


_OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def register_objective(name: str) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Make an objective known by `name`."""

    def register(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        _OBJECTIVES[name] = factory
        return factory

    return register


def create_objective(name: str, offered: Mapping[str, Any] | None = None, /, **arguments: Any) -> Objective:
    """Build a registered objective.

    Args:
        name: of it.
        offered: settings of a run, of which the objective is given those that it has arguments for.
        **arguments: for the objective; a word of Python's own (`lambda`) goes to the argument with a `_` behind it.

    Raises:
        UserError: an unknown name or argument.
    """
    if name not in _OBJECTIVES:
        raise UserError(
            f"unknown objective {name!r}{did_you_mean(name, _OBJECTIVES)}; known are {', '.join(_OBJECTIVES)}"
        )
    factory = _OBJECTIVES[name]
    parameters = inspect.signature(factory).parameters
    known = {_spelt(argument): argument for argument in parameters}
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = sorted(arguments.keys() - known.keys())
        if unknown:
            told = (f"no argument {key!r}{did_you_mean(key, known)}" for key in unknown)
            raise UserError(f"objective {name} has {', and '.join(told)}")
    taken = {key: value for key, value in (offered or {}).items() if key in known}
    try:
        return factory(**{known.get(key, key): value for key, value in (taken | arguments).items()})
    except TypeError as error:
        raise UserError(f"objective {name}: {error}".replace("__init__() ", "")) from None


def _spelt(argument: str) -> str:
    """Return how a configuration spells an argument: `lambda_` is `lambda`."""
    return argument[:-1] if argument.endswith("_") and keyword.iskeyword(argument[:-1]) else argument


class _SoftBCE(nn.BCELoss):
    """Binary cross-entropy of probabilities, computed in float32 whatever the precision around it."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return super().forward(output.float(), target.float())


class _SoftCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with a distribution for a target; multi-hot or top-k targets are scaled to sum to one."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output, target / target.sum(dim=1, keepdim=True).clamp_min(1e-8))


# name in a configuration → (loss, what it wants the model to give)
LOSSES: dict[str, tuple[type[nn.Module], str]] = {
    "BCELoss": (_SoftBCE, "probabilities"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, "logits"),
    "CrossEntropyLoss": (_SoftCrossEntropy, "logits"),
}


@register_objective("target")
class TargetLoss:
    """A loss between the output and the batch's target, hard or soft.

    Args:
        loss: a name in `LOSSES`.
        loss_args: its arguments, as `torch.nn` spells them. `reduction: none` is averaged over everything.
        label_smoothing: this part of a target becomes what a model that knows nothing says: 0.5, or 1/C under softmax.
    """

    sample_rates: Sequence[int] = ()

    def __init__(self, loss: str, loss_args: Mapping[str, Any], label_smoothing: float = 0.0) -> None:
        if loss not in LOSSES:
            raise UserError(f"unknown loss {loss!r}{did_you_mean(loss, LOSSES)}; known are {', '.join(LOSSES)}")
        factory, self.wants = LOSSES[loss]
        self.activation = "softmax" if loss == "CrossEntropyLoss" else "sigmoid"
        self.label_smoothing, self.loss_args = label_smoothing, dict(loss_args)
        try:
            self.loss = factory(**loss_args)
            self.loss(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))  # a wrong `reduction` is found when called
        except (TypeError, ValueError) as error:
            raise UserError(f"loss {loss}: {error}".replace("__init__() ", "")) from None

    def __call__(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return {loss: scalar} for `output` (B, C) and `batch.target` (B, C)."""
        return {"loss": self.loss(output, self._smoothed(batch.target)).mean()}

    def _smoothed(self, target: Tensor) -> Tensor:
        if not self.label_smoothing:
            return target
        if self.activation == "softmax":  # first to a distribution, of which a part is then spread evenly
            target = target / target.sum(dim=1, keepdim=True).clamp_min(1e-8)
        even = 1 / target.shape[1] if self.activation == "softmax" else 0.5
        return target + self.label_smoothing * (even - target)

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean target (C,) as the loss compares it with; see `Objective`."""
        target = self._smoothed(batch.target.float())
        if self.activation == "softmax":
            target = target / target.sum(dim=1, keepdim=True).clamp_min(1e-8)
        return {"target": target.mean(dim=0)}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of answering the mean target: its entropy, by classes or as one distribution.

        The loss is linear in the target, so that its mean over clips is that of the mean target. None where `loss_args`
        weigh classes or add up what others average.
        """
        if self.loss_args.get("reduction", "mean") == "sum" or self.loss_args.keys() - {"reduction"}:
            return None
        return mean_entropy(means["target"].double(), self.activation)


def mean_entropy(target: Tensor, activation: str) -> float:
    """Return the entropy of a mean target (C,): the mean of its classes' under sigmoid, that of all under softmax.

    Under softmax a mean target sums to less than one where clips have no label; what answers best is scaled to one.
    """
    if activation == "softmax":
        total = target.sum()
        return float(torch.special.entr(target).sum() + torch.special.xlogy(total, total))
    return float((torch.special.entr(target) + torch.special.entr(1 - target)).mean())


_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = 1 - torch.finfo(torch.float32).eps / 2  # the number below 1


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-1 as text
    except (TypeError, ValueError):
        raise UserError(f"objective cmkd: {name} is {value!r}, which is no number") from None


@register_objective("cmkd")
class CrossModelDistillation:
    """Labels and a teacher at once: cross-model knowledge distillation (Gong et al., "CMKD", 2022) as FastAST trains.

    lambda * Loss_g(psi(Zs), y) + (1 - lambda) * Loss_d(psi(Zs), psi(Zt / tau)) (Behera et al., "FastAST", Interspeech
    2024, equation 1). The task decides psi: sigmoid, where Loss_g is the binary cross-entropy and Loss_d the mean
    divergence of the classes' Bernoulli distributions; or softmax, with the cross-entropy and KL(teacher || student).
    As published, tau acts on the teacher alone and is not made up for by tau^2.

    Args:
        loss: a name in `LOSSES`, which says the task.
        loss_args: of Loss_g, see `TargetLoss`; Loss_d is a divergence as it stands.
        label_smoothing: of the labels, see `TargetLoss`.
        lambda_: share of the labels, 0 to 1.
        tau: divides the teacher's logits, which are found again from its probabilities; 1 takes these as they are.

    Raises:
        UserError: an unknown loss; numbers out of range.
    """

    sample_rates: Sequence[int] = ()
    needs_labels = True

    def __init__(
        self,
        loss: str,
        loss_args: Mapping[str, Any],
        label_smoothing: float = 0.0,
        lambda_: float = 0.1,
        tau: float = 1.0,
    ) -> None:
        self.to_labels = TargetLoss(loss, loss_args, label_smoothing)
        self.to_teacher = TargetLoss(loss, {})
        self.wants, self.activation = self.to_labels.wants, self.to_labels.activation
        self.share, self.tau = _number("lambda", lambda_), _number("tau", tau)
        if not 0 <= self.share <= 1:
            raise UserError(f"objective cmkd: lambda is {lambda_!r}; it is the share of the labels, from 0 to 1")
        if not 0 < self.tau < float("inf"):
            raise UserError(f"objective cmkd: tau is {tau!r}; wanted a number above 0")

    def __call__(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the losses.

        Args:
            output: (B, C), what `wants` says.
            batch: `labels` (B, C) of 0 and 1, or mixed; `target` (B, C), the teacher's probabilities.

        Returns:
            `loss`, and what it is made of before it is weighed: `loss_labels`, and `loss_teacher`, which is 0 where the
            student says what the teacher says.
        """
        assert batch.labels is not None
        to_labels = self.to_labels(output, replace(batch, target=batch.labels))["loss"]
        # What is left of two numbers much alike: computed in float32 whatever the precision around it.
        with torch.autocast(output.device.type, enabled=False):
            target = self._warmed(batch.target.float())
            to_teacher = self.to_teacher(output.float(), replace(batch, target=target))["loss"] - self._entropy(target)
        loss = self.share * to_labels + (1 - self.share) * to_teacher
        return {"loss": loss, "loss_labels": to_labels, "loss_teacher": to_teacher}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean of labels and teacher, weighed as the losses are, and the teacher's mean entropy."""
        assert batch.labels is not None
        labels = self.to_labels.target_statistics(replace(batch, target=batch.labels))["target"]
        teacher = self._warmed(batch.target.float())
        target = self.share * labels + (1 - self.share) * teacher.mean(dim=0)
        return {"target": target, "teacher_entropy": self._entropy(teacher)}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of one answer to all clips, that which suits labels and teacher together best."""
        both = self.to_labels.constant_loss(means)
        return None if both is None else both - (1 - self.share) * float(means["teacher_entropy"])

    def _warmed(self, target: Tensor) -> Tensor:
        """Return psi(Zt / tau) for psi(Zt), (B, C) each; a stored softmax answer is scaled to sum to one."""
        if self.activation == "softmax":
            if self.tau == 1:
                return target / target.sum(dim=1, keepdim=True).clamp_min(1e-8)
            return (target.clamp_min(_SMALLEST).log() / self.tau).softmax(dim=1)
        return target if self.tau == 1 else (target.clamp(_SMALLEST, _LARGEST).logit() / self.tau).sigmoid()

    def _entropy(self, target: Tensor) -> Tensor:
        """Return the mean entropy of the distributions that `target` (B, C) holds: one a class, or one a clip."""
        if self.activation == "softmax":
            return torch.special.entr(target).sum(dim=1).mean()
        return (torch.special.entr(target) + torch.special.entr(1 - target)).mean()
