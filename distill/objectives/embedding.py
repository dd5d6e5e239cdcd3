"""Objectives with a teacher's clip embeddings as targets: S-SONDO's, with or without labels.

A projection maps the student's embedding to the teacher's space, where a loss compares the two: `cosine`, `mse`,
`l1`, `kl`, `contrastive` or `cluster_contrastive` (El Adlouni et al., "S-SONDO", ICASSP 2026). The projection belongs
to the objective: it is trained with the student and is not in its checkpoint.

Shapes: B batch · C classes · E embedding width of the student · W of the teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError
from distill.batch import Batch
from distill.objectives.base import Needs, Objective, TrainingFacts, register_objective
from distill.objectives.numbers import read_label_share, read_number
from distill.objectives.target import TargetSettings, compute_mean_entropy
from models.base import AudioTagger

KINDS = ("cosine", "mse", "l1", "kl", "contrastive", "cluster_contrastive")
TEMPERATURES = {"kl": 1.0, "contrastive": 0.07, "cluster_contrastive": 0.07}  # by default
_MIN_NORM = 1e-6  # cosines of shorter vectors go to 0


def compute_cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of the rows of `one` and `other`, (B, W) each: (B,), 0 for a row of zeros."""
    return (F.normalize(one, eps=_MIN_NORM) * F.normalize(other, eps=_MIN_NORM)).sum(dim=1)


