"""Hugging Face folders of AST (`MIT/ast-finetuned-*`): config.json, model.safetensors and preprocessor_config.json.

Their state dict has queries, keys and values apart; how the spectrogram is normalised stands in the third file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import Faults
from common.parsing import read_json
from models.audio_spectrogram_transformer import SIZES

MODEL_TYPE = "audio-spectrogram-transformer"

_PREFIX = "audio_spectrogram_transformer."
# ours -> theirs, in files and, since transformers 5, in memory
_NAMES = {
    "cls_token": ("embeddings.cls_token",),
    "dist_token": ("embeddings.distillation_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    "mlp_head.0": ("classifier.layernorm",),
    "mlp_head.1": ("classifier.dense",),
}
_NAMES_OF_A_BLOCK = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
_OURS = {theirs: ours for ours, all_theirs in _NAMES.items() for theirs in all_theirs}
_OURS_OF_A_BLOCK = {theirs: ours for ours, all_theirs in _NAMES_OF_A_BLOCK.items() for theirs in all_theirs}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")

# ours -> theirs in config.json, with what transformers takes where it is left out
_ARGUMENTS = {
    "norm_eps": ("layer_norm_eps", 1e-12),
    "qkv_bias": ("qkv_bias", True),
    "target_length": ("max_length", 1024),
    "n_mels": ("num_mel_bins", 128),
    "patch_size": ("patch_size", 16),
    "drop_rate": ("hidden_dropout_prob", 0.0),
    "attn_drop_rate": ("attention_probs_dropout_prob", 0.0),
}


def read_ast(
    folder: Path, given: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Read an AST folder.

    Args:
        folder: for preprocessor_config.json; where there is none, AudioSet's mean and deviation are taken.
        given: its config.json.
        state: its tensors.

    Returns:
        The state dict in this project's names, the name of the model, and its arguments.

    Raises:
        UserError: the network or the spectrogram is one that there is not here.
    """
    faults = Faults(str(folder))
    strides = [given.get(f"{axis}_stride", 10) for axis in ("frequency", "time")]
    if strides[0] != strides[1]:
        faults.add(
            f"config.json has frequency_stride {strides[0]} and time_stride {strides[1]}; expected one stride for both"
        )
    if given.get("hidden_act", "gelu") != "gelu":
        faults.add(f"config.json has hidden_act {given['hidden_act']!r}; expected 'gelu'")
    arguments = {ours: given.get(theirs, default) for ours, (theirs, default) in _ARGUMENTS.items()}
    edges = arguments["patch_size"]
    if isinstance(edges, list):
        if len(set(edges)) != 1:
            faults.add(f"config.json has patch_size {edges}; expected a square")
        arguments["patch_size"] = edges[0]
    arguments |= {"patch_stride": strides[0]} | _normalisation(folder, arguments["n_mels"], faults)
    faults.raise_if_any()

    dims = tuple(
        given.get(key, default)
        for key, default in (("hidden_size", 768), ("num_attention_heads", 12), ("num_hidden_layers", 12))
    )
    arguments["mlp_ratio"] = given.get("intermediate_size", 3072) / dims[0]
    size = next((size for size, known in SIZES.items() if known == dims), None)
    if size is None:
        size = "base"
        arguments |= dict(zip(("embed_dim", "num_heads", "depth"), dims, strict=True))
    return from_huggingface(state), f"ast_{size}", arguments


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to this project's names, queries, keys and values of a block made one tensor."""
    renamed = {_rename_key(key): value for key, value in state.items()}
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _rename_key(key: str) -> str:
    """Return the name of a tensor here; an unknown one is unchanged, so that loading reports it."""
    bare = key.removeprefix(_PREFIX)
    block = _BLOCK.fullmatch(bare)
    rest, names = (block[2], _OURS_OF_A_BLOCK) if block else (bare, _OURS)
    module, _, last = rest.rpartition(".")
    ours = f"{names[module]}.{last}" if module in names else names.get(rest)
    if ours is None:
        return key
    return f"blocks.{block[1]}.{ours}" if block else ours


def _normalisation(folder: Path, n_mels: int, faults: Faults) -> dict[str, float]:
    """Mean and deviation that preprocessor_config.json gives; faults of its other settings are noted."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    given = read_json(path, "download the folder again")
    for key, expected in (("sampling_rate", 16000), ("num_mel_bins", n_mels)):
        if given.get(key, expected) != expected:
            faults.add(f"preprocessor_config.json has {key} {given[key]}; expected {expected}")
    if not given.get("do_normalize", True):
        return {"mean": 0.0, "std": 0.5}  # (x - 0) / (2 x 0.5): the logarithms as they are
    return {key: given[key] for key in ("mean", "std") if key in given}
