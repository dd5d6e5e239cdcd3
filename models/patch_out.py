"""Patch-out: in training, random rows and columns of the patch grid are dropped.

Method: Koutini et al., "Efficient training of audio transformers with patchout", Interspeech 2022.

Letters: R rows of the network's batch, f and t rows and columns of the patch grid, N' remaining tokens.
"""

import torch
from torch import Tensor

from models.base import Encoded


def draw_patch_out(
    encoded: Encoded, n_columns_out: int, n_rows_out: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw the remaining rows and columns of the patch grid, the same for the whole batch.

    Args:
        encoded: `grid`, `valid` and `n_steps` are updated to the remaining patches.
        n_columns_out: number of columns to drop; at least one remains.
        n_rows_out: number of rows to drop; at least one remains.
        generator: random generator, None for torch's default.
        device: of the result.

    Returns:
        Ascending indices into the f t patches, frequency-major, (N',).
    """
    n_rows, n_columns = encoded.grid
    columns = _draw_kept(n_columns, n_columns_out, generator, device)
    if encoded.valid is not None:
        columns[0] = 0  # the one column that is valid in every clip
        encoded.valid = encoded.valid[:, columns]
    rows = _draw_kept(n_rows, n_rows_out, generator, device)
    if encoded.n_steps is not None:
        encoded.n_steps = (columns < encoded.n_steps[:, None]).sum(1)
    encoded.grid = len(rows), len(columns)
    return (rows[:, None] * n_columns + columns).flatten()


def _draw_kept(size: int, n_out: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw ascending indices; without random draws where `n_out` is 0."""
    if not n_out:
        return torch.arange(size, device=device)
    order = torch.randperm(size, generator=generator, device=device if generator is None else generator.device)
    return order[: max(size - n_out, 1)].sort().values.to(device)
