"""Conversion of arrays of samples to float32 with full scale 1.0. S: samples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from common.errors import UserError

FULL_SCALE_16_BIT = 32768.0
EXPECTED = "expected floats with full scale 1.0, or int16"


def to_floats(samples: ArrayLike, name: str = "the samples") -> np.ndarray:
    """Return samples as float32 with full scale 1.0; 16-bit integers are divided by 32768.

    Args:
        samples: floats of any width, or int16; any shape.
        name: of the samples in messages.

    Raises:
        UserError: the type has no known full scale.
    """
    try:
        values = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: found {type(samples).__name__}; {EXPECTED}, in an array of one length") from None
    if values.dtype.kind == "i" and values.dtype.itemsize == 2:  # in any byte order
        return np.multiply(values, np.float32(1 / FULL_SCALE_16_BIT), dtype=np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{name}: found values of type {values.dtype}; {EXPECTED}{_describe_conversion(values.dtype)}")
    return values.astype(np.float32, copy=False)


def as_clips(clips: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Return clips as float32 (S,) each with full scale 1.0.

    Args:
        clips: (S,) each, as `to_floats` takes them; an array (S,) is one clip, and an array (B,S) several.

    Raises:
        UserError: no clips, or one of several channels, without samples, or of a type whose full scale is not known.
    """
    if hasattr(clips, "ndim"):
        clips = [clips] if clips.ndim == 1 else list(clips)  # type: ignore[list-item]
    if not len(clips):
        raise UserError("found no clips; expected a list of at least one, (S,) each")
    floats = [to_floats(clip, f"clip {i}") for i, clip in enumerate(clips)]
    for i, clip in enumerate(floats):
        if clip.ndim != 1:
            raise UserError(
                f"clip {i} has shape {clip.shape}; expected one channel, (S,): average the channels, "
                "and give a list of clips, (S,) each"
            )
        if len(clip) == 0:
            raise UserError(f"clip {i} has no samples; leave it out")
    return floats


def _describe_conversion(dtype: np.dtype) -> str:
    """Return how to convert integers that are likely to be samples."""
    if dtype in (np.int32, np.int64):
        return " (divide by full scale: 32768 for 16-bit samples, 2147483648 for 32-bit ones)"
    return " (subtract 128, then divide by 128)" if dtype == np.uint8 else ""
