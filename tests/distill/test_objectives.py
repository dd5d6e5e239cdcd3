"""Cross-model distillation: the published formula, written out with logits and plain sums."""

import re
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from distill.objectives import Needs, Objective, list_objectives, plan_objective, register_objective
from distill.replay import Replay
from models import create_model
from tests.batches import make_batch
from tests.objectives import build_objective, define_objective, losses_of, needs_of
from training.loss_module import LossModule

LOSSES = ("BCEWithLogitsLoss", "BCELoss", "CrossEntropyLoss")


def create(loss="BCEWithLogitsLoss", smoothing=0.0, **arguments):
    offered = {"loss": loss, "loss_args": {}, "label_smoothing": smoothing}
    return build_objective("cmkd", offered, **arguments)


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def by_hand(loss: str, student: Tensor, labels: Tensor, teacher: Tensor, share: float, tau: float) -> Tensor:
    """Equation 1 of FastAST for logits of student and teacher, a clip and a class at a time."""
    total = torch.zeros((), dtype=torch.float64)
    n_clips, n_classes = student.shape
    student, labels, teacher = student.double(), labels.double(), teacher.double()
    for clip in range(n_clips):
        if loss == "CrossEntropyLoss":
            said, taught = student[clip].log_softmax(0), (teacher[clip] / tau).softmax(0)
            truth = labels[clip] / labels[clip].sum()
            for c in range(n_classes):
                total -= share * truth[c] * said[c] / n_clips
                total += (1 - share) * taught[c] * (taught[c].log() - said[c]) / n_clips
        else:
            said, taught = student[clip].sigmoid(), (teacher[clip] / tau).sigmoid()
            for c in range(n_classes):
                p, q, y = said[c], taught[c], labels[clip, c]
                cell = -share * (y * p.log() + (1 - y) * (1 - p).log())
                cell += (1 - share) * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
                total += cell / (n_clips * n_classes)
    return total.float()


