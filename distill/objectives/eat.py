"""The objective `eat`: a teacher's pass over the whole clip serves several masks of the student.

After EAT (Chen et al., "EAT: Self-supervised pre-training with efficient audio transformer", IJCAI 2024) and data2vec
2.0 (Baevski et al., ICML 2023): the teacher, a moving average of the student, encodes all tokens once; the target of a
token is the mean of the outputs of all blocks, each normalised. The student encodes the visible tokens of each of
several masks; a predictor predicts the targets of masked tokens, and the mean of its tokens those of the clip.

    loss = mean squared error of masked tokens + clip_weight * mean squared error of the clip

This project's own choices: masks are random, not blocks; the predictor is a transformer, not a CNN; the clip's vector
is the mean of the student's tokens behind a linear layer, not a class token.

Letters: B clips, G masks of a clip, K visible and M masked tokens, N = f t tokens, D width.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import Faults
from distill.batch import Batch
from distill.objectives.base import TrainingFacts, register_objective
from distill.objectives.collapse import VARIANCE
from distill.objectives.masked import MaskedObjective
from distill.objectives.masking import TokenMask, average_tokens, check_student, encode_tokens, mask_clips
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
from distill.random_streams import derive_seed
from models.base import AudioTagger
from models.vit import SpectrogramTransformer

PUBLISHED_STEPS = 400_000
DECAYS = 0.9998, 0.99999  # of the moving average, from start to end


@dataclass(frozen=True)
class EatSettings:
    """Settings of `eat`; None stands for the value at the student's width.

    Attributes:
        mask_ratio: share of the patches that is masked.
        masks: G.
        clip_weight: of the clip's loss.
        predictor_width: a multiple of 32.
        predictor_depth: number of blocks.
        decay: of the moving average at the start and the end.
    """

    mask_ratio: Any = 0.8
    masks: Any = 4
    clip_weight: Any = 1.0
    predictor_width: Any = None
    predictor_depth: Any = 2
    decay: Any = None

    def __post_init__(self) -> None:
        faults = Faults("eat")
        with faults.noted():
            object.__setattr__(self, "mask_ratio", read_mask_ratio(self.mask_ratio))
        with faults.noted():
            read_size("masks", self.masks, optional=False)
        with faults.noted():
            weight = read_number("clip_weight", self.clip_weight, lambda w: 0 <= w < 1e6, "a number, 0 or more")
            object.__setattr__(self, "clip_weight", weight)
        with faults.noted():
            read_size("predictor_width", self.predictor_width, HEAD_WIDTH)
        with faults.noted():
            read_size("predictor_depth", self.predictor_depth)
        with faults.noted():
            object.__setattr__(self, "decay", read_decay(self.decay))
        faults.raise_if_any()


@register_objective("eat")
class Eat(MaskedObjective):
    """Predicts a moving average's output of masked tokens and of the clip, with several masks a clip.

    Attributes:
        teacher: moving average of the student.
        predictor: from visible tokens to masked ones.
        output: to the target of a token.
        clip_output: from the mean of the student's tokens to the mean of the targets.
    """

    Settings = EatSettings

    def __init__(self, settings: EatSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        student = check_student(student)
        width = settings.predictor_width or min(512, max(64, HEAD_WIDTH * (student.width // 64)))
        depth = settings.predictor_depth or 2
        check_memory(f"predictor_width {width} and predictor_depth {depth}", count_block_parameters(width, depth))
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.predictor = TokenPredictor(student.width, width, depth)
        self.output = nn.Linear(width, student.width)
        self.clip_output = nn.Linear(student.width, student.width)

    def start(self, student: AudioTagger) -> None:
        """Check the batch norms, and copy their statistics to the teacher."""
        super().start(student)
        self.teacher.load_state_dict(student.state_dict())

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return `loss`, its terms `loss_tokens` and `loss_clip`, and the variance of tokens among clips."""
        student = cast(SpectrogramTransformer, student)
        cropped, mask = self._draw_masks(student, batch)
        targets = self._compute_targets(cropped)  # (B,N,D)
        copies = self.settings.masks
        repeated = replace(
            cropped,
            mel=cropped.mel.repeat(copies, 1, 1),
            n_frames=None if cropped.n_frames is None else cropped.n_frames.repeat(copies),
        )
        encoded = encode_tokens(student, repeated, mask.visible)
        predicted = self.output(self.predictor(encoded, mask)).float()  # (G B,M,D)
        places = mask.masked[..., None].expand(-1, -1, targets.shape[2])
        target = targets.repeat(copies, 1, 1).gather(1, places)  # (G B,M,D)
        tokens = average_tokens((predicted - target).square().mean(2), mask.is_target)
        visible = cast(Tensor, encoded.tokens).float()
        counted = visible.new_ones(mask.visible.shape) if mask.is_visible is None else mask.is_visible.float()
        mean = (visible * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        clip = (self.clip_output(mean).float() - self._average_targets(targets, mask)).square().mean()
        loss = tokens + self.settings.clip_weight * clip
        watched = self.variance.measure(encoded, mask.is_visible)
        return {"loss": loss, "loss_tokens": tokens, "loss_clip": clip, VARIANCE: watched}

    def _draw_masks(self, student: SpectrogramTransformer, batch: Batch) -> tuple[Batch, TokenMask]:
        """Crop the clips and draw G masks of each: rows of the second mask behind those of the first."""
        cropped, masks = batch, []
        for number in range(self.settings.masks):
            seed = self.seed if number == 0 else derive_seed(self.seed, number)
            # The first call crops, by the run's seed; for the others there is nothing left to crop.
            cropped, mask = mask_clips(seed, student, cropped, self.settings.mask_ratio)
            masks.append(mask)
        visible, masked, is_target = (
            torch.cat([getattr(mask, name) for mask in masks]) for name in ("visible", "masked", "is_target")
        )
        valid = [mask.is_visible for mask in masks if mask.is_visible is not None]
        return cropped, TokenMask(visible, masked, is_target, torch.cat(valid) if valid else None)

    @torch.no_grad()
    def _compute_targets(self, batch: Batch) -> Tensor:
        """Return the mean of the teacher's blocks for every token, each normalised, (B,N,D) float32."""
        n_blocks = len(self.teacher.blocks)
        encoded = self.teacher.encode(batch.mel, batch.n_frames, layers=range(n_blocks))
        width = (self.teacher.width,)
        outputs = [F.layer_norm(encoded.layers[block].float(), width) for block in range(n_blocks)]
        mean = torch.stack(outputs).mean(0)[:, self.teacher.n_prefix :]
        return F.layer_norm(mean, width)

    def _average_targets(self, targets: Tensor, mask: TokenMask) -> Tensor:
        """Return the mean of the targets of each clip without its padding, for each mask: (B,N,D) -> (G B,D)."""
        counts = torch.zeros(len(mask.visible), targets.shape[1], device=targets.device)  # (G B,N)
        for places, counted in ((mask.visible, mask.is_visible), (mask.masked, mask.is_target)):
            values = torch.ones_like(places, dtype=counts.dtype) if counted is None else counted.to(counts.dtype)
            counts.scatter_reduce_(1, places, values, "amax")  # places of padding may be among both
        repeated = targets.repeat(self.settings.masks, 1, 1)
        return (repeated * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)

    def after_step(self, student: AudioTagger, step: int, n_steps: int) -> None:
        """Update the teacher and the running means of the tokens."""
        super().after_step(student, step, n_steps)
        first, last = self.settings.decay or (shorten_decay(each, PUBLISHED_STEPS, n_steps) for each in DECAYS)
        update_average(self.teacher, student, first + (last - first) * step / n_steps)
