"""Objectives over embeddings: each formula written out a clip at a time, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.errors import UserError
from distill.objectives import plan_objective
from distill.objectives.embedding import KINDS
from tests.batches import make_batch
from tests.objectives import build_objective, losses_of, needs_of

B, E, W, C = 6, 5, 7, 4
OFFERED = {"loss": "BCEWithLogitsLoss", "loss_args": {}, "label_smoothing": 0.0}
CLUSTER = torch.tensor([3, 0, 3, 1, 0, 3])


def create(kind, width=W, **arguments):
    """An objective with a projection of fixed weights, at rest."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build_objective(kind, OFFERED, embed_dim=E, width=width, **arguments).eval()


EMBEDDING = torch.randn(B, E, generator=torch.Generator().manual_seed(0))


def batch_of(width=W):
    target = 2 * torch.randn(B, width, generator=torch.Generator().manual_seed(1))
    return make_batch(target=target, labels=torch.eye(C)[[0, 3, 2, 2, 1, 0]], cluster=CLUSTER)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def by_hand(kind, projected, target, temperature):
    """The loss of one batch from its definition, with nothing but numbers."""
    p, t = projected.double().tolist(), target.double().tolist()
    if kind == "cosine":
        return sum(1 - cosine(p[i], t[i]) for i in range(B)) / B
    if kind in ("mse", "l1"):
        gaps = [abs(p[i][w] - t[i][w]) for i in range(B) for w in range(W)]
        return sum(gap**2 if kind == "mse" else gap for gap in gaps) / (B * W)
    if kind == "kl":
        total = 0.0
        for i in range(B):
            taught, said = (softmax([v / temperature for v in row[i]]) for row in (t, p))
            total += sum(q * math.log(q / r) for q, r in zip(taught, said, strict=True))
        return total * temperature**2 / (B * W)  # over the width, too: published
    total = 0.0
    for i in range(B):
        others = [j for j in range(B) if j != i and (kind == "contrastive" or CLUSTER[i] != CLUSTER[j])]
        for similar in (lambda j, i=i: cosine(p[i], t[j]), lambda j, i=i: cosine(p[j], t[i])):
            own = math.exp(similar(i) / temperature)
            total -= math.log(own / (own + sum(math.exp(similar(j) / temperature) for j in others)))
    return total / (2 * B)


@pytest.mark.parametrize(
    ("kind", "given", "temperature"),
    [(kind, {}, {"kl": 1.0}.get(kind, 0.07)) for kind in KINDS]
    + [(kind, {"temperature": 2.5}, 2.5) for kind in ("kl", "contrastive", "cluster_contrastive")],
)
def test_the_loss_is_its_formula(kind, given, temperature):
    objective, batch = create(kind, **given), batch_of()
    losses = losses_of(objective, batch, embedding=EMBEDDING)
    projected = objective.projection(EMBEDDING)
    expected = by_hand(kind, projected, batch.target, temperature)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_teacher"].item() == losses["loss"].item()
    assert losses["cosine"].item() == pytest.approx(1 - by_hand("cosine", projected, batch.target, 1), rel=1e-5)
    assert not losses["cosine"].requires_grad
    assert set(losses) == {"loss", "loss_teacher", "cosine"}


def published(kind, p, t):
    """A loss as S-SONDO's published training has it, in tensors: temperatures 1 and 0.07, vectors of unit length."""
    if kind == "kl":
        return nn.KLDivLoss(reduction="batchmean")(p.log_softmax(1), t.softmax(1)) / p.shape[1]
    p, t = (x if kind in ("mse", "l1") else nn.functional.normalize(x) for x in (p, t))
    if kind == "cosine":
        return nn.CosineEmbeddingLoss()(p, t, torch.ones(len(p), dtype=p.dtype))
    if kind == "contrastive":
        own, logits = torch.arange(len(p)), p @ t.T / 0.07
        return (nn.CrossEntropyLoss()(logits, own) + nn.CrossEntropyLoss()(logits.T, own)) / 2
    return (nn.MSELoss if kind == "mse" else nn.L1Loss)()(p, t)


