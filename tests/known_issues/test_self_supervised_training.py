"""Traps of MATPAC's published training code (aurianworld/matpac): each is a test of ours."""

import pytest
import torch

from distill.objectives import TrainingFacts, plan_objective
from distill.objectives.matpac import HEAD_DECAYS, PUBLISHED_STEPS
from models import create_model
from tests.batches import make_batch


@pytest.fixture
def student():
    torch.manual_seed(0)
    return create_model("matpac_pico", num_classes=0, depth=1)


@pytest.fixture
def batch():
    return make_batch(item=torch.arange(4), mel=torch.randn(4, 80, 64))


def build(student, **settings):
    return plan_objective("matpac", classes=8, **settings).build(student, TrainingFacts()).train()


def test_the_centre_is_in_the_units_of_the_outputs_that_it_is_subtracted_from(student, batch):
    """Published: the centre averages probabilities, 1/C each on average, and is subtracted from outputs."""
    objective = build(student)
    with torch.no_grad():
        objective.teacher_head.scale.fill_(5.0)
    outputs = []
    objective.teacher_head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for _ in range(60):
        objective(student, batch)
        objective.centre.update()
    centred = outputs[-1].flatten(0, 1).mean(0) - objective.centre.mean[0]
    assert centred.abs().max() < 0.02
    assert outputs[-1].flatten(0, 1).mean(0).abs().max() > 0.5


def test_the_average_of_the_head_ends_at_its_own_decay(student):
    """Published: past the last step it takes the encoder's last decay, 0.99999, in place of 1."""
    objective = build(student)
    before = objective.teacher_head.scale.clone()
    with torch.no_grad():
        objective.head.scale.add_(1.0)
    objective.after_step(student, PUBLISHED_STEPS, PUBLISHED_STEPS)
    assert HEAD_DECAYS[1] == 1
    assert torch.equal(objective.teacher_head.scale, before)


def test_the_prediction_loss_has_a_gradient(student, batch):
    """Published before September 2025: it was computed where gradients are off."""
    objective = build(student, alpha=0.0)
    objective(student, batch)["loss"].backward()
    assert float(objective.output.weight.grad.norm()) > 0
    assert float(student.blocks[0].mlp.fc1.weight.grad.norm()) > 0


def test_the_teacher_starts_as_the_student(student, batch):
    """Published: it starts from other random weights, which its average keeps for tens of thousands of steps."""
    objective = build(student)
    for mine, other in zip(objective.teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, other)
