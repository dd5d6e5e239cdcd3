"""What an objective is: what it needs, known from its settings alone, and the module that turns a batch into losses.

Adding one is a file in this folder: a dataclass of settings, and a subclass of `Objective` with
`@register_objective("name")`. A configuration names it with `objective: name` and gives its settings with
`objective_args`.

Shapes: B batch · C classes · E embedding width of the student · W of the teacher.
"""

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from common.errors import UserError, did_you_mean
from distill.batch import Batch
from models.base import Activation, AudioTagger, Outputs


@dataclass(frozen=True)
class Needs:
    """What an objective needs of a run; configuration, data, teacher and student follow from it.

    Attributes:
        targets: what `Batch.target` holds: of classes (B,C), a teacher's embeddings (B,W), or nothing. An unlabelled
            pack is enough for none.
        output: what the student's `classify` must give, of classes that targets or labels name; None where the
            objective does not use it, so that the student has no classes and its last layers are frozen.
        activation: what turns logits of student and teacher into probabilities; None where it does not matter.
        labels: `Batch.labels` (B,C) beside the targets.
        clusters: `Batch.cluster` (B,).
        teacher: where targets may come from. "no": from labels alone, or there are none. "optional": from labels, or
            from a teacher. "required": a teacher's, stored or computed while training. "online": computed while
            training, since it needs what is not stored.
        teacher_layers: layers of the teacher whose output `Batch.teacher` must hold, see `AudioTagger.encode`.
        mixup: whether mixtures of clips make sense.
        sample_rates: in hertz, at which `Batch.waveforms` must hold the clips, beside those of student and teacher.
        whole_student: whether every parameter of the student that learns gets a gradient in every step; False makes
            several processes look for those that do not.
    """

    targets: Literal["classes", "embeddings", "none"]
    output: Outputs | None = None
    activation: Activation | None = None
    labels: bool = False
    clusters: bool = False
    teacher: Literal["no", "optional", "required", "online"] = "no"
    teacher_layers: tuple[int, ...] = ()
    mixup: bool = True
    sample_rates: tuple[int, ...] = ()
    whole_student: bool = True


@dataclass(frozen=True)
class TrainingFacts:
    """What an objective is built with, beside its settings and the student.

    Attributes:
        seed: of the run; random masks, say, are functions of it, `Batch.epoch` and `Batch.item`.
        target_width: W of the teacher's embeddings; 0 where the targets are none.
    """

    seed: int = 0
    target_width: int = 0


class Objective(nn.Module):
    """Turns a batch into named losses by what it lets the student compute.

    It is built once, after the student, which it reads and does not keep: parameters of its own (a projection, say) are
    trained with the student's, are in the states of a run and no part of the student's checkpoint. Buffers and frozen
    parameters (of a moving-average teacher, say) are in the states too, and never in the optimiser; modules whose
    parameters are all frozen stay in evaluation mode.

    Args:
        settings: an instance of `Settings`.
        student: whose widths it may need.
        facts: of the run.
    """

    Settings: ClassVar[type]  # a frozen dataclass, which raises UserError where its values are out of range

    def __init__(self, settings: Any, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__()

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        """Return what it needs with these settings."""
        raise NotImplementedError

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch, scalars.

        Args:
            student: computes from `batch.mel` and `batch.n_frames`, the clips or their mixtures, augmented.
            batch: see `distill.dataset.Batch`. Under mixup `target` and `labels` are mixed already, each clip by its
                `mixup_weight` with its mirror in the batch. With an online teacher `target` is its output for the
                mixture, and `teacher` what it computed, where `needs` wants layers of it.

        Returns:
            `loss`, which is minimised, and others, which are logged.
        """
        raise NotImplementedError

    def after_step(self, student: AudioTagger, step: int, n_steps: int) -> None:
        """Update what changes with the student or with time: moving-average teachers, temperatures.

        Args:
            student: after the step.
            step: number of steps made so far, from 1.
            n_steps: of the whole run.
        """

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return means over the clips of a batch that `constant_loss` needs, tensors by name; empty where none does."""
        return {}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of the best constant output, which a network that learns nothing gives; None: not known.

        Args:
            means: of what `target_statistics` returned, over any number of clips.
        """
        return None

    def train(self, mode: bool = True) -> "Objective":
        """Switch to training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self.children():
            for part in module.modules():
                parameters = list(part.parameters())
                if parameters and not any(parameter.requires_grad for parameter in parameters):
                    part.eval()
        return self


@dataclass(frozen=True)
class ObjectivePlan:
    """An objective that was chosen and whose student is not there yet.

    Attributes:
        name: in a configuration.
        kind: its class.
        settings: of it.
    """

    name: str
    kind: type[Objective]
    settings: Any

    @property
    def needs(self) -> Needs:
        """What it needs."""
        return self.kind.needs(self.settings)

    def build(self, student: AudioTagger, facts: TrainingFacts | None = None) -> Objective:
        """Build it for a student."""
        return self.kind(self.settings, student, facts or TrainingFacts())


Kind = TypeVar("Kind", bound=type[Objective])
_OBJECTIVES: dict[str, tuple[type[Objective], dict[str, Any]]] = {}


def register_objective(name: str, **fixed: Any) -> Callable[[Kind], Kind]:
    """Make an objective known by `name`, with some of its settings fixed."""

    def register(kind: Kind) -> Kind:
        _OBJECTIVES[name] = kind, fixed
        return kind

    return register


def list_objectives(targets: str | None = None) -> list[str]:
    """Return the names of objectives, all of them or those whose `Settings` by default need such targets."""
    return [
        name
        for name, (kind, fixed) in _OBJECTIVES.items()
        if targets is None or kind.needs(kind.Settings(**fixed)).targets == targets
    ]


def plan_objective(name: str, offered: Mapping[str, Any] | None = None, /, **arguments: Any) -> ObjectivePlan:
    """Choose a registered objective and check its settings.

    Args:
        name: of it.
        offered: settings of a run, of which the objective takes those that it has.
        **arguments: its settings; a word of Python's own (`lambda`) is the field with a `_` behind it.

    Raises:
        UserError: an unknown name or setting, or a value out of range.
    """
    if name not in _OBJECTIVES:
        raise UserError(
            f"unknown objective {name!r}{did_you_mean(name, _OBJECTIVES)}; known are {', '.join(_OBJECTIVES)}"
        )
    kind, fixed = _OBJECTIVES[name]
    known = {_spelling(each.name): each.name for each in fields(kind.Settings) if each.name not in fixed}
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        sentences = (f"no argument {key!r}{did_you_mean(key, known)}" for key in unknown)
        raise UserError(f"objective {name} has {', and '.join(sentences)}")
    taken = {key: value for key, value in (offered or {}).items() if key in known}
    try:
        settings = kind.Settings(**fixed, **{known[key]: value for key, value in (taken | arguments).items()})
    except TypeError as error:
        raise UserError(f"objective {name}: {error}".replace("__init__() ", "")) from None
    except UserError as error:
        raise UserError(f"objective {name}: {error}") from None
    return ObjectivePlan(name, kind, settings)


def _spelling(field: str) -> str:
    """Return how a configuration spells a field: `lambda_` is `lambda`."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field
