"""Objectives with a teacher's clip embeddings as targets: S-SONDO's, with or without labels.

A projection takes the student's embedding into the teacher's space, and a loss compares the two there: `cosine`, `mse`,
`l1`, `kl`, `contrastive` or `cluster_contrastive` (El Adlouni et al., "S-SONDO", ICASSP 2026). The projection belongs
to the objective: it is trained with the student and is no part of its checkpoint.

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
from distill.objectives.target import TargetSettings, mean_entropy
from models.base import AudioTagger

KINDS = ("cosine", "mse", "l1", "kl", "contrastive", "cluster_contrastive")
TEMPERATURES = {"kl": 1.0, "contrastive": 0.07, "cluster_contrastive": 0.07}  # by default
_MIN_NORM = 1e-6  # shorter vectors have no direction: their cosines go to 0


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of each row of `one` (B, W) to the same row of `other` (B, W): (B,), 0 to a row of zeros."""
    return (F.normalize(one, eps=_MIN_NORM) * F.normalize(other, eps=_MIN_NORM)).sum(dim=1)


def divergence(projected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(target / T) || softmax(projected / T)) * T^2, averaged over B and, as published, over W."""
    said, taught = ((x / temperature).log_softmax(dim=1) for x in (projected, target))
    total = F.kl_div(said, taught, reduction="sum", log_target=True)
    return total * temperature**2 / target.numel()


def contrast(projected: Tensor, target: Tensor, temperature: float, cluster: Tensor | None = None) -> Tensor:
    """Return the symmetric contrastive loss (InfoNCE) between the embeddings of student and teacher.

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
    logits = F.normalize(projected, eps=_MIN_NORM) @ F.normalize(target, eps=_MIN_NORM).T / temperature  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    if cluster is not None:
        alike = (cluster[:, None] == cluster[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(alike, -math.inf)  # a logit of 0 would still add exp(0) = 1
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@dataclass(frozen=True)
class EmbeddingSettings(TargetSettings):
    """Settings of objectives over embeddings.

    Attributes:
        loss: of the labels, see `ClassLoss`; used where lambda is above 0, and so are the next two.
        loss_args: its arguments.
        label_smoothing: of the labels.
        kind: one of `KINDS`. `cosine` is the mean of 1 - cosine; `mse` and `l1` are means over clips and width, of
            embeddings as they are; for `kl` see `divergence`, for `contrastive` and `cluster_contrastive` `contrast`.
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

    The contrastive kinds take their negatives from the part of the batch that a process holds: with several processes,
    or a batch cut by `accumulate`, there are fewer of them.

    Attributes:
        projection: (B, E) -> (B, W).
    """

    Settings = EmbeddingSettings

    def __init__(self, settings: EmbeddingSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.kind, self.share, self.temperature = settings.kind, settings.lambda_, settings.temperature
        self.label_loss = settings.class_loss() if self.share else None
        embed_dim, width, hidden = student.embed_dim, facts.target_width, settings.hidden
        # Always initialised first, so that results of seeds do not change.
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
        """A teacher's embeddings; labels if they have a share; clusters if clips of one are not negatives."""
        clusters = settings.kind == "cluster_contrastive"
        needs = Needs("embeddings", clusters=clusters, teacher="required", mixup=not clusters)
        if not settings.lambda_:
            return needs
        loss = settings.class_loss()
        return replace(needs, output=loss.outputs, activation=loss.activation, labels=True)

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, computed in float32 at any precision.

        Returns:
            `loss`; what it is made of before it is weighed, `loss_teacher` and `loss_labels`; and `cosine`, the mean
            cosine of projected and teacher's embeddings.
        """
        output = None
        if self.label_loss:
            output, embedding = student.tag_and_embed(batch.mel, batch.n_frames)
        else:
            embedding = student.embed_clips(batch.mel, batch.n_frames)
        target = batch.target.float()
        with torch.autocast(target.device.type, enabled=False):
            projected = self.projection(embedding.float())
            likeness = cosines(projected, target).mean()
            loss = teacher_loss = self._teacher_loss(projected, target, batch.cluster, likeness)
            losses = {"loss_teacher": teacher_loss, "cosine": likeness.detach()}
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
            means["target"] = self.label_loss.mean_target(batch.labels)
        return means

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of one embedding, and one output for the labels, for all clips.

        It is known for `cosine` (1 - the length of the mean direction), `mse` (the variance) and `kl`.
        """
        label_loss = self.label_loss.constant_loss(means["target"]) if self.label_loss else 0.0
        if self.kind == "cosine":
            teacher_loss = 1 - float(means["direction"].norm())
        elif self.kind == "mse":
            teacher_loss = float(means["square"] - means["embedding"].square().mean())
        elif self.kind == "kl":
            excess = mean_entropy(means["share"], "softmax") - float(means["entropy"])  # in all of W
            teacher_loss = excess / len(means["share"]) * self.temperature**2
        else:
            return None
        return None if label_loss is None else self.share * label_loss + (1 - self.share) * teacher_loss

    def _teacher_loss(self, projected: Tensor, target: Tensor, cluster: Tensor | None, likeness: Tensor) -> Tensor:
        if self.kind == "cosine":
            return 1 - likeness
        if self.kind in ("mse", "l1"):
            return (F.mse_loss if self.kind == "mse" else F.l1_loss)(projected, target)
        if self.kind == "kl":
            return divergence(projected, target, self.temperature)
        return contrast(projected, target, self.temperature, cluster if self.kind == "cluster_contrastive" else None)


for _kind in KINDS:
    register_objective(_kind, kind=_kind)(EmbeddingDistillation)
