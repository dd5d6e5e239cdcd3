"""Patch-out: in training, random rows and columns of the patch grid are not computed.

Method: Koutini et al., "Efficient training of audio transformers with patchout", Interspeech 2022.

Letters: R rows of the network's batch, f and t rows and columns of the patch grid, N' tokens that are left.
"""

import torch
from torch import Tensor

from models.base import Encoded


def draw_patch_out(
    encoded: Encoded, n_columns_out: int, n_rows_out: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw the rows and columns that are left of the grid of a whole batch.

    Args:
        encoded: `grid`, `valid` and `n_steps` are read, and replaced by those of what is left.
        n_columns_out: columns to leave out; at least one stays.
        n_rows_out: rows to leave out; at least one stays.
        generator: of the draws, None for torch's default.
        device: of the result.

    Returns:
        Ascending places in the f t patches, frequency-major, (N',).
    """
    n_rows, n_columns = encoded.grid
    columns = _draw_kept(n_columns, n_columns_out, generator, device)
    if encoded.valid is not None:
        columns[0] = 0  # the one column that every clip has
        encoded.valid = encoded.valid[:, columns]
    rows = _draw_kept(n_rows, n_rows_out, generator, device)
    if encoded.n_steps is not None:
        encoded.n_steps = (columns < encoded.n_steps[:, None]).sum(1)
    encoded.grid = len(rows), len(columns)
    return (rows[:, None] * n_columns + columns).flatten()


def _draw_kept(size: int, n_out: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Ascending indices; nothing is drawn where all of them stay."""
    if not n_out:
        return torch.arange(size, device=device)
    order = torch.randperm(size, generator=generator, device=device if generator is None else generator.device)
    return order[: max(size - n_out, 1)].sort().values.to(device)
