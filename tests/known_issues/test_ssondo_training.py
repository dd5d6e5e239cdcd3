"""Traps of S-SONDO's published training code: masks that leak, vectors without a direction, heads that stay behind."""

import math

import numpy as np
import pytest
import torch

from distill.clusters import compute_balance
from distill.objectives.embedding import KINDS, compute_contrastive_loss
from tests.batches import make_batch
from tests.objectives import build_objective, losses_of


def double_loop(p, t, cluster, temperature, leak=False):
    """The cluster-aware loss a pair at a time; `leak` multiplies masked logits by 0, as was published."""
    cosine = torch.cosine_similarity(p.double()[:, None], t.double()[None], dim=2) / temperature
    n, total = len(p), 0.0
    for logits in (cosine, cosine.T):
        for i in range(n):
            negatives = [math.exp(logits[i, j]) for j in range(n) if cluster[i] != cluster[j]]
            leaked = [math.exp(0.0) for j in range(n) if leak and i != j and cluster[i] == cluster[j]]
            own = math.exp(logits[i, i])
            total -= math.log(own / (own + sum(negatives) + sum(leaked)))
    return total / (2 * n)


def test_clips_of_one_cluster_leave_the_denominator_altogether():
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.randn(8, 5, generator=generator) for _ in range(2))
    cluster = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    for temperature in (0.07, 1.0):
        found = compute_contrastive_loss(p, t, temperature, cluster).item()
        assert found == pytest.approx(double_loop(p, t, cluster, temperature), rel=1e-5)
        assert abs(found - double_loop(p, t, cluster, temperature, leak=True)) > 5e-3


def test_a_masked_pair_pushes_nothing():
    """The gradient of a clip does not know of the teachers of its own cluster."""
    generator = torch.Generator().manual_seed(1)
    p, t = (torch.randn(4, 5, generator=generator) for _ in range(2))
    cluster = torch.tensor([0, 0, 1, 2])
    gradients = []
    for other in (t, torch.cat([t[:1], 9 - t[1:2], t[2:]])):  # the teacher of clip 1, in clip 0's cluster, is another
        own = p.clone().requires_grad_()
        compute_contrastive_loss(own, other, 0.1, cluster).backward()
        gradients.append(own.grad)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][2], gradients[1][2])


def test_a_batch_of_one_cluster_or_of_one_clip_has_no_negatives_and_costs_nothing():
    p = torch.randn(4, 5).requires_grad_()
    for n in (4, 1):
        loss = compute_contrastive_loss(p[:n], torch.randn(n, 5), 0.07, torch.zeros(n, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0
        assert p.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_without_a_direction_give_finite_losses_and_gradients(kind):
    """Silence may embed as zeros, and a projection may die: identical vectors of zero length on both sides."""
    objective = build_objective(kind, embed_dim=3, width=6, hidden=0)
    for parameter in objective.parameters():
        torch.nn.init.zeros_(parameter)
    embedding = torch.zeros(4, 3).requires_grad_()
    for target in (torch.zeros(4, 6), torch.randn(4, 6)):
        batch = make_batch(target=target, cluster=torch.tensor([0, 0, 1, 2]))
        losses = losses_of(objective, batch, embedding=embedding)
        losses["loss"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert losses["cosine"].item() == 0
    gradients = [embedding.grad, *(parameter.grad for parameter in objective.parameters())]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_clusters_that_no_clip_of_the_list_is_in_take_no_share():
    """Sizes are of the clips trained on, not of all that were clustered: what is there comes equally often."""
    weights = compute_balance(np.array([7, 7, 7, 2, 2, 40]))
    assert weights.tolist() == pytest.approx([1 / 3] * 3 + [1 / 2] * 2 + [1.0])