@pytest.mark.parametrize("width", [7, 384, 3840])
@pytest.mark.parametrize("kind", ["cosine", "contrastive", "kl", "mse", "l1"])
def test_losses_have_the_published_scale_at_any_width(kind, width):
    """`cluster_contrastive` has not, on purpose: see tests/known_issues/test_ssondo_training.py."""
    objective, batch = build_objective(kind, OFFERED, embed_dim=E, width=width).eval(), batch_of(width)
    loss = losses_of(objective, batch, embedding=EMBEDDING)["loss"]
    projected = objective.projection(EMBEDDING).double()
    assert loss.item() == pytest.approx(published(kind, projected, batch.target.double()).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "mse", "kl"])
def test_the_loss_of_one_answer_for_all_clips_has_the_scale_of_the_loss(kind):
    """A projection that gives the same for all clips comes down to `constant_loss`."""
    objective, batch = create(kind, hidden=0), batch_of()
    with torch.no_grad():
        objective.projection[0].weight.zero_()
    reached = objective.constant_loss(objective.target_statistics(batch))
    optimiser = torch.optim.Adam([objective.projection[0].bias], 0.02)
    for _ in range(1500):
        optimiser.zero_grad()
        loss = losses_of(objective, batch, embedding=EMBEDDING)["loss"]
        loss.backward()
        optimiser.step()
    assert loss.item() == pytest.approx(reached, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_drawn_to_its_teacher(kind):
    """Some steps on the projection and the embedding alone bring every loss, and the angle, near."""
    objective, batch = create(kind, hidden=16), batch_of()
    embedding = nn.Parameter(EMBEDDING.clone())
    optimiser = torch.optim.Adam([embedding, *objective.parameters()], 0.05)
    first = losses_of(objective, batch, embedding=EMBEDDING)
    for _ in range(60):
        optimiser.zero_grad()
        last = losses_of(objective, batch, embedding=embedding)
        last["loss"].backward()
        optimiser.step()
    assert last["loss"] < 0.2 * first["loss"]
    assert last["cosine"] > first["cosine"] + 0.2


def test_the_projection_is_the_published_one():
    layers = create("cosine").projection
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Hardswish, nn.Dropout, nn.Linear]
    assert (layers[0].weight.shape, layers[3].weight.shape, layers[2].p) == ((1280, E), (W, 1280), 0.2)
    flat = create("cosine", hidden=0)
    assert torch.equal(flat.projection(EMBEDDING), EMBEDDING @ flat.projection[0].weight.T + flat.projection[0].bias)
    published = build_objective("cosine", embed_dim=960, width=3840)
    assert sum(p.numel() for p in published.parameters()) == 6_149_120


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_labels_have_their_share(share):
    objective, batch, output = create("l1", **{"lambda": share}), batch_of(), torch.randn(B, C)
    losses = losses_of(objective, batch, output, EMBEDDING)
    to_labels = nn.functional.binary_cross_entropy_with_logits(output, batch.labels)
    to_teacher = losses_of(create("l1"), batch, output, EMBEDDING)["loss"]
    assert losses["loss_labels"].item() == pytest.approx(to_labels.item(), rel=1e-6)
    assert losses["loss_teacher"].item() == pytest.approx(to_teacher.item(), rel=1e-6)
    assert losses["loss"].item() == pytest.approx((share * to_labels + (1 - share) * to_teacher).item(), rel=1e-6)


def test_what_a_run_must_give_follows_from_the_settings():
    alone = needs_of("cosine", OFFERED)
    assert (alone.targets, alone.teacher, alone.output, alone.activation) == ("embeddings", "required", None, None)
    assert (alone.labels, alone.clusters, alone.mixup) == (False, False, True)
    settings = OFFERED | {"loss": "CrossEntropyLoss"}
    both = needs_of("cluster_contrastive", settings, **{"lambda": "1e-1"})  # as YAML reads it
    assert (both.targets, both.teacher, both.output, both.activation) == ("embeddings", "required", "logits", "softmax")
    assert (both.labels, both.clusters, both.mixup) == (True, True, False)


WIDTHS = (7, 3)


def create_alone(both, number, kind, **arguments):
    """The objective of one of the two teachers of `both`, with its projection."""
    alone = build_objective(kind, OFFERED, embed_dim=E, width=WIDTHS[number], **arguments).eval()
    alone.projection.load_state_dict(both.projection[number].state_dict())
    return alone


