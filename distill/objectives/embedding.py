"""Objectives with a teacher's clip embeddings as targets: S-SONDO's, with or without labels.

A projection maps the student's embedding to the teacher's space, where a loss compares the two: `cosine`, `mse`,
`l1`, `kl`, `contrastive` or `cluster_contrastive` (El Adlouni et al., "S-SONDO", ICASSP 2026). The projection belongs
to the objective: it is trained with the student and is not in its checkpoint. With several teachers (not part of
S-SONDO), each has a projection and a loss of its own, and the mean of the losses is minimised.

Shapes: B batch · C classes · E embedding width of the student · W of the teacher, or of all teachers together.
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
from distill.objectives.numbers import read_label_share, read_number, read_weights
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
        weights: of the losses of several teachers, in their order; only their ratios matter. None: equal ones.
    """

    kind: str = "cosine"
    lambda_: Any = 0.0
    hidden: int = 1280
    dropout: Any = 0.2
    temperature: Any = None
    weights: Any = None

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
        with faults.noted():
            object.__setattr__(self, "weights", read_weights("weights", self.weights))
        faults.raise_if_any()
        if self.lambda_:
            super().__post_init__()


def _create_projection(embed_dim: int, width: int, settings: EmbeddingSettings) -> nn.Sequential:
    """Create a projection (B, E) -> (B, W_k)."""
    # Initialised even if replaced below: the draws fix the weights that a seed gives.
    layers: list[nn.Module] = [nn.Linear(embed_dim, width)]
    if settings.hidden:
        layers = [
            nn.Linear(embed_dim, settings.hidden),
            nn.Hardswish(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, width),
        ]
    return nn.Sequential(*layers)


class _ParallelProjections(nn.ModuleList):
    """Projections of one embedding to the spaces of several teachers: (B, E) -> (B, W), side by side."""

    def forward(self, embedding: Tensor) -> Tensor:
        return torch.cat([projection(embedding) for projection in self], dim=1)


