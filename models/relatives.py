"""Weights of relatives made to fit a transformer on spectrograms: of one for pictures, or for another length."""

import logging
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PATCHES = "patch_embed.proj.weight"


def is_of_pictures(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of an image transformer, such as timm's DeiT."""
    patches = state.get(_PATCHES)
    return patches is not None and patches.ndim == 4 and patches.shape[1] == 3


def from_pictures(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the three colours of an image transformer's patches, and leave out its last layers, with a notice.

    As AST and PaSST do. Its position embeddings stay as they are.
    """
    left_out = [key for key in state if key.startswith(("head.", "head_dist."))]
    logger.warning("of a network for pictures: three colours are summed, %s left out", ", ".join(left_out) or "nothing")
    kept = {key: value for key, value in state.items() if key not in left_out}
    return kept | {_PATCHES: state[_PATCHES].sum(1, keepdim=True)}


def fit_time(name: str, given: Tensor, n_columns: int) -> Tensor:
    """Crop or stretch an embedding of time to another number of patch columns, with a notice.

    Args:
        name: of the embedding, for the notice.
        given: (1,D,1,t); what is no such embedding, or has that length, is given back.
        n_columns: the t wanted.
    """
    if given.ndim != 4 or given.shape[-1] == n_columns:
        return given
    if given.shape[-1] > n_columns:
        how, fitted = "cropped", given[..., :n_columns]
    else:
        how, fitted = "interpolated", F.interpolate(given, (1, n_columns), mode="bilinear", align_corners=False)
    logger.warning("%s is %s from %d to %d patch columns", name, how, given.shape[-1], n_columns)
    return fitted