def answers(loss: str, x: Tensor) -> Tensor:
    return x.softmax(1) if loss == "CrossEntropyLoss" else x.sigmoid()


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_published_formula(loss, share, tau):
    student, teacher = logits(0), logits(1)
    labels = torch.eye(4)[[0, 3, 2, 2, 1]]
    if loss != "CrossEntropyLoss":
        labels[1, 0] = labels[4, 2] = 1.0
    objective = create(loss, **{"lambda": share, "tau": tau})
    output = answers(loss, student) if objective.label_loss.outputs == "probabilities" else student
    losses = losses_of(objective, make_batch(labels=labels, target=answers(loss, teacher)), output)
    assert losses["loss"].item() == pytest.approx(by_hand(loss, student, labels, teacher, share, tau).item(), abs=1e-6)
    assert losses["loss_labels"].item() == pytest.approx(
        by_hand(loss, student, labels, teacher, 1.0, tau).item(), abs=1e-6
    )
    assert losses["loss_teacher"].item() == pytest.approx(
        by_hand(loss, student, labels, teacher, 0.0, tau).item(), abs=1e-6
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_from_it(loss):
    x = logits(2).requires_grad_()
    objective = create(loss, **{"lambda": 0.0})
    output = answers(loss, x) if objective.label_loss.outputs == "probabilities" else x
    losses = losses_of(
        objective, make_batch(labels=torch.eye(4)[[0, 1, 2, 3, 0]], target=answers(loss, x.detach())), output
    )
    assert losses["loss"].item() == pytest.approx(0.0, abs=1e-6)
    losses["loss"].backward()
    assert x.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", ["BCEWithLogitsLoss", "CrossEntropyLoss"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_certain_and_stored_answers_give_finite_losses_and_gradients(loss, tau):
    """Probabilities of exactly 0 and 1, as float16 and the top k of a store leave them."""
    x = logits(3).requires_grad_()
    certain = torch.eye(4)[[0, 1, 2, 3, 0]]
    losses = losses_of(create(loss, tau=tau), make_batch(labels=certain, target=certain), x)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert torch.isfinite(x.grad).all()
    if loss == "CrossEntropyLoss":
        assert losses["loss_teacher"].item() == pytest.approx(F.cross_entropy(x, certain.argmax(1)).item(), abs=1e-5)
        # a top k that lacks the smallest classes counts as the distribution that it would be alone
        cut = torch.tensor([[0.6, 0.2, 0.0, 0.0]]).repeat(5, 1)
        whole = make_batch(labels=certain, target=cut / 0.8)
        assert torch.allclose(
            losses_of(create(loss, tau=tau), replace(whole, target=cut), x)["loss"],
            losses_of(create(loss, tau=tau), whole, x)["loss"],
        )


def test_loss_arguments_and_smoothing_are_of_the_labels_alone():
    x, batch = logits(4), make_batch(labels=torch.eye(4)[[0, 1, 2, 3, 0]], target=logits(5).sigmoid())
    plain, smooth = losses_of(create(), batch, x), losses_of(create(smoothing=0.2), batch, x)
    expected = F.binary_cross_entropy_with_logits(x, batch.labels * 0.8 + 0.1)
    assert smooth["loss_labels"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert smooth["loss_teacher"] == plain["loss_teacher"]
    weighed = build_objective("cmkd", loss="BCEWithLogitsLoss", loss_args={"pos_weight": torch.tensor([3.0])})
    assert losses_of(weighed, batch, x)["loss_teacher"] == plain["loss_teacher"]
    assert losses_of(weighed, batch, x)["loss_labels"] > plain["loss_labels"]


def test_half_precision_around_it_does_not_blur_a_small_divergence():
    x = logits(6)
    batch = make_batch(labels=torch.eye(4)[[0, 1, 2, 3, 0]], target=(x + 0.05).sigmoid())
    exact = losses_of(create(), batch, x)["loss_teacher"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses_of(create(), batch, x)["loss_teacher"].item() == pytest.approx(exact, abs=1e-7)


def test_the_defaults_are_those_of_fastast():
    objective = create()
    needs = needs_of("cmkd", {"loss": "CrossEntropyLoss"})
    assert (objective.share, objective.tau) == (0.1, 1.0)
    assert (needs.targets, needs.labels, needs.teacher) == ("classes", True, "required")
    assert (needs.output, needs.activation) == ("logits", "softmax")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lamda": 0.5}, r"cmkd has no argument 'lamda' \(did you mean 'lambda'\?\)"),
        ({"lambda": 1.5}, "lambda is 1.5; expected the share of the labels, from 0 to 1"),
        ({"lambda": "much"}, "lambda is 'much', not a number"),
        ({"tau": 0}, "tau is 0; expected a number above 0"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        create(**arguments)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert create(**{"lambda": "1e-1"}).share == 0.1


def test_an_objective_takes_what_it_has_settings_for_of_what_is_offered():
    define_objective("takes_the_loss_name", Needs("none"), losses_of, loss="", lambda_=1.0, weight=0.0)
    made = build_objective("takes_the_loss_name", {"loss": "L1", "label_smoothing": 0.1}, weight=2, **{"lambda": 0.5})
    assert vars(made.settings) == {"loss": "L1", "lambda_": 0.5, "weight": 2}
    with pytest.raises(UserError, match="takes_the_loss_name has no argument 'label_smoothing'"):
        build_objective("takes_the_loss_name", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("needs", "sentence"),
    [
        ({"targets": "class"}, "targets is 'class'; expected 'classes', 'embeddings', 'none'"),
        ({"targets": "none", "output": "logit"}, "output is 'logit'; expected 'logits', 'probabilities', None"),
        ({"targets": "none", "teacher": "yes"}, "teacher is 'yes'; expected 'no', 'optional', 'required', 'online'"),
        ({"targets": "none", "teacher": "required", "teacher_layers": (1,)}, 'set teacher="online"'),
    ],
)
def test_needs_are_checked(needs, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Needs(**needs)


def test_an_incomplete_objective_cannot_be_registered():
    with pytest.raises(TypeError, match="objective unfinished: Unfinished lacks forward, a dataclass Settings"):

        @register_objective("unfinished")
        class Unfinished(Objective):
            @classmethod
            def needs(cls, settings):
                return Needs("none")


def test_an_objective_needs_a_base_class_needs_and_defaults():
    with pytest.raises(TypeError, match="objective plain: expected a subclass of Objective, got <class 'object'>"):
        register_objective("plain")(object)

    @dataclass(frozen=True)
    class Required:
        decay: float
        weights: list = field(default_factory=list)

    class Unfinished(Objective):
        Settings = Required

        def forward(self, student, batch):
            return {}

    with pytest.raises(TypeError, match=r"Unfinished lacks needs, a default of the setting decay$"):
        register_objective("unfinished")(Unfinished)
    assert not {"plain", "unfinished"} & set(list_objectives())


@pytest.mark.parametrize(
    ("result", "found"),
    [({"loss_labels": torch.zeros(())}, r"the keys \['loss_labels'\]"), (torch.zeros(()), "Tensor")],
)
def test_losses_without_loss_are_reported(result, found):
    define_objective("without_loss", Needs("none"), lambda objective, student, batch: result)
    model = create_model("audiotransformer_pico", num_classes=0, depth=1)
    plan = plan_objective("without_loss")
    losses = LossModule(model, plan.build(model), plan.needs, Replay(), None)
    batch = make_batch(waveforms={model.sample_rate: torch.zeros(1, model.sample_rate)})
    with pytest.raises(TypeError, match=rf"forward: expected a dict with the key 'loss', got {found}"):
        losses(batch)
