"""Base class of objectives: their needs, which follow from the settings alone, and the losses of a batch.

Adding one is a file in this folder: a dataclass of settings, and a subclass of `Objective` with
`@register_objective("name")`. A configuration names it with `objective: name` and gives its settings with
`objective_args`.

Shapes: B batch · C classes · E embedding width of the student · W of the teacher, or of all teachers together.
"""

import keyword
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import getattr_static
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import Tensor, nn

from common.errors import UserError, did_you_mean
from distill.batch import Batch
from models.base import Activation, AudioTagger, Outputs


@dataclass(frozen=True)
class Needs:
    """Requirements of an objective; the checks of a configuration, its data, teacher and student follow from them.

    Attributes:
        targets: contents of `Batch.target`: of classes (B,C), the embeddings of one or several teachers (B,W), or
            nothing. For none, an unlabelled pack is enough.
        output: output of the student's `classify`, for the classes of targets or labels; None if the objective does not
            use it: the student then has no classes and its last layers are frozen.
        activation: from logits of student and teacher to probabilities; None for any.
        labels: whether `Batch.labels` (B,C) is needed besides the targets.
        clusters: whether `Batch.cluster` (B,) is needed.
        teacher: source of the targets. "no": labels, or none. "optional": labels or a teacher. "required": a teacher,
            stored or run during training. "online": a teacher that runs during training.
        teacher_layers: layers of an online teacher for `Batch.teacher`, see `AudioTagger.encode`.
        mixup: whether mixtures of clips are supported.
        sample_rates: of further `Batch.waveforms`, in hertz, besides those of student and teacher.
        whole_student: whether every trained parameter of the student gets a gradient in every step; with False, several
            processes search for those without.
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

    def __post_init__(self) -> None:
        choices = {name: get_args(self.__annotations__[name]) for name in ("targets", "teacher")}
        for name, valid in (choices | {"output": (*get_args(Outputs), None)}).items():
            if getattr(self, name) not in valid:
                raise ValueError(f"Needs: {name} is {getattr(self, name)!r}; expected {', '.join(map(repr, valid))}")
        if self.teacher_layers and self.teacher != "online":
            raise ValueError('Needs: teacher_layers are computed during training; set teacher="online"')


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a run that objectives are built with.

    Attributes:
        seed: of the run; random masks, for example, are functions of it, `Batch.epoch` and `Batch.item`.
        target_widths: width of each teacher's embeddings, W together; empty for other targets.
    """

    seed: int = 0
    target_widths: tuple[int, ...] = ()


class Objective(nn.Module):
    """Computes the named losses of a batch with the student.

    It is built once, after the student, which it may read but must not keep. Its own parameters (of a projection, for
    example) are trained with the student's; they are in the states of a run and not in the student's checkpoint.
    Buffers and frozen parameters (of a moving-average teacher, say) are in the states and never in the optimiser;
    modules whose parameters are all frozen stay in evaluation mode.

    Args:
        settings: an instance of `Settings`.
        student: for its widths.
        facts: of the run.
    """

    Settings: ClassVar[type]  # a frozen dataclass, which raises UserError where its values are out of range

    def __init__(self, settings: Any, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        """Return the requirements with these settings."""
        raise NotImplementedError

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch, scalars.

        Args:
            student: its input is `batch.mel` with `batch.n_frames`, the augmented clips or their mixtures.
            batch: under mixup `target` and `labels` are mixed already, each clip by its `mixup_weight` with its mirror
                in the batch. With an online teacher `target` is its output for the mixture, and `teacher` has the
                layers of `Needs.teacher_layers`.

        Returns:
            `loss`, which is minimised, and others, which are logged.
        """
        raise NotImplementedError

    def start(self, student: AudioTagger) -> None:
        """Prepare for the first step of a run, after the student was initialised from data; not called on resume."""

    def after_step(self, student: AudioTagger, step: int, n_steps: int) -> None:
        """Update everything that depends on the student or the step: moving-average teachers, temperatures.

        Args:
            student: after the step.
            step: number of completed steps, from 1.
            n_steps: of the whole run.
        """

    def describe_collapse(self, means: Mapping[str, float]) -> str | None:
        """Return a sentence if the output of the student no longer depends on its input; None otherwise.

        Args:
            means: of what `forward` returned, over the steps of an epoch.
        """
        return None

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return means over the clips of a batch for `constant_loss`, tensors by name; empty by default."""
        return {}

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of the best constant output, the limit without any learning; None: unknown.

        Args:
            means: of `target_statistics`, over any number of clips.
        """
        return None

    def train(self, mode: bool = True) -> "Objective":
        """Switch between training and evaluation mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self.children():
            for part in module.modules():
                parameters = list(part.parameters())
                if parameters and not any(parameter.requires_grad for parameter in parameters):
                    part.eval()
        return self


@dataclass(frozen=True)
class ObjectivePlan:
    """An objective with its settings, before there is a student.

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
        """The requirements of the objective."""
        return self.kind.needs(self.settings)

    def build(self, student: AudioTagger, facts: TrainingFacts | None = None) -> Objective:
        """Build it for a student."""
        return self.kind(self.settings, student, facts or TrainingFacts())


Kind = TypeVar("Kind", bound=type[Objective])
_OBJECTIVES: dict[str, tuple[type[Objective], dict[str, Any]]] = {}


def register_objective(name: str, **fixed: Any) -> Callable[[Kind], Kind]:
    """Register an objective as `name`, with some of its settings fixed.

    Raises:
        TypeError: the class is not a complete objective.
    """

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise TypeError(f"objective {name}: expected a subclass of Objective, got {kind!r}")
        # Each access to a class method gives a new object: the definitions are compared.
        missing = [
            each for each in ("needs", "forward") if getattr_static(kind, each) is getattr_static(Objective, each)
        ]
        settings = getattr(kind, "Settings", None)
        if is_dataclass(settings):
            required = (each for each in fields(settings) if each.default is each.default_factory is MISSING)
            missing += [f"a default of the setting {each.name}" for each in required]
        else:
            missing.append("a dataclass Settings")
        if missing:
            raise TypeError(f"objective {name}: {kind.__name__} lacks {', '.join(missing)}")
        _OBJECTIVES[name] = kind, fixed
        return kind

    return register


def list_objectives(targets: str | None = None) -> list[str]:
    """Return the names of objectives, all, or those with such targets by default."""
    return [
        name
        for name, (kind, fixed) in _OBJECTIVES.items()
        if targets is None or kind.needs(kind.Settings(**fixed)).targets == targets
    ]


def plan_objective(name: str, offered: Mapping[str, Any] | None = None, /, **arguments: Any) -> ObjectivePlan:
    """Return a registered objective with its checked settings.

    Args:
        name: of it.
        offered: settings of a run, of which the objective uses those that it has.
        **arguments: its settings; a Python keyword (`lambda`) is the field with a trailing `_`.

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
    """Return the name of a field in configurations: `lambda` for `lambda_`."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field
