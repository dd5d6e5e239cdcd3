"""A method in one file: the output of one block of the student is drawn to that of a block of the teacher.

After Romero et al., "FitNets: Hints for thin deep nets", ICLR 2015, as far as a test needs it.
"""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from distill.objectives import Needs, Objective, register_objective


@dataclass(frozen=True)
class Settings:
    """Blocks of student and teacher, from 0, and the width of the teacher's."""

    layer: int = 1
    teacher_layer: int = 1
    teacher_width: int = 64


@register_objective("layer_distillation")
class LayerDistillation(Objective):
    """Needs a teacher that computes while the student learns; the student's later blocks get no gradient."""

    Settings = Settings

    def __init__(self, settings, student, facts):
        super().__init__(settings, student, facts)
        self.project = nn.Linear(student.embed_dim, settings.teacher_width)

    @classmethod
    def needs(cls, settings):
        return Needs("none", teacher="online", teacher_layers=(settings.teacher_layer,), whole_student=False)

    def forward(self, student, batch):
        own = student.encode(batch.mel, batch.n_frames, layers=(self.settings.layer,)).layers[self.settings.layer]
        taught = batch.teacher.layers[self.settings.teacher_layer]
        return {"loss": F.mse_loss(self.project(own.mean(1)), taught.mean(1))}
