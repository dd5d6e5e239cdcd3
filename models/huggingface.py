"""Hugging Face folders: config.json and model.safetensors, of CED (`mispeech/ced-*`) both ways, of AST to read.

CED's state dict has no front-end, calls `init_bn.1.*` `init_bn.*`, and prefixes all but the output layer by `encoder.`.
What is AST's own is in `models.huggingface_ast`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from common.errors import UserError, some
from common.files import whole_file, write_json
from models import huggingface_ast
from models.audiotransformer import ARGUMENTS, SIZES, AudioTransformer
from models.base import Activation
from models.labels import audioset_labels
from models.layers import Block

logger = logging.getLogger(__name__)

# keys of config.json that are arguments of the network; its dimensions are read from the tensors
_DIMENSIONS = ("embed_dim", "num_heads", "depth")
# of the front-end: what it was given may have been None
_MEL = ("sample_rate", "n_mels", "f_min", "f_max", "n_fft", "win_size", "hop_size", "center")
# what transformers calls the two activations
_PROBLEMS: dict[Activation, str] = {
    "sigmoid": "multi_label_classification",
    "softmax": "single_label_classification",
}


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's layout."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def read_huggingface(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder of CED or AST.

    Returns:
        The state dict in this project's names, and a config as in checkpoints of this project.

    Raises:
        UserError: the folder holds another kind of model, or cannot be read.
    """
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as a Hugging Face folder ({error})") from error
    readers = {"ced": _read_ced, huggingface_ast.MODEL_TYPE: huggingface_ast.read_ast}
    if given.get("model_type") not in readers:
        kinds = " or ".join(map(repr, readers))
        raise UserError(f"{folder}: its config.json has model_type {given.get('model_type')!r}; wanted {kinds}")
    state, name, arguments = readers[given["model_type"]](folder, given, state)
    config: dict[str, Any] = {"model": name, "model_args": arguments}
    activations = {problem: activation for activation, problem in _PROBLEMS.items()}
    if given.get("problem_type") in activations:
        config["activation"] = activations[given["problem_type"]]
    labels = _labels(given, folder)
    if labels is not None:
        config.update(labels=labels, num_classes=len(labels))
    return state, config


def write_huggingface(folder: str | Path, model: AudioTransformer, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors of a model, each whole or not at all.

    Args:
        folder: made where missing.
        model: what to write.
        extra: more entries of config.json.

    Raises:
        UserError: the model has a single class and softmax, which transformers does not take.
    """
    if model.activation == "softmax" and model.num_classes == 1:
        raise UserError(f"{model.name} has one class and softmax, so that its only probability is always 1")
    folder = Path(folder)
    config = {
        "architectures": ["CedForAudioClassification"],
        "model_type": "ced",
        **ARGUMENTS,
        **model.arguments,
        **{key: getattr(model.front_end, key) for key in _MEL},
        **{key: getattr(model, key) for key in ("pooling", "target_length", "eval_avg", "embed_dim")},
        "num_heads": cast(Block, model.blocks[0]).attn.num_heads,
        "depth": len(model.blocks),
        "outputdim": model.num_classes,
        "problem_type": _PROBLEMS[model.activation],
        "id2label": {str(index): label for index, label in enumerate(model.labels)},
        "label2id": {label: index for index, label in enumerate(model.labels)},
        **(extra or {}),
    }
    state = {key: value.contiguous() for key, value in to_huggingface(model.state_dict()).items()}
    with whole_file(folder / "model.safetensors") as partial:
        partial.write_bytes(save(state, metadata={"format": "pt"}))  # `save_file` would let only its owner read it
    write_json(folder / "config.json", config)


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of this project to Hugging Face's names."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("outputlayer."):
            renamed[key] = value
        elif not key.startswith("front_end."):
            renamed["encoder." + key.replace("init_bn.1.", "init_bn.")] = value
    return renamed


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face state dict to this project's names."""
    return {key.removeprefix("encoder.").replace("init_bn.", "init_bn.1."): value for key, value in state.items()}


def _read_ced(
    folder: Path, given: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """State dict, name and arguments of a CED folder."""
    renamed = from_huggingface(state)
    if "time_pos_embed" not in renamed:
        raise UserError(f"{folder}: its tensors are {some(renamed)}; wanted those of CED")
    width = renamed["time_pos_embed"].shape[1]
    depth = len({key.split(".")[1] for key in renamed if key.startswith("blocks.")})
    dims = (width, given.get("num_heads") or width // 64, depth)
    arguments = {key: given[key] for key in ARGUMENTS if key not in _DIMENSIONS and given.get(key) is not None}
    name = next((f"audiotransformer_{size}" for size in SIZES if SIZES[size] == dims), None)
    if name is None:
        name = "audiotransformer_base"
        arguments.update(zip(_DIMENSIONS, dims, strict=True))
    for key in ("patch_size", "patch_stride"):  # an edge, or the two edges of a square
        if isinstance(arguments.get(key), list):
            arguments[key] = arguments[key][0]
    return renamed, name, arguments


def _labels(given: Mapping[str, Any], folder: Path) -> list[str] | None:
    """The names in id2label; AudioSet's own where the published converter had cut a name at its comma."""
    id2label = given.get("id2label")
    if not id2label:
        return None
    try:
        labels = [str(id2label[str(index)]) for index in range(len(id2label))]
    except KeyError as error:
        raise UserError(
            f"{folder}: id2label of config.json has no entry for class {error}; wanted 0, 1, 2, ..."
        ) from error
    official = audioset_labels()
    if len(labels) != len(official):
        return labels
    bare = [label.strip(' "') for label in labels]
    if bare == official or any(
        name.split(",")[0] != cut.split(",")[0] for cut, name in zip(bare, official, strict=True)
    ):
        return labels
    cut = [label for label, name in zip(bare, official, strict=True) if label != name]
    logger.warning("%s: %d class names are cut at a comma (%s): read in full", folder, len(cut), some(cut, 3))
    return official
