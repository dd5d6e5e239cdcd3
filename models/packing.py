"""Writing of quantized models as one file of packed codes; `models.packed` is the format and reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError
from models.base import AudioTagger
from models.creation import create_model
from models.headed import HEAD, HeadedTagger
from models.loading import describe_checkpoint
from models.packed import (
    CODES,
    DESCRIPTION,
    DIGEST,
    FORMAT,
    LEVELS,
    MAX_RATIO,
    REST,
    SCALES,
    VERSION,
    XZ,
    ZERO_POINTS,
    PackedDescription,
    compress,
    compute_digest,
    describe,
    get_width,
    name_type,
    pack_bits,
)
from models.quantization import quantized_weights
from models.quantization_recipe import Quantization
from models.quantizers import Codes, FakeQuantize

Rest = Literal["fp32", "fp16"]

_FRONT_END = "front_end."
_QUANTIZER = f"_{FakeQuantize.kept_as}."  # in names of grids


@dataclass(frozen=True)
class PackedModel:
    """A packed model.

    Attributes:
        data: content of the file.
        sizes: part of the file -> its bytes: codes, scales (with zero points and levels), rest, description.
        full_size: bytes of the same model's weights in float32, before batch norms were folded, without constants of
            the front-end.
        n_quantized: number of quantized weights.
        lossy: the rest was rounded to float16.
    """

    data: bytes
    sizes: dict[str, int]
    full_size: int
    n_quantized: int
    lossy: bool


def count_bytes(model: AudioTagger) -> int:
    """Return the bytes of a model's weights in its own types, without constants of the front-end and grids."""
    state, _ = describe_checkpoint(model)
    kept = {key: value for key, value in state.items() if _QUANTIZER not in key and not key.startswith(_FRONT_END)}
    return sum(value.nbytes for value in kept.values())


def pack_model(model: AudioTagger, *, rest: Rest = "fp32", entropy: bool = False) -> PackedModel:
    """Pack a quantized model.

    Args:
        model: from `load_model`, with or without a head, which stays float.
        rest: "fp16" rounds biases, norms and other tensors that are not quantized to float16.
        entropy: compress codes, grids and rest where it makes them smaller.

    Raises:
        UserError: the model is not quantized, has weights off its grids, or values beyond the range of float16.
    """
    network = model.model if isinstance(model, HeadedTagger) else model
    if network.arguments.get("parametrize"):
        raise UserError(f"{network.name} cannot be packed: its weights are computed by other parametrizations as well")
    codes = {
        name: _round_grid(name, quantizer.encode(getattr(module, own)), getattr(module, own))
        for name, module, own, quantizer in quantized_weights(network)
    }
    if not codes:
        raise UserError(f"{network.name} is not quantized: run scripts/quantize.py, or train with `quantize`")
    recipe = Quantization.parse(network.arguments["quantize"])
    state, config = describe_checkpoint(model)
    arguments = {key: value for key, value in network.arguments.items() if key != "quantize"}
    original = create_model(network.name, num_classes=network.num_classes, **arguments)
    fresh = {f"{_FRONT_END}{key}": value for key, value in original.front_end.state_dict().items()}
    plain = {
        key: value
        for key, value in state.items()
        if key not in codes and _QUANTIZER not in key and not (key in fresh and torch.equal(fresh[key], value))
    }
    head = sum(value.nbytes for key, value in state.items() if key.startswith(HEAD))
    grouped = _group_by_type(plain, rest)
    description = PackedDescription(
        config=json.loads(json.dumps(config), parse_constant=lambda _: None),  # figures of a head may be NaN
        front_end=network.front_end.description,
        quantized={key: list(each.codes.shape) for key, each in codes.items()},
        rest={kind: {key: list(value.shape) for key, value in tensors.items()} for kind, tensors in grouped.items()},
        lossy=rest == "fp16",
    )
    sections = {DESCRIPTION: describe(description), **_join_codes(list(codes.values()), recipe, entropy)}
    for kind, tensors in grouped.items():
        sections |= _store(f"{REST}{kind}", torch.cat([value.flatten() for value in tensors.values()]), entropy)
    # One entry, since safetensors writes several in any order.
    data = save(sections | {DIGEST: compute_digest(sections)}, {"format": f"{FORMAT}{VERSION}"})
    return PackedModel(data, _measure(data, sections), count_bytes(original) + head, len(codes), description.lossy)


def _round_grid(name: str, codes: Codes, weight: Tensor) -> Codes:
    """Return codes with a grid as the file holds it, of which the weight must be made.

    Raises:
        UserError: it is not.
    """
    levels = None if codes.levels is None else codes.levels.bfloat16().float()
    stored = replace(codes, scale=codes.scale.bfloat16().float(), levels=levels)
    if not torch.equal(stored.decode(), weight):
        raise UserError(f"{name}: values are not on the grid of their quantizer: was it changed after quantization?")
    return stored


def _group_by_type(tensors: Mapping[str, Tensor], rest: Rest) -> dict[str, dict[str, Tensor]]:
    """Return type -> names and tensors, rounded to float16 if `rest` says so."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stored = value.half() if rest == "fp16" and value.dtype == torch.float32 else value
        if stored.is_floating_point() and not bool(stored.isfinite().all()):
            raise UserError(
                f"{key} has values beyond {torch.finfo(torch.half).max:g}, the range of float16: leave out --rest fp16"
            )
        grouped.setdefault(name_type(stored.dtype), {})[key] = stored
    return grouped


def _join_codes(codes: list[Codes], recipe: Quantization, entropy: bool) -> dict[str, Tensor]:
    """Return the tensors of a file with the codes and grids of all weights."""

    def pack(bits: int) -> Tensor:
        return torch.cat([torch.from_numpy(pack_bits(each.codes.flatten().numpy(), bits)) for each in codes])

    sections = {CODES: pack(recipe.weights)}
    if entropy:
        packed = compress(pack(get_width(recipe.weights)))
        if len(packed) < len(sections[CODES]) <= MAX_RATIO * len(packed):
            sections = {CODES + XZ: packed}
    if recipe.scheme == "levels":
        levels = [cast(Tensor, each.levels).flatten() for each in codes]
        return sections | _store(LEVELS, torch.cat(levels).bfloat16(), entropy)
    sections |= _store(SCALES, torch.cat([each.scale for each in codes]).bfloat16(), entropy)
    if recipe.scheme == "minmax":
        sections |= _store(ZERO_POINTS, torch.cat([each.zero_point for each in codes]), entropy)
    return sections


def _store(name: str, tensor: Tensor, entropy: bool) -> dict[str, Tensor]:
    """Return a tensor under its name, or the compressed one where it is smaller."""
    if entropy and len(packed := compress(tensor)) < tensor.nbytes <= MAX_RATIO * len(packed):
        return {name + XZ: packed}
    return {name: tensor}


def _measure(data: bytes, sections: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of the parts of a file, see `PackedModel.sizes`."""
    parts = {"codes": (CODES,), "scales": (SCALES, ZERO_POINTS, LEVELS), "rest": (REST,)}
    sizes = {
        part: sum(tensor.nbytes for name, tensor in sections.items() if name.startswith(names))
        for part, names in parts.items()
    }
    return sizes | {"description": len(data) - sum(sizes.values())}
