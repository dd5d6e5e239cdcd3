"""What a student is trained towards: an objective is an object that turns an output and a batch into losses.

Adding one is a class here with `@register_objective("name")`; a configuration names it with `objective: name` and
gives its arguments with `objective_args`.

Shapes: B batch · C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError, did_you_mean


class Objective(Protocol):
    """Turns what a model said and what the batch holds into named losses.

    One that is an `nn.Module` has its parameters trained with the student's. Under mixup the batch holds `mixup_weight`
    (B,): each clip's own share, the rest is its mirror's in the batch; `target` is mixed already.
    """

    @property
    def wants(self) -> str | None:
        """What `output` must be: `logits`, `probabilities`, or None where it does not matter."""

    @property
    def sample_rates(self) -> Sequence[int]:
        """Rates at which it wants waveforms in the batch, beside the student's own (an online teacher's, say)."""

    def __call__(self, output: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the losses; `loss` is the one that is minimised, the others are logged."""


_OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def register_objective(name: str) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Make an objective known by `name`."""

    def register(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        _OBJECTIVES[name] = factory
        return factory

    return register


def create_objective(name: str, **arguments: Any) -> Objective:
    """Build a registered objective; a `UserError` tells an unknown name or argument."""
    if name not in _OBJECTIVES:
        raise UserError(
            f"unknown objective {name!r}{did_you_mean(name, _OBJECTIVES)}; known are {', '.join(_OBJECTIVES)}"
        )
    try:
        return _OBJECTIVES[name](**arguments)
    except TypeError as error:
        raise UserError(f"objective {name}: {error}") from None


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
        self.label_smoothing = label_smoothing
        try:
            self.loss = factory(**loss_args)
            self.loss(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))  # a wrong `reduction` is found when called
        except (TypeError, ValueError) as error:
            raise UserError(f"loss {loss}: {error}".replace("__init__() ", "")) from None

    def __call__(self, output: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return {loss: scalar} for `output` (B, C) and `batch["target"]` (B, C)."""
        target = batch["target"]
        if self.label_smoothing:
            if self.activation == "softmax":  # first to a distribution, of which a part is then spread evenly
                target = target / target.sum(dim=1, keepdim=True).clamp_min(1e-8)
            even = 1 / target.shape[1] if self.activation == "softmax" else 0.5
            target = target + self.label_smoothing * (even - target)
        return {"loss": self.loss(output, target).mean()}
