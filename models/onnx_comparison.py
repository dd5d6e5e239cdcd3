"""Comparison of ONNX files with PyTorch, on shapes that the tracer has not seen.

Letters: B batch, S samples.
"""

import itertools
import math
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from common.errors import UserError
from common.onnx_runtime import create_options
from models.base import AudioTagger
from models.headed import HeadedTagger
from models.straight_through import ActivationQuantizer
from models.vit import SpectrogramTransformer

Precision = Literal["fp32", "fp16", "int8", "quantized"]
Input = Literal["feats", "waveform"]

# How far a probability may be from PyTorch's: float rounding, 11 bits of mantissa, 7 bits of weight.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.2, "quantized": 1e-4}
ROUNDED_TOLERANCE = 0.05  # where inputs of layers are rounded, and a rounding error can decide which way
# How far log-odds may be, for all precisions, as a share of how much they differ from clip to clip: probabilities of
# rare classes are below any tolerance. Eight bits need 0.02 for CED of all sizes and 0.08 for mn04; 1 is a graph that
# is insensitive to, and classes in another order have more.
SHARE = 0.3


def draw_sounds(n_clips: int, n_samples: int, seed: int = 0) -> Tensor:
    """Noise and tones (B,S), from very quiet to clipped."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.1, 3e-4, 1.0, 0.03]).roll(seed)[torch.arange(n_clips) % 4, None]
    pitch = torch.rand(n_clips, 1, generator=generator) * 0.5
    tones = torch.sin(pitch * torch.arange(n_samples))
    return (levels * (tones + torch.randn(n_clips, n_samples, generator=generator))).clamp(-1, 1)


def _shapes_to_compare(model: AudioTagger) -> list[tuple[int, int]]:
    """Numbers of clips and of samples that the tracer has not seen."""
    model = model.model if isinstance(model, HeadedTagger) else model
    rate, hop = model.sample_rate, model.front_end.hop_size
    grid = [(1, 1), (5, round(0.37 * rate) | 1), (2, round(1.93 * rate) | 1)]
    if not isinstance(model, SpectrogramTransformer):
        return [*grid, (1, 10 * rate)]
    whole = (model.target_length - 1) * hop
    whole = next(size for size in itertools.count(whole, hop) if model.front_end.n_frames(size) >= model.target_length)
    return [*grid, (1, whole), (1, whole + 2 * hop), (2, whole + 3 * rate | 1)]


@torch.no_grad()
def compare(path: Path, model: AudioTagger, takes: Input, precision: Precision, target: str) -> float:
    """Return the largest difference from PyTorch of what ONNX Runtime computes from a file.

    Args:
        path: the file.
        model: that it was exported from.
        takes: its input.
        precision: of the file.
        target: its name in messages.

    Raises:
        UserError: it is larger than the precision explains, or the runtime does not take the file.
    """
    session = onnxruntime.InferenceSession(str(path), create_options(), providers=["CPUExecutionProvider"])
    has_rounding = any(isinstance(module, ActivationQuantizer) for module in model.modules())
    tolerance = max(TOLERANCE[precision], ROUNDED_TOLERANCE if has_rounding else 0)
    largest, pairs = 0.0, []
    for seed, (n_clips, n_samples) in enumerate(_shapes_to_compare(model), 1):
        given = draw_sounds(n_clips, n_samples, seed)
        expected = model.predict(given).numpy()
        if takes == "feats":
            given = model.front_end(given)
        try:
            found = cast(np.ndarray, session.run(None, {takes: given.numpy()})[0])
        except Exception:  # of no common class: a shape of the tracer's example has stayed in the graph
            found = np.full_like(expected, np.nan)
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
        if not difference <= tolerance:
            raise UserError(
                f"{target}: its probabilities for {n_clips} clips of {n_samples / model.sample_rate:.2f} s are up to "
                f"{difference:.2g} from PyTorch's; {precision} may differ by {tolerance:g}, and no file is "
                "kept. Does `forward_export` of the model compute what `forward_spectrogram` does, without looking "
                "at values?"
            )
        largest = max(largest, difference)
        pairs.append((expected, found))
    expected, computed = (_log_odds(np.concatenate(each)) for each in zip(*pairs, strict=True))
    spread = float(np.sqrt(np.square(expected - expected.mean(0)).mean()))
    error = float(np.sqrt(np.square(computed - expected).mean()))
    if not error <= SHARE * spread + 0.01:  # untrained networks may have the same output for all inputs
        raise UserError(
            f"{target}: its log-odds are {error:.2g} from PyTorch's on average, and those differ by {spread:.2g} from "
            f"sound to sound: {precision} computes something else, and no file is kept. Does `forward_export` of the "
            "model compute what `forward_spectrogram` does? If it does, export without this precision"
        )
    return largest


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Logarithm of p / (1 - p), float64, as far as half precision distinguishes probabilities from 0 and 1."""
    p = np.clip(probabilities.astype(np.float64), 1e-6, 1 - 1e-3)
    return cast(np.ndarray, np.log(p / (1 - p)))