def split_batch(batch, number):
    return replace(batch, target=batch.target.split(WIDTHS, dim=1)[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("given", "shares"), [({}, (0.5, 0.5)), ({"weights": [1, 3]}, (0.25, 0.75))])
def test_the_loss_of_two_teachers_is_the_mean_of_those_of_each_alone_by_their_weights(kind, given, shares):
    both = build_objective(kind, OFFERED, embed_dim=E, width=WIDTHS, **given, **{"lambda": 0.2}).eval()
    batch, output = batch_of(sum(WIDTHS)), torch.randn(B, C)
    embedding = EMBEDDING.clone().requires_grad_()
    losses = losses_of(both, batch, output, embedding)
    losses["loss"].backward()
    summed = {"loss": 0.0, "loss_teacher": 0.0, "cosine": 0.0, "constant": 0.0}
    gradient = torch.zeros_like(EMBEDDING)
    for number, share in enumerate(shares):
        alone, own = create_alone(both, number, kind, **{"lambda": 0.2}), EMBEDDING.clone().requires_grad_()
        each = losses_of(alone, split_batch(batch, number), output, own)
        each["loss"].backward()
        gradient += share * own.grad
        for name in ("loss", "loss_teacher", "cosine"):
            summed[name] += share * each[name].item()
        constant = alone.constant_loss(alone.target_statistics(split_batch(batch, number)))
        summed["constant"] += float("nan") if constant is None else share * constant
        assert losses[f"loss_teacher_{number + 1}"].item() == pytest.approx(each["loss_teacher"].item(), rel=1e-6)
        assert losses[f"cosine_{number + 1}"].item() == pytest.approx(each["cosine"].item(), rel=1e-6)
        parameters = zip(both.projection[number].parameters(), alone.projection.parameters(), strict=True)
        for one, other in parameters:
            torch.testing.assert_close(one.grad, share * other.grad)
    assert {name: losses[name].item() for name in ("loss", "loss_teacher", "cosine")} == pytest.approx(
        {name: summed[name] for name in ("loss", "loss_teacher", "cosine")}, rel=1e-5
    )
    torch.testing.assert_close(embedding.grad, gradient)
    constant = both.constant_loss(both.target_statistics(batch))
    assert constant is None if math.isnan(summed["constant"]) else constant == pytest.approx(summed["constant"])


def test_a_teacher_of_weight_0_is_not_learned():
    both, batch = create("cosine", width=WIDTHS, weights=[1, 0]), batch_of(sum(WIDTHS))
    losses_of(both, batch, embedding=EMBEDDING)["loss"].backward()
    assert all(bool(parameter.grad.any()) for parameter in both.projection[0].parameters())
    assert not any(bool(parameter.grad.any()) for parameter in both.projection[1].parameters())


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1, 2, 3], "objective cosine: number of weights: 3, of teachers: 2; give one weight for each teacher"),
        ("1,-2", "weights is '-2'; expected a number of at least 0 for each teacher"),
        ([0, 0.0], r"weights is \[0, 0.0\], all zero, so nothing would be learned"),
        ([1, float("inf")], "weights is inf; expected a number of at least 0"),
        (2, r"weights is 2; expected a number of at least 0 for each teacher, \[1, 2\] for example"),
    ],
)
def test_weights_that_cannot_be_are_a_sentence(weights, sentence):
    with pytest.raises(UserError, match=sentence):
        create("cosine", width=WIDTHS, weights=weights)


def test_half_precision_around_it_changes_nothing():
    for kind in KINDS:
        objective, batch, output = create(kind, **{"lambda": 0.5}), batch_of(), torch.randn(B, C)
        exact = losses_of(objective, batch, output, EMBEDDING)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert losses_of(objective, batch, output, EMBEDDING)["loss"].item() == exact.item()


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("cosine", {"hiden": 3}, r"cosine has no argument 'hiden' \(did you mean 'hidden'\?\)"),
        ("cosine", {"kind": "l1"}, "cosine has no argument 'kind'"),
        (
            "mse",
            {"temperature": 2},
            "objective mse: mse has no temperature; kl, contrastive, cluster_contrastive have one",
        ),
        ("kl", {"temperature": 0}, "temperature is 0; expected a number above 0"),
        ("l1", {"lambda": -0.1, "dropout": 1, "hidden": 2.5}, "has 3 faults:(.|\n)*lambda is -0.1(.|\n)*hidden is 2.5"),
        ("l1", {"lambda": 0.5, "loss": "BCELos"}, r"unknown loss 'BCELos' \(did you mean 'BCELoss'\?\)"),
    ],
)
def test_a_wrong_argument_is_a_sentence(kind, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_objective(kind, OFFERED, **arguments)