class EmbeddingDistillation(Objective):
    """Distance of the student's projected embedding to the teacher's: share * labels + (1 - share) * teacher.

    With several teachers, the second term is the mean of their losses by `weights`, each as with this teacher alone.
    The contrastive kinds take their negatives from the part of the batch in one process: with several processes,
    or a batch split by `accumulate`, there are fewer.

    Attributes:
        projection: (B, E) -> (B, W).
        widths: of the teachers' embeddings in a target.
        weights: share of each teacher in the loss, sum 1.

    Raises:
        UserError: `weights` are not one for each teacher.
    """

    Settings = EmbeddingSettings

    def __init__(self, settings: EmbeddingSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        self.kind, self.share, self.temperature = settings.kind, settings.lambda_, settings.temperature
        self.label_loss = settings.build_class_loss() if self.share else None
        self.widths = facts.target_widths
        weights = settings.weights or (1.0,) * len(self.widths)
        if len(weights) != len(self.widths):
            raise UserError(
                f"objective {self.kind}: number of weights: {len(weights)}, of teachers: {len(self.widths)}; give one "
                "weight for each teacher, in their order, or drop weights"
            )
        self.weights = [weight / sum(weights) for weight in weights]
        projections = [_create_projection(student.embed_dim, width, settings) for width in self.widths]
        # One teacher's is not wrapped, so that states of runs keep their keys.
        self.projection = projections[0] if len(projections) == 1 else _ParallelProjections(projections)

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
            and teacher's embeddings. With several teachers, `loss_teacher` and `cosine` are means by `weights`, and
            `loss_teacher_1`, `cosine_1` and so on are those of each.
        """
        output = None
        if self.label_loss:
            output, embedding = student.tag_and_embed(batch.mel, batch.n_frames)
        else:
            embedding = student.embed_clips(batch.mel, batch.n_frames)
        target = batch.target.float()
        with torch.autocast(target.device.type, enabled=False):
            projected = self.projection(embedding.float())
            pairs = zip(self._split(projected), self._split(target), strict=True)
            terms = [self._teacher_loss(*pair, batch.cluster) for pair in pairs]
            losses = {"loss_teacher": self._average([loss for loss, _ in terms])}
            losses["cosine"] = self._average([cosine for _, cosine in terms])
            if len(terms) > 1:
                for number, (teacher_loss, cosine) in enumerate(terms, start=1):
                    losses |= {f"loss_teacher_{number}": teacher_loss.detach(), f"cosine_{number}": cosine}
            loss = losses["loss_teacher"]
            if self.label_loss and output is not None and batch.labels is not None:
                label_loss = self.label_loss(output.float(), batch.labels.float())
                loss = self.share * label_loss + (1 - self.share) * losses["loss_teacher"]
                losses["loss_labels"] = label_loss
        return {"loss": loss, **losses}

    def target_statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the means over a batch for `constant_loss`."""
        means: dict[str, Tensor] = {}
        for suffix, target in zip(self._suffixes, self._split(batch.target.float()), strict=True):
            means |= {f"{name}{suffix}": mean for name, mean in self._describe_target(target).items()}
        if self.label_loss and batch.labels is not None:
            means["target"] = self.label_loss.compute_mean_target(batch.labels)
        return means

    def constant_loss(self, means: Mapping[str, Tensor]) -> float | None:
        """Return the loss of the best constant embedding and, for the labels, output.

        Known for `cosine` (1 - the length of the mean direction), `mse` (the variance) and `kl`.
        """
        label_loss = self.label_loss.constant_loss(means["target"]) if self.label_loss else 0.0
        if self.kind not in ("cosine", "mse", "kl") or label_loss is None:
            return None
        pairs = zip(self.weights, self._suffixes, strict=True)
        teacher_loss = sum(weight * self._constant_teacher_loss(means, suffix) for weight, suffix in pairs)
        return self.share * label_loss + (1 - self.share) * teacher_loss

    @property
    def _suffixes(self) -> list[str]:
        """Ends of the names of each teacher's values; none for a single teacher."""
        return [""] if len(self.widths) == 1 else [f"_{number}" for number in range(1, len(self.widths) + 1)]

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the part (B, W_k) of each teacher of projected or target embeddings (B, W)."""
        return values.split(self.widths, dim=1)

    def _average(self, values: list[Tensor]) -> Tensor:
        """Return the mean of the teachers' values by their weights."""
        return torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)]).sum()

    def _describe_target(self, target: Tensor) -> dict[str, Tensor]:
        """Return the means over the embeddings (B, W_k) of one teacher."""
        if self.kind == "cosine":
            return {"direction": F.normalize(target, eps=_MIN_NORM).mean(dim=0)}
        if self.kind == "mse":
            return {"embedding": target.mean(dim=0), "square": target.square().mean()}
        if self.kind == "kl":
            share = (target / self.temperature).softmax(dim=1)
            return {"share": share.mean(dim=0), "entropy": torch.special.entr(share).sum(dim=1).mean()}
        return {}

    def _constant_teacher_loss(self, means: Mapping[str, Tensor], suffix: str) -> float:
        """Return the loss of the best constant embedding in the space of one teacher."""
        if self.kind == "cosine":
            return 1 - float(means[f"direction{suffix}"].norm())
        if self.kind == "mse":
            return float(means[f"square{suffix}"] - means[f"embedding{suffix}"].square().mean())
        share = means[f"share{suffix}"]
        excess = compute_mean_entropy(share, "softmax") - float(means[f"entropy{suffix}"])  # summed over W_k
        return excess / len(share) * self.temperature**2

    def _teacher_loss(self, projected: Tensor, target: Tensor, cluster: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of one teacher, and its mean cosine without a gradient."""
        cosine = compute_cosines(projected, target).mean()
        if self.kind == "cosine":
            loss = 1 - cosine
        elif self.kind in ("mse", "l1"):
            loss = (F.mse_loss if self.kind == "mse" else F.l1_loss)(projected, target)
        elif self.kind == "kl":
            loss = compute_divergence(projected, target, self.temperature)
        else:
            clusters = cluster if self.kind == "cluster_contrastive" else None
            loss = compute_contrastive_loss(projected, target, self.temperature, clusters)
        return loss, cosine.detach()


for _kind in KINDS:
    register_objective(_kind, kind=_kind)(EmbeddingDistillation)
