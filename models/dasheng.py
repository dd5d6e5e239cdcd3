"""Dasheng: CED's transformer on patches as high as the spectrogram, a token every 40 ms, pre-trained without labels.

Method: Dinkel et al., "Scaling up masked audio encoder learning for general audio classification", Interspeech 2024.
Names in the state dict are those of the published code (github.com/XiaoMi/dasheng), which are CED's; no published file
was at hand to compare with.

Letters as in `models.vit`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.errors import UserError
from models.audiotransformer import AudioTransformer
from models.ced_mel import CedMel
from models.registry import register_model
from models.settings import MelSettings, TransformerSettings

_PATCH = (64, 4)
# width, heads, depth; those without a file are this project's own, to be trained on CPUs and in tests
SIZES = {
    "pico": (64, 1, 4),
    "tiny": (192, 3, 12),
    "small": (384, 6, 12),
    "base": (768, 12, 12),
    "06b": (1280, 16, 32),
    "12b": (1536, 24, 40),
}


class Dasheng(AudioTransformer):
    """Dasheng's encoder, and a head of classes as CED has it.

    Chunks of 1008 frames, the last one of a long clip filled up with zeros after the normalisation, whose columns are
    left out of embeddings and time steps. As published, a column of four frames counts where all of them are the
    clip's. Fewer than four frames more than whole chunks are left out; published code then adds all columns of a chunk
    of padding.

    Its arguments are those of `AudioTransformer`; `eval_avg` joins the probabilities of chunks, each by its own frames.
    """

    equal_chunks = False
    partial_columns = False
    shared_settings: ClassVar[tuple[TransformerSettings, MelSettings]] = (
        TransformerSettings(target_length=1008, patch_size=_PATCH, patch_stride=_PATCH),
        CedMel.defaults,
    )


def is_dasheng(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of Dasheng's published encoders: CED's names, patches of 64 x 4, no classes."""
    patches = state.get("patch_embed.proj.weight")
    is_long = isinstance(patches, Tensor) and tuple(patches.shape[1:]) == (1, *_PATCH)
    return is_long and "time_pos_embed" in state and not any(key.startswith("outputlayer.") for key in state)


def read_dasheng(
    state: Mapping[str, Any], config: Mapping[str, Any], origin: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the encoder's weights, and its settings.

    Args:
        state: see `is_dasheng`.
        config: of the file; the number of heads is read of another size than the published ones.
        origin: the file, for messages.

    Returns:
        The state dict, with a head without classes, and {"model", "model_args", "num_classes"}.

    Raises:
        UserError: tensors of other kinds or shapes.
    """
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{origin}: its state dict holds values that are no tensors")
    positions = state["time_pos_embed"]
    if positions.ndim != 4:
        raise UserError(f"{origin}: its time_pos_embed is {tuple(positions.shape)}; expected (1,D,1,t)")
    width = len(state["patch_embed.proj.weight"])
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    named = {(its_width, its_depth): (size, heads) for size, (its_width, heads, its_depth) in SIZES.items()}
    size, heads = named.get((width, depth), ("base", config.get("num_heads") or max(width // 64, 1)))
    head = {"outputlayer.0.weight": torch.ones(width), "outputlayer.0.bias": torch.zeros(width)}
    head |= {"outputlayer.1.weight": torch.zeros(0, width), "outputlayer.1.bias": torch.zeros(0)}
    arguments = {
        **{"embed_dim": width, "depth": depth, "num_heads": heads},
        "target_length": positions.shape[3] * _PATCH[1],
    }
    return dict(state) | head, {"model": f"dasheng_{size}", "model_args": arguments, "num_classes": 0}


_ZENODO = "https://zenodo.org/records/11511780/files"
for _size, (_width, _heads, _depth) in SIZES.items():
    _weights = f"{_ZENODO}/dasheng_{_size}.pt?download=1" if _width >= 768 else None
    register_model(f"dasheng_{_size}", weights=_weights)(
        partial(Dasheng, pooling="logit", embed_dim=_width, num_heads=_heads, depth=_depth)
    )
