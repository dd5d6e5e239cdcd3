"""Hugging Face folders of ResNet-10: config.json and model.safetensors, both ways.

As in CED's, the state dict has no front-end, calls the last layer `outputlayer`, and prefixes all else by `encoder.`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, some
from models.headed import HEAD
from models.resnet import ARGUMENTS, MEL_ARGUMENTS, SIZES, ResNet10

MODEL_TYPE = "resnet10"


def resnet_settings(network: ResNet10) -> dict[str, Any]:
    """Return the entries of config.json that describe the network: its arguments, with what they came to."""
    return {
        **ARGUMENTS,
        **network.arguments,
        "width": network.stem.conv.out_channels,
        **{key: getattr(network.front_end, key) for key in MEL_ARGUMENTS},  # f_max may have been None
    }


def resnet_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of this project to the folder's names."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("classifier."):
            renamed[key.replace("classifier.", "outputlayer.", 1)] = value
        elif not key.startswith("front_end."):
            renamed[f"encoder.{key}"] = value
    return renamed


def read_resnet(
    folder: Path, given: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Read a folder of a ResNet-10.

    Args:
        folder: for messages.
        given: its config.json.
        state: its tensors, those of a head under the names of this project.

    Returns:
        The state dict in this project's names, the name of the model, and the arguments that differ from its defaults.

    Raises:
        UserError: the tensors are those of another network.
    """
    renamed = {
        key.removeprefix("encoder.").replace("outputlayer.", "classifier.", 1): value for key, value in state.items()
    }
    if "stem.conv.weight" not in renamed:
        raise UserError(f"{folder}: its tensors are {some(renamed)}; expected those of ResNet-10")
    width = len(renamed["stem.conv.weight"])
    if given.get("head") is not None:
        embed_dim = len(state[f"{HEAD}mean"])
        # a last layer of the network's own, without classes
        renamed |= {"classifier.1.weight": torch.zeros(0, embed_dim), "classifier.1.bias": torch.zeros(0)}
    arguments = {key: given[key] for key in ARGUMENTS if key in given and given[key] != ARGUMENTS[key]}
    sample_rate = arguments.get("sample_rate", ARGUMENTS["sample_rate"])
    if arguments.get("f_max") == sample_rate / 2:  # what None came to
        del arguments["f_max"]
    if given.get("band_limit") is not None:
        arguments["band_limit"] = given["band_limit"]
    name = next((name for name, size in SIZES.items() if size == width), None)
    if name is None:
        return renamed, "resnet10", arguments | {"width": width}
    arguments.pop("width", None)
    return renamed, name, arguments
