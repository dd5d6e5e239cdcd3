"""Hugging Face folders: config.json and model.safetensors; CED (`mispeech/ced-*`), ResNet-10 both ways, AST to read.

CED's state dict has no front-end, calls `init_bn.1.*` `init_bn.*`, and prefixes all but the output layer by `encoder.`.
What is AST's own is in `models.huggingface_ast`, what is ResNet-10's in `models.huggingface_resnet`.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError, some
from common.files import write_bytes, write_json
from common.parsing import read_json
from models import huggingface_ast, huggingface_resnet
from models.audiotransformer import ARGUMENTS, SIZES, AudioTransformer
from models.base import Activation, AudioTagger
from models.description import Description, ModelDescription, check_description
from models.headed import HEAD, HeadedTagger
from models.labels import audioset_labels
from models.layers import Block
from models.parametrizations import bake_parametrizations
from models.quantization import drop_quantizers
from models.resnet import ResNet10
from models.tensor_files import read_tensors

logger = logging.getLogger(__name__)

MODEL_TYPE = "ced"
# how the names of classes in transformers begin, for every model_type that is written
CLASS_PREFIXES = {MODEL_TYPE: "Ced", huggingface_resnet.MODEL_TYPE: "ResNet10"}

# keys of config.json that are arguments of the network; its dimensions are read from the tensors
_DIMENSIONS = ("embed_dim", "num_heads", "depth")
# of the front-end: what it was given may have been None
_MEL = ("sample_rate", "n_mels", "f_min", "f_max", "n_fft", "win_size", "hop_size", "center")
# what transformers calls the two activations
_PROBLEMS: dict[Activation, str] = {
    "sigmoid": "multi_label_classification",
    "softmax": "single_label_classification",
}
# of a head's facts; the others name files of the machine that it was trained on
_HEAD_FACTS = ("name", "model", "weights_sha256", "chunk_length", "data", "metric", "value")


class _Config(Description):
    """The entries of config.json that every kind of model has."""

    model_type: str | None = None
    problem_type: str | None = None
    id2label: dict[str, str] | None = None
    head: dict[str, Any] | None = None


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's layout."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def read_huggingface(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder of CED, ResNet-10 or AST.

    Returns:
        The state dict in this project's names, and a config as in checkpoints of this project.

    Raises:
        UserError: the folder holds another kind of model, or cannot be read.
    """
    given = read_json(folder / "config.json", "download the folder again, or export it again")
    check_description(_Config, given, f"{folder / 'config.json'}")
    state = read_tensors(folder / "model.safetensors")
    readers = {
        MODEL_TYPE: _read_ced,
        huggingface_resnet.MODEL_TYPE: huggingface_resnet.read_resnet,
        huggingface_ast.MODEL_TYPE: huggingface_ast.read_ast,
    }
    if given.get("model_type") not in readers:
        kinds = " or ".join(map(repr, readers))
        raise UserError(f"{folder}: its config.json has model_type {given.get('model_type')!r}; expected {kinds}")
    if given.get("head") is not None:
        state = {key.replace("outputlayer.", HEAD, 1): value for key, value in state.items()}
        if f"{HEAD}mean" not in state:
            raise UserError(
                f"{folder}: its tensors are {some(state)}; expected those of a head as well (outputlayer.*)"
            )
    try:
        state, name, arguments = readers[given["model_type"]](folder, given, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(  # a tensor of another shape, a setting of another type
            f"{folder}: its tensors or its config.json are not those of a {given['model_type']!r} "
            f"({type(error).__name__}: {error!s:.200})"
        ) from error
    config: dict[str, Any] = {"model": name, "model_args": arguments}
    activations = {problem: activation for activation, problem in _PROBLEMS.items()}
    if given.get("problem_type") in activations:
        config["activation"] = activations[given["problem_type"]]
    labels = _read_labels(given, folder)
    if labels is not None:
        config.update(labels=labels, num_classes=len(labels))
    if given.get("head") is not None:
        if labels is None or "activation" not in config or not state[f"{HEAD}mean"].ndim:
            raise UserError(f"{folder}: its config.json lacks id2label, problem_type or the settings of its head")
        classes = {"labels": config.pop("labels"), "num_classes": len(labels), "activation": config["activation"]}
        width = len(state[f"{HEAD}mean"])
        config |= {"num_classes": 0, "head": {"padded": False, **given["head"], **classes, "embed_dim": width}}
    check_description(ModelDescription, config, f"{folder / 'config.json'}")
    return state, config


def write_huggingface(folder: str | Path, model: AudioTagger, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors of a model, each whole or not at all.

    Args:
        folder: made where missing.
        model: to write; a head is described by `head` in config.json, and its tensors are those of
            `outputlayer`.
        extra: more entries of config.json.

    Raises:
        UserError: the model has a single class and softmax, which transformers does not take, or was quantized with
            rounded inputs or folded batch norms.
    """
    if model.activation == "softmax" and model.num_classes == 1:
        raise UserError(f"{model.name} has one class and softmax, so that its only probability is always 1")
    folder = Path(folder)
    model = copy.deepcopy(model)
    bake_parametrizations(model)  # `transformers` loads plain weights only
    drop_quantizers(model)
    network = get_network(model)
    recipe = network.arguments.pop("quantize", None) or {}
    if used := [name for name in ("activations", "fold_batch_norm") if recipe.get(name)]:
        raise UserError(
            f"{model.name}: the code of a folder for transformers does not compute the setting {used[0]} of quantize; "
            "use export_onnx.py, or quantize without it"
        )
    if isinstance(network, ResNet10):
        settings = huggingface_resnet.resnet_settings(network)
        state = huggingface_resnet.resnet_to_huggingface(network.state_dict())
    else:
        settings = _ced_settings(network) | {"outputdim": model.num_classes}
        state = to_huggingface(network.state_dict())
    kind = model_type(network)
    config = {
        "architectures": [f"{CLASS_PREFIXES[kind]}ForAudioClassification"],
        "model_type": kind,
        **settings,
        "problem_type": _PROBLEMS[model.activation],
        "id2label": {str(index): label for index, label in enumerate(model.labels)},
        "label2id": {label: index for index, label in enumerate(model.labels)},
        **(extra or {}),
    }
    if isinstance(model, HeadedTagger):
        described = model.head.config()
        facts = {key: value for key, value in described["facts"].items() if key in _HEAD_FACTS}
        config["head"] = (
            {key: described[key] for key in ("kind", "embed_dim")} | model.head.arguments() | {"facts": facts}
        )
        state = {key: value for key, value in state.items() if not key.startswith("outputlayer.")}
        state |= {f"outputlayer.{key}": value for key, value in model.head.state_dict().items()}
    state = {key: value.contiguous() for key, value in state.items()}
    # Not `save_file`, which would let only its owner read the file.
    write_bytes(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)


def get_network(model: AudioTagger) -> AudioTransformer | ResNet10:
    """Return the network in a model, CED's or ResNet-10.

    Raises:
        UserError: it is of another kind, or its head reads clips that are filled up.
    """
    network = model.model if isinstance(model, HeadedTagger) else model
    if type(network) is not AudioTransformer and not isinstance(network, ResNet10):  # Dasheng is a subclass
        raise UserError(
            f"{network.name} is a {type(network).__name__}: only CED's audio transformers (ced_*, audiotransformer_*) "
            "and ResNet-10 (resnet10*), and checkpoints trained from them, can be written for transformers"
        )
    if isinstance(model, HeadedTagger) and model.head.padded:
        raise UserError(
            f"{model.full_name}: the head was trained on clips filled up with zeros, which code of transformers does "
            "not do; train one with `run.py probe`"
        )
    return network


def model_type(network: AudioTransformer | ResNet10) -> str:
    """Return what `model_type` of config.json is for a network, a key of `CLASS_PREFIXES`."""
    return huggingface_resnet.MODEL_TYPE if isinstance(network, ResNet10) else MODEL_TYPE


def _ced_settings(network: AudioTransformer) -> dict[str, Any]:
    """Entries of config.json that describe CED's network."""
    return {
        **ARGUMENTS,
        **network.arguments,
        **{key: getattr(network.front_end, key) for key in _MEL},
        **{key: getattr(network, key) for key in ("pooling", "target_length", "eval_avg", "embed_dim")},
        "num_heads": cast(Block, network.blocks[0]).attn.num_heads,
        "depth": len(network.blocks),
    }


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of CED from this project's names to Hugging Face's."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("outputlayer."):
            renamed[key] = value
        elif not key.startswith("front_end."):
            renamed["encoder." + key.replace("init_bn.1.", "init_bn.")] = value
    return renamed


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face state dict of CED to this project's names."""
    return {key.removeprefix("encoder.").replace("init_bn.", "init_bn.1."): value for key, value in state.items()}


def _read_ced(
    folder: Path, given: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """State dict, name and arguments of a CED folder."""
    renamed = from_huggingface(state)
    if "time_pos_embed" not in renamed:
        raise UserError(f"{folder}: its tensors are {some(renamed)}; expected those of CED")
    width = renamed["time_pos_embed"].shape[1]
    if given.get("head") is not None:
        # an output layer of the network's own, without classes
        renamed |= {"outputlayer.0.weight": torch.ones(width), "outputlayer.0.bias": torch.zeros(width)}
        renamed |= {"outputlayer.1.weight": torch.zeros(0, width), "outputlayer.1.bias": torch.zeros(0)}
    depth = len({key.split(".")[1] for key in renamed if key.startswith("blocks.")})
    dims = (width, given.get("num_heads") or width // 64, depth)
    known = [key for key in (*ARGUMENTS, "band_limit") if key not in _DIMENSIONS]
    arguments = {key: given[key] for key in known if given.get(key) is not None}
    name = next((f"audiotransformer_{size}" for size in SIZES if SIZES[size] == dims), None)
    if name is None:
        name = "audiotransformer_base"
        arguments.update(zip(_DIMENSIONS, dims, strict=True))
    for key in ("patch_size", "patch_stride"):  # an edge, or the two edges of a square
        if isinstance(arguments.get(key), list):
            arguments[key] = arguments[key][0]
    return renamed, name, arguments


def _read_labels(given: Mapping[str, Any], folder: Path) -> list[str] | None:
    """The names in id2label; AudioSet's own where the published converter had cut a name at its comma."""
    id2label = given.get("id2label")
    if not id2label:
        return None
    try:
        labels = [str(id2label[str(index)]) for index in range(len(id2label))]
    except KeyError as error:
        raise UserError(
            f"{folder}: id2label of config.json has no entry for class {error}; expected 0, 1, 2, ..."
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