def compute_divergence(projected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(target / T) || softmax(projected / T)) * T^2, averaged over B and, as published, over W."""
    student, teacher = ((x / temperature).log_softmax(dim=1) for x in (projected, target))
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return total * temperature**2 / target.numel()


def compute_contrastive_loss(
    projected: Tensor, target: Tensor, temperature: float, cluster: Tensor | None = None
) -> Tensor:
    """Return the symmetric contrastive loss (InfoNCE) between the embeddings of student and teacher.

    Symmetric InfoNCE as in CLIP and CLAP: cross-entropy of the cosines divided by the temperature, over rows and over
    columns. With `cluster`, clips of one cluster are no negatives of each other: they are not in the denominator. The
    published code multiplies their cosines by 0 instead, so that each still adds exp(0) = 1 to the denominator.

    Args:
        projected: (B, W) of the student.
        target: (B, W) of the teacher.
        temperature: above 0.
        cluster: (B,) int, or None.

    Returns:
        A scalar; a clip without any negative adds 0 to the mean.
    """
    logits = F.normalize(projected, eps=_MIN_NORM) @ F.normalize(target, eps=_MIN_NORM).T / temperature  # (B, B)
    positives = torch.arange(len(logits), device=logits.device)
    if cluster is not None:
        is_excluded = (cluster[:, None] == cluster[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(is_excluded, -math.inf)  # a logit of 0 would still add exp(0) = 1
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


@dataclass(frozen=True)
class EmbeddingSettings(TargetSettings):
    """Settings of objectives over embeddings.

    Attributes:
        loss: of the labels, see `ClassLoss`; used if lambda is above 0, like the next two.
        loss_args: its arguments.
        label_smoothing: of the labels.
        kind: one of `KINDS`. `cosine` is the mean of 1 - cosine; `mse` and `l1` are means over clips and width, of
            embeddings as they are; for `kl` see `compute_divergence`, for the contrastive kinds
            `compute_contrastive_loss`.
        lambda_: share of the labels, 0 to 1; 0 needs no labels.
        hidden: width of the projection's hidden layer; 0 makes it a single linear layer.
        dropout: before its last layer.
        temperature: of `kl` (by default 1) and the contrastive kinds (0.07).
    """

    kind: str = "cosine"
    lambda_: Any = 0.0
    hidden: int = 1280
    dropout: Any = 0.2
    temperature: Any = None

    def __post_init__(self) -> None:
        if self.temperature is not None and self.kind not in TEMPERATURES:
            raise UserError(f"{self.kind} has no temperature; {', '.join(TEMPERATURES)} have one")
        faults = Faults(self.kind)
        temperature = TEMPERATURES.get(self.kind, 1.0) if self.temperature is None else self.temperature
        with faults.noted():
            object.__setattr__(self, "lambda_", read_label_share(self.lambda_))
        with faults.noted():
            fits = isinstance(self.hidden, int) and not isinstance(self.hidden, bool)
            read_number("hidden", self.hidden, lambda n: fits and n >= 0, "a whole number; 0 for no hidden layer")
        with faults.noted():
            dropout = read_number("dropout", self.dropout, lambda p: 0 <= p < 1, "a number from 0 to below 1")
            object.__setattr__(self, "dropout", dropout)
        with faults.noted():
            temperature = read_number("temperature", temperature, lambda t: 0 < t < math.inf, "a number above 0")
            object.__setattr__(self, "temperature", temperature)
        faults.raise_if_any()
        if self.lambda_:
            super().__post_init__()


class EmbeddingDistillation(Objective):
    """Distance of the student's projected embedding to the teacher's: share * labels + (1 - share) * teacher.

    The contrastive kinds take their negatives from the part of the batch in one process: with several processes,
    or a batch split by `accumulate`, there are fewer.

    Attributes:
        projection: (B, E) -> (B, W).
    """

    Settings = EmbeddingSettings

    def __init__(self, settings: EmbeddingSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.kind, self.share, self.temperature = settings.kind, settings.lambda_, settings.temperature
        self.label_loss = settings.build_class_loss() if self.share else None
        embed_dim, width, hidden = student.embed_dim, facts.target_width, settings.hidden
        # Initialised even if replaced below: the draws fix the weights that a seed gives.
        layers: list[nn.Module] = [nn.Linear(embed_dim, width)]
        if hidden:
            layers = [
                nn.Linear(embed_dim, hidden),
                nn.Hardswish(),
                nn.Dropout(settings.dropout),
                nn.Linear(hidden, width),
            ]
        self.projection = nn.Sequential(*layers)

    @classmethod
    def needs(cls, settings: EmbeddingSettings) -> Needs:
        """Return: a teacher's embeddings; labels if lambda is above 0; clusters for `cluster_contrastive`."""
        clusters = settings.kind == "cluster_contrastive"
        needs = Needs("embeddings", clusters=clusters, teacher="required", mixup=not clusters)
        if not settings.lambda_:
            return needs
        loss = settings.build_class_loss()
        return replace(needs, output=loss.outputs, activation=loss.activation, labels=True)

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, computed in float32 at any precision.

        Returns:
            `loss`; its unweighted terms, `loss_teacher` and `loss_labels`; and `cosine`, the mean cosine of projected
            and teacher's embeddings.
        """
        output = None
        if self.label_loss:
            output, embedding = student.tag_and_embed(batch.mel, batch.n_frames)
        else:
            embedding = student.embed_clips(batch.mel, batch.n_frames)
        target = batch.target.float()
        with torch.autocast(target.device.type, enabled=False):
            projected = self.projection(embedding.float())
            cosine = compute_cosines(projected, target).mean()
            loss = teacher_loss = self._teacher_loss(projected, target, batch.cluster, cosine)
            losses = {"loss_teacher": teacher_loss, "cosine": cosine.detach()}
            if self.label_loss and output is not None and batch.labels is not None:
                label_loss = self.label_loss(output.float(), batch.labels.float())
                loss = self.share * label_loss + (1 - self.share) * teacher_loss
                losses["loss_labels"] = label_loss
        return {"loss": loss, **losses}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the means over a batch for `constant_loss`."""
        target = batch.target.float()
        means: dict[str, Tensor] = {}
        if self.kind == "cosine":
            means["direction"] = F.normalize(target, eps=_MIN_NORM).mean(dim=0)
        elif self.kind == "mse":
            means |= {"embedding": target.mean(dim=0), "square": target.square().mean()}
        elif self.kind == "kl":
            share = (target / self.temperature).softmax(dim=1)
            means |= {"share": share.mean(dim=0), "entropy": torch.special.entr(share).sum(dim=1).mean()}
        if self.label_loss and batch.labels is not None:
            means["target"] = self.label_loss.compute_mean_target(batch.labels)
        return means

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of the best constant embedding and, for the labels, output.

        Known for `cosine` (1 - the length of the mean direction), `mse` (the variance) and `kl`.
        """
        label_loss = self.label_loss.constant_loss(means["target"]) if self.label_loss else 0.0
        if self.kind == "cosine":
            teacher_loss = 1 - float(means["direction"].norm())
        elif self.kind == "mse":
            teacher_loss = float(means["square"] - means["embedding"].square().mean())
        elif self.kind == "kl":
            excess = compute_mean_entropy(means["share"], "softmax") - float(means["entropy"])  # summed over W
            teacher_loss = excess / len(means["share"]) * self.temperature**2
        else:
            return None
        return None if label_loss is None else self.share * label_loss + (1 - self.share) * teacher_loss

    def _teacher_loss(self, projected: Tensor, target: Tensor, cluster: Tensor | None, cosine: Tensor) -> Tensor:
        if self.kind == "cosine":
            return 1 - cosine
        if self.kind in ("mse", "l1"):
            return (F.mse_loss if self.kind == "mse" else F.l1_loss)(projected, target)
        if self.kind == "kl":
            return compute_divergence(projected, target, self.temperature)
        return compute_contrastive_loss(
            projected, target, self.temperature, cluster if self.kind == "cluster_contrastive" else None
        )


for _kind in KINDS:
    register_objective(_kind, kind=_kind)(EmbeddingDistillation)
