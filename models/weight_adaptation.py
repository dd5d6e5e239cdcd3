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


def adapt_image_cnn_weights(state: Mapping[str, Tensor], stem: str, classifier: str) -> dict[str, Tensor]:
    """Fit timm's image CNNs to spectrograms: one channel that is the mean of the colours, no classifier.

    As in CMKD, with a notice. Weights without a layer `stem` are returned as they are.

    Args:
        state: weights.
        stem: name of the first convolution.
        classifier: name of the last layer.

    Returns:
        The weights, their names behind `body.`.
    """
    key = f"{stem}.weight"
    if key not in state:
        return dict(state)
    body = {f"body.{name}": value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    first = state[key]
    if first.ndim == 4 and first.shape[1] > 1:
        logger.warning("the first layer is for %d colours: their weights become one, their mean", first.shape[1])
        body[f"body.{key}"] = first.mean(1, keepdim=True)
    if len(body) < len(state):
        logger.warning("the classifier of images is left out")
    return body


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
