"""The objective `mae`: a masked auto-encoder on spectrograms, without labels and without a teacher.

Method: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, as CED's networks were pre-trained
(RicherMans/SAT): a share of the patches is hidden, the encoder computes the others, a small decoder predicts the hidden
patches of the spectrogram, each normalised to mean 0 and variance 1; the loss is the mean squared error of hidden
patches alone.

Differences to the published training: the decoder is smaller by default (512 x 4 has 9.5 times the multiplications of
ced_tiny's encoder), its positions are fixed; and batch norms keep the statistics of the start, since those of a batch
would depend on hidden patches.

Letters: B clips, M masked tokens.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import Faults
from distill.batch import Batch
from distill.objectives.base import TrainingFacts, register_objective
from distill.objectives.collapse import VARIANCE
from distill.objectives.masked import MaskedObjective
from distill.objectives.masking import (
    average_tokens,
    check_student,
    cut_patches,
    encode_tokens,
    get_patch_shape,
    mask_clips,
)
from distill.objectives.token_predictor import (
    HEAD_WIDTH,
    TokenPredictor,
    check_memory,
    count_block_parameters,
    read_mask_ratio,
    read_size,
)
from models.base import AudioTagger
from models.vit import SpectrogramTransformer

_EPSILON = 1e-6  # of the variance of a patch


@dataclass(frozen=True)
class MaeSettings:
    """Settings of `mae`.

    Attributes:
        mask_ratio: share of the patches that is hidden.
        decoder_width: a multiple of 32; by default two thirds of the student's width, 64 to 512.
        decoder_depth: number of blocks.
        normalise_patches: whether the target is each patch with mean 0 and variance 1, instead of its values.
    """

    mask_ratio: Any = 0.75
    decoder_width: Any = None
    decoder_depth: Any = 2
    normalise_patches: bool = True

    def __post_init__(self) -> None:
        faults = Faults("mae")
        with faults.noted():
            object.__setattr__(self, "mask_ratio", read_mask_ratio(self.mask_ratio))
        with faults.noted():
            read_size("decoder_width", self.decoder_width, HEAD_WIDTH)
        with faults.noted():
            read_size("decoder_depth", self.decoder_depth)
        faults.raise_if_any()


@register_objective("mae")
class MaskedAutoEncoder(MaskedObjective):
    """Predicts hidden patches of the spectrogram; clips longer than the student's window are cropped at random.

    Attributes:
        decoder: from visible tokens to hidden ones.
        output: to the values of a patch.
    """

    Settings = MaeSettings

    def __init__(self, settings: MaeSettings, student: AudioTagger, facts: TrainingFacts) -> None:
        super().__init__(settings, student, facts)
        student = check_student(student)
        width = settings.decoder_width or min(512, max(64, 64 * round(student.width / 96)))
        depth = settings.decoder_depth or 2
        check_memory(f"decoder_width {width} and decoder_depth {depth}", count_block_parameters(width, depth))
        self.decoder = TokenPredictor(student.width, width, depth)
        size, _ = get_patch_shape(student)
        self.output = nn.Linear(width, size[0] * size[1])

    def forward(self, student: AudioTagger, batch: Batch) -> dict[str, Tensor]:
        """Return `loss`, and the variance of tokens among clips."""
        student = cast(SpectrogramTransformer, student)
        batch, mask = mask_clips(self.seed, student, batch, self.settings.mask_ratio)
        encoded = encode_tokens(student, batch, mask.visible)
        patches = cut_patches(student, batch.mel, encoded.grid)
        target = patches.gather(1, mask.masked[..., None].expand(-1, -1, patches.shape[2])).float()  # (B,M,values)
        if self.settings.normalise_patches:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) / (variance + _EPSILON).sqrt()
        predicted = self.output(self.decoder(encoded, mask))
        error = (predicted.float() - target).square().mean(2)  # (B,M)
        return {
            "loss": average_tokens(error, mask.is_target),
            VARIANCE: self.variance.measure(encoded, mask.is_visible),
        }
