"""The transformer that predicts masked tokens from visible ones: MAE's decoder, MATPAC's predictor.

Letters: B clips, f and t rows and columns of the patch grid, N = f t tokens, K visible and M masked ones, P prefix
tokens, D width of the student, W of the predictor, H heads.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from distill.objectives.masking import TokenMask
from distill.objectives.numbers import read_number
from models.base import Encoded
from models.layers import Block, initialise
from models.matpac import compute_positions

HEAD_WIDTH = 32  # W / H, as in MATPAC: 512 / 16
_BYTES = 16  # of a parameter in training: weight, gradient, two moments of Adam


def read_mask_ratio(value: Any) -> float:
    """Read the share of the tokens that is masked."""
    return read_number("mask_ratio", value, lambda share: 0 < share < 1, "a share between 0 and 1, both excluded")


def read_size(name: str, value: Any, step: int = 1, *, optional: bool = True) -> int | None:
    """Read a width or a number, a multiple of `step`; with `optional`, None stands for a choice by the student."""
    if value is None and optional:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    expected = f"a multiple of {step}" if step > 1 else "a whole number above 0"
    read_number(name, value, lambda n: is_whole and n >= step and n % step == 0, expected)
    return int(value)


def count_block_parameters(width: int, depth: int) -> int:
    """Return the number of parameters of transformer blocks, without biases and norms."""
    return 12 * width**2 * depth


def check_memory(settings: str, n_parameters: int) -> None:
    """Check that parameters can be trained in this machine's memory.

    Args:
        settings: their names and values, for the message.
        n_parameters: number of parameters.

    Raises:
        UserError: they are too many.
    """
    needed, available = _BYTES * n_parameters, read_memory()
    if needed > available:
        raise UserError(
            f"{settings} need {needed / 1e9:,.0f} GB to be trained, and this machine has {available / 1e9:,.0f} GB: "
            "choose smaller ones"
        )


def read_memory() -> int:
    """Return the size of this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class TokenPredictor(nn.Module):
    """Predicts masked tokens: blocks over visible tokens and mask tokens, each with its position.

    He et al., "Masked autoencoders are scalable vision learners", CVPR 2022; positions are fixed 2-D sines and cosines
    of any grid.

    Args:
        student_width: D.
        width: W, a multiple of `HEAD_WIDTH`.
        depth: number of blocks.
    """

    def __init__(self, student_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(student_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(initialise)

    def forward(self, encoded: Encoded, mask: TokenMask) -> Tensor:
        """Predict.

        Args:
            encoded: of the student, which has computed `mask.visible`.
            mask: the partition of the tokens.

        Returns:
            (B,M,W), normalised.
        """
        assert encoded.tokens is not None
        visible = self.embed(encoded.tokens)  # (B,K,W)
        places = torch.cat([mask.visible, mask.masked], 1)
        masked = self.mask_token.to(visible.dtype).expand(len(visible), mask.masked.shape[1], -1)
        positions = _make_positions(encoded.grid, visible.shape[2], visible.device).to(visible.dtype)
        x = torch.cat([visible, masked], 1) + positions[places]
        n_prefix = 0 if encoded.prefix is None else encoded.prefix.shape[1]
        if encoded.prefix is not None:
            x = torch.cat([self.embed(encoded.prefix), x], 1)
        bias = None
        if mask.is_visible is not None:
            valid = torch.cat([mask.is_visible, mask.is_target], 1)
            bias = nn.functional.pad(valid, (n_prefix, 0), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x[:, n_prefix + mask.visible.shape[1] :])


@lru_cache(maxsize=8)
def _make_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Return the positions of a grid of patches, (f t, width), frequency-major."""
    return compute_positions(width, *grid)[0, 1:].to(device)
