"""Objectives that need a teacher's clip embeddings and nothing else: S-SONDO's, with or without labels beside them.

A projection takes the student's embedding into the teacher's space, and a loss compares the two there: `cosine`, `mse`,
`l1`, `kl`, `contrastive` or `cluster_contrastive` (El Adlouni et al., "S-SONDO", ICASSP 2026). The projection belongs
to the objective: it is trained with the student and is no part of its checkpoint.

Shapes: B batch · C classes · E embedding width of the student · W of the teacher.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError
from distill.batch import Batch
from distill.objectives import Objective, TargetLoss, mean_entropy, register_objective

KINDS = ("cosine", "mse", "l1", "kl", "contrastive", "cluster_contrastive")
TEMPERATURES = {"kl": 1.0, "contrastive": 0.07, "cluster_contrastive": 0.07}  # by default
_SHORTEST = 1e-6  # a vector below this length counts as one of no direction: its cosines fade to 0


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of each row of `one` (B, W) to the same row of `other` (B, W): (B,), 0 to a row of zeros."""
    return (F.normalize(one, eps=_SHORTEST) * F.normalize(other, eps=_SHORTEST)).sum(dim=1)


def divergence(projected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(target / T) || softmax(projected / T)) * T^2, averaged over B and, as published, over W."""
    said, taught = ((x / temperature).log_softmax(dim=1) for x in (projected, target))
    total = F.kl_div(said, taught, reduction="sum", log_target=True)
    return total * temperature**2 / target.numel()


def contrast(projected: Tensor, target: Tensor, temperature: float, cluster: Tensor | None = None) -> Tensor:
    """Return how badly each clip's own teacher is told from the other clips' teachers, and the other way round.

    Symmetric InfoNCE as in CLIP and CLAP: cross-entropy of the cosines divided by the temperature, over rows and over
    columns. With `cluster`, clips of one cluster are no negatives of each other: they leave the denominator. This parts
    from the published code, which multiplies their cosines by 0, so that each still adds exp(0) = 1 to the denominator.

    Args:
        projected: (B, W) of the student.
        target: (B, W) of the teacher.
        temperature: above 0.
        cluster: (B,) int, or None.

    Returns:
        A scalar; a clip without any negative adds 0 to the mean.
    """
    logits = F.normalize(projected, eps=_SHORTEST) @ F.normalize(target, eps=_SHORTEST).T / temperature  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    if cluster is not None:
        alike = (cluster[:, None] == cluster[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(alike, -math.inf)  # a logit of 0 would still add exp(0) = 1
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class EmbeddingDistillation(nn.Module):
    """Draws the student's projected embedding to the teacher's: share * labels + (1 - share) * teacher.

    The contrastive kinds take their negatives from the part of the batch that a process holds: with several processes,
    or a batch cut by `accumulate`, there are fewer of them.

    Args:
        kind: one of `KINDS`. `cosine` is the mean of 1 - cosine; `mse` and `l1` are means over clips and width, of
            embeddings as they are; for `kl` see `divergence`, for `contrastive` and `cluster_contrastive` `contrast`.
        loss: of the labels, a name in `distill.objectives.LOSSES`; used where lambda is above 0.
        loss_args: its arguments, see `TargetLoss`.
        label_smoothing: of the labels, see `TargetLoss`.
        lambda_: share of the labels, 0 to 1; 0 needs no labels.
        hidden: width of the projection's hidden layer; 0 makes it a single linear layer.
        dropout: before its last layer.
        temperature: of `kl` (by default 1) and the contrastive kinds (0.07).

    Attributes:
        projection: (B, E) -> (B, W), there once `attach` was called.

    Raises:
        UserError: an unknown loss; numbers out of range.
    """

    needs_embedding = True
    sample_rates: Sequence[int] = ()
    projection: nn.Sequential | None

    def __init__(
        self,
        kind: str,
        /,
        loss: str = "BCEWithLogitsLoss",
        loss_args: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        lambda_: float = 0.0,
        hidden: int = 1280,
        dropout: float = 0.2,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        if temperature is not None and kind not in TEMPERATURES:
            raise UserError(f"objective {kind} has no temperature; {', '.join(TEMPERATURES)} have one")
        self.share, self.dropout = _number(lambda_), _number(dropout)
        self.temperature = _number(TEMPERATURES.get(kind, 1.0) if temperature is None else temperature)
        self.hidden = hidden
        wanted = {
            "lambda": (lambda_, 0 <= self.share <= 1, "the share of the labels, from 0 to 1"),
            "hidden": (hidden, isinstance(hidden, int) and hidden >= 0, "a whole number; 0 for no hidden layer"),
            "dropout": (dropout, 0 <= self.dropout < 1, "a number from 0 to below 1"),
            "temperature": (temperature, 0 < self.temperature < math.inf, "a number above 0"),
        }
        faults = Faults(f"objective {kind}")
        for name, (value, fits, sentence) in wanted.items():
            if not fits:
                faults.add(f"{name} is {value!r}; wanted {sentence}")
        faults.raise_if_any()
        self.to_labels = TargetLoss(loss, loss_args or {}, label_smoothing) if self.share else None
        self.wants = self.to_labels.wants if self.to_labels else None
        self.activation = self.to_labels.activation if self.to_labels else None
        self.needs_labels = self.to_labels is not None
        self.needs_clusters = kind == "cluster_contrastive"
        self.projection = None

    def attach(self, embed_dim: int, width: int) -> None:
        """Make the projection from the student's `embed_dim` E to the teacher's `width` W; once, before training."""
        if self.projection is not None:
            raise RuntimeError("the projection is there already, and an optimiser may hold its parameters")
        layers: list[nn.Module] = [nn.Linear(embed_dim, width)]
        if self.hidden:
            layers = [
                nn.Linear(embed_dim, self.hidden),
                nn.Hardswish(),
                nn.Dropout(self.dropout),
                nn.Linear(self.hidden, width),
            ]
        self.projection = nn.Sequential(*layers)

    def forward(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, computed in float32 whatever the precision around it.

        Args:
            output: (B, C), what `wants` says; not looked at where lambda is 0.
            batch: `embedding` (B, E) of the student and `target` (B, W) of the teacher; `labels` (B, C) where lambda is
                above 0; `cluster` (B,) for `cluster_contrastive`.

        Returns:
            `loss`; what it is made of before it is weighed, `loss_teacher` and `loss_labels`; and `cosine`, the mean
            cosine of projected and teacher's embeddings.
        """
        if self.projection is None:
            raise RuntimeError("`attach` makes the projection and comes first")
        assert batch.embedding is not None
        target = batch.target.float()
        with torch.autocast(target.device.type, enabled=False):
            projected = self.projection(batch.embedding.float())
            likeness = cosines(projected, target).mean()
            loss = to_teacher = self._to_teacher(projected, target, batch, likeness)
            losses = {"loss_teacher": to_teacher, "cosine": likeness.detach()}
            if self.to_labels:
                assert batch.labels is not None
                to_labels = self.to_labels(output.float(), replace(batch, target=batch.labels.float()))["loss"]
                loss = self.share * to_labels + (1 - self.share) * to_teacher
                losses["loss_labels"] = to_labels
        return {"loss": loss, **losses}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the means over a batch that `constant_loss` needs; see `distill.objectives.Objective`."""
        target = batch.target.float()
        means: dict[str, Tensor] = {}
        if self.kind == "cosine":
            means["direction"] = F.normalize(target, eps=_SHORTEST).mean(dim=0)
        elif self.kind == "mse":
            means |= {"embedding": target.mean(dim=0), "square": target.square().mean()}
        elif self.kind == "kl":
            share = (target / self.temperature).softmax(dim=1)
            means |= {"share": share.mean(dim=0), "entropy": torch.special.entr(share).sum(dim=1).mean()}
        if self.to_labels:
            assert batch.labels is not None
            means |= self.to_labels.target_statistics(replace(batch, target=batch.labels))
        return means

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of one embedding, and one answer to the labels, for all clips.

        It is known for `cosine` (1 - the length of the mean direction), `mse` (the variance) and `kl`.
        """
        to_labels = self.to_labels.constant_loss(means) if self.to_labels else 0.0
        if self.kind == "cosine":
            to_teacher = 1 - float(means["direction"].norm())
        elif self.kind == "mse":
            to_teacher = float(means["square"] - means["embedding"].square().mean())
        elif self.kind == "kl":
            excess = mean_entropy(means["share"], "softmax") - float(means["entropy"])  # in all of W
            to_teacher = excess / len(means["share"]) * self.temperature**2
        else:
            return None
        return None if to_labels is None else self.share * to_labels + (1 - self.share) * to_teacher

    def _to_teacher(self, projected: Tensor, target: Tensor, batch: Batch, likeness: Tensor) -> Tensor:
        if self.kind == "cosine":
            return 1 - likeness
        if self.kind in ("mse", "l1"):
            return (F.mse_loss if self.kind == "mse" else F.l1_loss)(projected, target)
        if self.kind == "kl":
            return divergence(projected, target, self.temperature)
        return contrast(projected, target, self.temperature, batch.cluster if self.needs_clusters else None)


def _number(value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-1 as text
    except (TypeError, ValueError):
        return math.nan


for _kind in KINDS:
    _factory: Callable[..., Objective] = partial(EmbeddingDistillation, _kind)
    register_objective(_kind)(_factory)
