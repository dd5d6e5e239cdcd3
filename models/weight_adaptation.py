"""Weights of related networks, changed to fit: of an image transformer, or of a network for another clip length."""

import logging
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PATCHES = "patch_embed.proj.weight"


def is_image_transformer(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of an image transformer, such as timm's DeiT."""
    patches = state.get(_PATCHES)
    return patches is not None and patches.ndim == 4 and patches.shape[1] == 3


def adapt_image_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the patch weights of an image transformer over its three channels and drop its last layers, with a warning.

    As AST and PaSST do. Position embeddings are not changed.
    """
    dropped = [key for key in state if key.startswith(("head.", "head_dist."))]
    logger.warning("image weights: the three channels are summed, %s dropped", ", ".join(dropped) or "nothing")
    kept = {key: value for key, value in state.items() if key not in dropped}
    return kept | {_PATCHES: state[_PATCHES].sum(1, keepdim=True)}


def fit_time_embedding(name: str, embedding: Tensor, n_columns: int) -> Tensor:
    """Crop or interpolate a time embedding to another number of patch columns, with a warning.

    Args:
        name: of the embedding, for the warning.
        embedding: (1,D,1,t); returned as it is where it has that length or another shape.
        n_columns: t of the result.
    """
    if embedding.ndim != 4 or embedding.shape[-1] == n_columns:
        return embedding
    if embedding.shape[-1] > n_columns:
        how, fitted = "cropped", embedding[..., :n_columns]
    else:
        how, fitted = "interpolated", F.interpolate(embedding, (1, n_columns), mode="bilinear", align_corners=False)
    logger.warning("%s is %s from %d to %d patch columns", name, how, embedding.shape[-1], n_columns)
    return fitted
