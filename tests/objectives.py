"""Objectives on given outputs and embeddings, without a network."""

from collections.abc import Callable
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from distill.batch import Batch
from distill.objectives import Needs, Objective, TrainingFacts, plan_objective, register_objective
from models import AudioTagger


class GivenStudent:
    """A student whose output and clip embeddings are given."""

    def __init__(self, output: Tensor | None = None, embedding: Tensor | None = None) -> None:
        self.output, self.embedding = output, embedding

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        return self.output

    def embed_clips(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        return self.embedding

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.output, self.embedding


def define_objective(
    name: str, needs: Needs, compute: Callable[..., dict[str, Tensor]], /, **defaults: Any
) -> type[Objective]:
    """Register an objective with these settings whose losses are `compute(objective, student, batch)`."""

    class Defined(Objective):
        Settings = make_dataclass(
            "Settings", [(key, type(value), value) for key, value in defaults.items()], frozen=True
        )

        @classmethod
        def needs(cls, settings: Any) -> Needs:
            return needs

        def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
            return compute(self, student, batch)

    return register_objective(name)(Defined)


def build_objective(
    name: str, offered: dict[str, Any] | None = None, /, *, embed_dim: int = 5, width: Any = 7, **arguments: Any
) -> Objective:
    """Build an objective for a student and a teacher, or several, of these widths."""
    plan = plan_objective(name, offered, **arguments)
    widths = width if isinstance(width, tuple) else (width,)
    return plan.build(SimpleNamespace(embed_dim=embed_dim), TrainingFacts(target_widths=widths))


def losses_of(
    objective: Objective, batch: Batch, output: Tensor | None = None, embedding: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the losses of an output (B,C) and embeddings (B,E) for the targets of a batch."""
    return objective(GivenStudent(output, embedding), batch)


def needs_of(name: str, offered: dict[str, Any] | None = None, /, **arguments: Any) -> Any:
    """Return what an objective needs with these settings."""
    return plan_objective(name, offered, **arguments).needs
