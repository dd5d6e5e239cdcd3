"""The objectives `matpac` and `matpac++`: masked latent prediction and unsupervised classification.

Method: Quelennec et al., "MATPAC: Masked latent prediction and classification for self-supervised audio representation
learning", ICASSP 2025 (arXiv 2502.12031), and "MATPAC++", arXiv 2508.12709. The student encodes the visible tokens; a
predictor predicts, for each masked token, the output of a teacher that encodes the masked tokens alone; the teacher is
the student's moving average. Heads of student and teacher turn predicted and target tokens into distributions over
classes without names, as DINO does (Caron et al., ICCV 2021).

    loss = (1 - alpha) * prediction + alpha * classification
    prediction = 2 - 2 cos(predicted, target), a mean over masked tokens
    classification = cross-entropy of softmax((teacher - centre) / t) and softmax(student / 0.1)

MATPAC++ has several outputs of the predictor; the loss of each token is weighted by softmax(-loss / temperature), whose
temperature falls until the best output alone is trained, and the best one is classified.

Differences to the published code: the centre is the mean of the teacher's output before the softmax, which it is
subtracted from (published: after it); the moving average includes the projection of patches, and starts as a copy of
the student; decays, warm-up and temperature depend on the share of the run that has passed, so that short runs have the
published schedule, and the published numbers follow for 294,816 steps. Sizes of predictor and heads follow from the
student's width, and are the published ones at 768.

Letters: B clips, M masked tokens, D width of the student, C classes, O outputs of the predictor.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults, UserError
from distill.batch import Batch
from distill.objectives.base import TrainingFacts, register_objective
from distill.objectives.collapse import VARIANCE, RunningMean, measure_classes
from distill.objectives.masked import MaskedObjective
from distill.objectives.masking import average_tokens, check_student, encode_tokens, mask_clips
from distill.objectives.moving_average import read_decay, shorten_decay, update_average
from distill.objectives.numbers import read_number
from distill.objectives.token_predictor import (
    HEAD_WIDTH,
    TokenPredictor,
    check_memory,
    count_block_parameters,
    read_mask_ratio,
    read_size,
)
from models.base import AudioTagger
from models.layers import initialise
from models.vit import SpectrogramTransformer

PUBLISHED_STEPS = 294_816
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURES = 0.04, 0.07  # at the start, and after the warm-up
WARMUP = 9_827 / PUBLISHED_STEPS
DECAYS = 0.99995, 0.99999  # of the encoder's moving average, from start to end
HEAD_DECAYS = 0.998, 1.0
CENTRE_MOMENTUM = 0.9
ANNEALING = 0.1, 0.99997, 1e-4  # temperature of the outputs: at the start, factor of a step, below it the best alone
PUBLISHED_WIDTH = 768


@dataclass(frozen=True)
class MatpacSettings:
    """Settings of `matpac` and `matpac++`; None stands for the value at the student's width.

    Attributes:
        mask_ratio: share of the patches that is masked.
        alpha: share of the classification in the loss, 0 to 1.
        classes: C.
        predictor_width: a multiple of 32.
        predictor_depth: number of blocks.
        head_width: hidden width of the heads.
        decay: of the moving average at the start and the end; by default that of the published run at the same shares
            of the run.
        outputs: O, 1 for `matpac`.
    """

    mask_ratio: Any = 0.7
    alpha: Any = 0.5
    classes: Any = None
    predictor_width: Any = None
    predictor_depth: Any = None
    head_width: Any = None
    decay: Any = None
    outputs: Any = 1

    def __post_init__(self) -> None:
        faults = Faults("matpac")
        with faults.noted():
            object.__setattr__(self, "mask_ratio", read_mask_ratio(self.mask_ratio))
        with faults.noted():
            alpha = read_number("alpha", self.alpha, lambda a: 0 <= a <= 1, "the share of the classification, 0 to 1")
            object.__setattr__(self, "alpha", alpha)
        for name in ("classes", "predictor_depth", "head_width", "outputs"):
            with faults.noted():
                read_size(name, getattr(self, name), optional=name != "outputs")
        with faults.noted():
            read_size("predictor_width", self.predictor_width, HEAD_WIDTH)
        with faults.noted():
            if self.classes == 1:
                raise UserError("classes is 1; expected at least 2")
        with faults.noted():
            object.__setattr__(self, "decay", read_decay(self.decay))
        faults.raise_if_any()


class ClassHead(nn.Module):
    """Tokens (..., D) -> cosines with the classes' directions, scaled, (..., C): DINO's head.

    Args:
        width: D.
        hidden: width of its two hidden layers.
        bottleneck: width of the normalised vectors.
        classes: C.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.layers.apply(initialise)
        self.directions = nn.Parameter(torch.randn(classes, bottleneck))
        self.scale = nn.Parameter(torch.ones(classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        x = F.normalize(self.layers(x).float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # half precision is coarse for what a temperature divides
            return F.linear(x, self.scale * F.normalize(self.directions, dim=1))


@register_objective("matpac", outputs=1)
class Matpac(MaskedObjective):
    """Masked latent prediction and classification.

    Attributes:
        teacher: moving average of the student.
        predictor: from visible tokens to masked ones.
        output: to O predictions of the teacher's output.
        head: of the student.
        teacher_head: its moving average.
        centre: running mean of the teacher head's output.
        progress: share of the run that has passed, a scalar tensor.
    """

    Settings = MatpacSettings

    def __init__(self, settings: MatpacSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        student = check_student(student)
        width = student.width
        share = width / PUBLISHED_WIDTH
        inner = settings.predictor_width or min(512, HEAD_WIDTH * math.ceil(width / HEAD_WIDTH))
        depth = settings.predictor_depth or max(2, round(8 * share))
        check_memory(f"predictor_width {inner} and predictor_depth {depth}", count_block_parameters(inner, depth))
        classes = settings.classes or max(256, round(2048 * share))
        hidden, bottleneck = settings.head_width or max(256, round(2048 * share)), max(64, round(256 * share))
        n_parameters = hidden * (width + hidden + bottleneck) + classes * bottleneck
        check_memory(f"head_width {hidden} and classes {classes}", n_parameters)
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.predictor = TokenPredictor(width, inner, depth)
        self.output = nn.Linear(inner, settings.outputs * width)
        self.head = ClassHead(width, hidden, bottleneck, classes)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.centre = RunningMean(classes, CENTRE_MOMENTUM)
        self.class_mean = RunningMean(classes, 0.99)
        self.register_buffer("progress", torch.zeros(()))

    def start(self, student: AudioTagger) -> None:
        """Check the batch norms, and copy their statistics to the teacher."""
        super().start(student)
        self.teacher.load_state_dict(student.state_dict())

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return the losses.

        Returns:
            `loss`; its unweighted terms, `loss_prediction` and `loss_classes`; the variance of the student's
            tokens among clips, and the entropies of the classes, see `distill.objectives.collapse`.
        """
        student = cast(SpectrogramTransformer, student)
        batch, mask = mask_clips(self.seed, student, batch, self.settings.mask_ratio)
        encoded = encode_tokens(student, batch, mask.visible)
        predicted = self.output(self.predictor(encoded, mask)).unflatten(2, (self.settings.outputs, -1))  # (B,M,O,D)
        with torch.no_grad():
            target = cast(Tensor, encode_tokens(self.teacher, batch, mask.masked).tokens)  # (B,M,D)
        error = 2 - 2 * F.cosine_similarity(predicted.float(), target.float()[:, :, None], dim=3, eps=1e-6)  # (B,M,O)
        best = error.argmin(2)[..., None, None].expand(-1, -1, 1, predicted.shape[3])
        prediction = average_tokens((self._weigh_outputs(error) * error).sum(2), mask.is_target)
        classification, watched = self._classify(predicted.gather(2, best)[:, :, 0], target, mask.is_target)
        alpha = self.settings.alpha
        losses = {"loss": (1 - alpha) * prediction + alpha * classification}
        losses |= {"loss_prediction": prediction, "loss_classes": classification}
        return losses | {VARIANCE: self.variance.measure(encoded, mask.is_visible), **watched}

    def _weigh_outputs(self, error: Tensor) -> Tensor:
        """Return the weight of each output, without gradient: (B,M,O) -> (B,M,O)."""
        start, factor, least = ANNEALING
        progress = cast(Tensor, self.progress)
        temperature = start * torch.exp(progress * PUBLISHED_STEPS * math.log(factor))
        soft = (-error.detach() / temperature.clamp(min=least)).softmax(2)
        hard = F.one_hot(error.argmin(2), error.shape[2]).to(soft.dtype)
        return torch.where(temperature < least, hard, soft)

    def _classify(self, predicted: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of teacher and student, and the entropies of the classes: (B,M,D) each."""
        with torch.no_grad():
            output = self.teacher_head(target)  # (B,M,C)
            first, last = TEACHER_TEMPERATURES
            temperature = first + (last - first) * (cast(Tensor, self.progress) / WARMUP).clamp(max=1)
            probabilities = ((output - self.centre.mean) / temperature).softmax(-1)
            self.centre.add(output, is_target)
            watched = measure_classes(self.class_mean.value()[0], probabilities, is_target)
            self.class_mean.add(probabilities, is_target)
        student = (self.head(predicted) / STUDENT_TEMPERATURE).log_softmax(-1)
        return average_tokens(-(probabilities * student).sum(-1), is_target), watched

    @torch.no_grad()
    def after_step(self, student: AudioTagger, step: int, n_steps: int) -> None:
        """Update the moving averages, the centre and what depends on the share of the run."""
        progress = step / n_steps
        super().after_step(student, step, n_steps)
        self.centre.update()
        self.class_mean.update()
        update_average(self.teacher, student, self._compute_decay(progress, n_steps))
        first, last = (shorten_decay(each, PUBLISHED_STEPS, n_steps) for each in HEAD_DECAYS)
        update_average(self.teacher_head, self.head, first + (last - first) * progress)
        cast(Tensor, self.progress).fill_(progress)

    def _compute_decay(self, progress: float, n_steps: int) -> float:
        first, last = self.settings.decay or (shorten_decay(each, PUBLISHED_STEPS, n_steps) for each in DECAYS)
        return first + (last - first) * progress


@register_objective("matpac++")
class MatpacPlus(Matpac):
    """MATPAC with several outputs of the predictor (multiple choice learning), by default five."""

    @dataclass(frozen=True)
    class Settings(MatpacSettings):
        """Settings of `matpac++`, see `MatpacSettings`."""

        outputs: Any = 5
