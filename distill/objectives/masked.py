"""The base class of objectives on masked tokens: requirements, fixed batch norms, detection of collapse."""

from collections.abc import Mapping
from typing import Any

from distill.objectives.base import Needs, Objective, TrainingFacts
from distill.objectives.collapse import TokenVariance, describe_collapse
from distill.objectives.masking import check_student, fix_norms
from models.base import AudioTagger


class MaskedObjective(Objective):
    """Base class of objectives that predict masked tokens of a transformer.

    Attributes:
        seed: of the run.
        variance: of the student's tokens among clips.

    Raises:
        UserError: the student has no tokens, or its patches overlap.
    """

    def __init__(self, settings: Any, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.seed = facts.seed
        self.variance = TokenVariance(check_student(student))

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        """Return: nothing but sound."""
        return Needs("none")

    def start(self, student: AudioTagger) -> None:
        """Check that batch norms have statistics, which training does not change."""
        fix_norms(student, check=True)

    def after_step(self, student: AudioTagger, step: int, n_steps: int) -> None:
        """Update the running means of the tokens."""
        self.variance.running.update()

    def describe_collapse(self, means: Mapping[str, float]) -> str | None:
        """Return a sentence if tokens or classes no longer depend on the input."""
        return describe_collapse(means)
