"""The format .ceq: one file with a quantized model, its weights as packed codes. `models.packing` writes it.

A safetensors file with the metadata {"format": "ceq/1"}, where 1 is the version, of tensors with one axis, which join
those of all weights in the order of the description:

    sha256          uint8, the checksum of the others: `compute_digest`.
    description     uint8, JSON compressed by zlib: `PackedDescription`.
    codes           uint8, each weight's codes from a new byte on, ceil(k n / 8) bytes for n codes of k bits. Code i has
                    the bits k i to k i + k - 1 of its bytes, lowest bit first; bit j is bit j mod 8 of byte j // 8.
    scales          bfloat16, of every group of consecutive values of a weight; not with the scheme "levels".
    zero_points     uint8, of every group, only with the scheme "minmax"; 2^(k-1) with the scheme "symmetric".
    levels          bfloat16, 2^k of every group, ascending, only with the scheme "levels".
    rest.TYPE       all other tensors of the state dict of that type: float32, float16, int64 ...

A value is (code - zero point) * scale, or the level of that number. A tensor NAME may be replaced by NAME.xz, uint8,
its bytes compressed by XZ (LZMA, an adaptive range coder); the codes of codes.xz have 2, 4 or 8 bits, so that a symbol
of the coder is a whole number of codes.
"""

import hashlib
import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError, some
from common.parsing import parse_json
from models.description import Description, ModelDescription, check_description
from models.quantization_recipe import Quantization
from models.quantizers import Codes, FakeQuantize, get_grid_state

PACKED = ".ceq"  # suffix
FORMAT, VERSION = "ceq/", "1"
MAX_RATIO = 16  # of the bytes of a compressed tensor to those in the file
_MAX_DESCRIPTION = 4 << 20  # bytes
_MEMORY = 1 << 20  # bytes, of the decompressor
_SPARE = 1 << 16  # bytes that a short compressed tensor may have in any case
DESCRIPTION, CODES, SCALES, ZERO_POINTS, LEVELS = "description", "codes", "scales", "zero_points", "levels"
DIGEST = "sha256"
REST, XZ = "rest.", ".xz"

Shape = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=16)]
Layout = dict[str, Shape]  # by name


class PackedDescription(Description):
    """The description in a file.

    Attributes:
        config: that of the checkpoint, with labels, activation, and arguments of the model, of which `quantize` are the
            settings of the grids.
        front_end: class and settings of the front-end, for other programs.
        quantized: names and shapes of the quantized weights.
        rest: type of tensors -> names and shapes.
        lossy: the rest was rounded from float32 to float16 when the file was made.
    """

    config: dict[str, Any]
    front_end: dict[str, Any] | None = None
    quantized: Annotated[Layout, Field(min_length=1)]
    rest: dict[str, Layout]
    lossy: bool = False


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack numbers below 2^bits, uint8 (N,), into ceil(bits N / 8) bytes, lowest bit first."""
    return np.packbits(np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Return the numbers of `pack_bits`, uint8 (n,)."""
    flat = np.unpackbits(packed, count=bits * n, bitorder="little")
    return np.packbits(flat.reshape(n, bits), axis=1, bitorder="little")[:, 0]


def count_packed_bytes(bits: int, n: int) -> int:
    """Return the number of bytes of n codes."""
    return -(-bits * n // 8)


def get_width(bits: int) -> int:
    """Return the bits of a code before it is compressed: 2, 4 or 8."""
    return 1 << (bits - 1).bit_length()


def compress(tensor: Tensor) -> Tensor:
    """Compress the bytes of a tensor by LZMA, whose contexts are the byte's place in its value; uint8."""
    place = (tensor.itemsize - 1).bit_length()
    settings = {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 0, "lp": place, "pb": place, "nice_len": 273}
    data = lzma.compress(_get_bytes(tensor), check=lzma.CHECK_NONE, filters=[settings])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decompress(tensor: Tensor, n_bytes: int) -> bytes:
    """Return the bytes of `compress`; of more than `n_bytes`, or of many times the compressed ones, none.

    Raises:
        ValueError: it has another number of bytes.
    """
    data = _get_bytes(tensor)
    if n_bytes > MAX_RATIO * len(data) + _SPARE:
        raise ValueError(f"{n_bytes} bytes are described, which {len(data)} compressed ones cannot hold")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
    values = decompressor.decompress(data, max_length=n_bytes + 1)
    if len(values) != n_bytes or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"a compressed tensor does not hold the {n_bytes} bytes that are described")
    return values


def _get_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def compute_digest(sections: Mapping[str, Tensor]) -> Tensor:
    """Return the SHA-256 of format, version, and the name, type, number of values and bytes of each tensor, by name.

    It is that of "ceq/1", a line feed and, for each tensor, "NAME TYPE NUMBER", a line feed and the bytes.
    """
    digest = hashlib.sha256(f"{FORMAT}{VERSION}\n".encode())
    for name, tensor in sorted(sections.items()):
        digest.update(f"{name} {name_type(tensor.dtype)} {len(tensor)}\n".encode())
        digest.update(_get_bytes(tensor))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def name_type(dtype: torch.dtype) -> str:
    """Return the name of a type as the tensors of a file have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def describe(description: PackedDescription) -> Tensor:
    """Return the tensor `description`."""
    text = json.dumps(description.model_dump(exclude_defaults=True), ensure_ascii=False, separators=(",", ":"))
    return torch.frombuffer(bytearray(zlib.compress(text.encode(), 9)), dtype=torch.uint8)


def read_packed(path: Path) -> dict[str, Any]:
    """Read a file.

    Returns:
        State dict "model" and "config", as a checkpoint has them: weights of quantized values, and their grids.

    Raises:
        UserError: it is no such file, or of another version.
        ValueError: it is damaged, or contradicts itself; with what was found.
    """
    sections = _read_sections(path)
    description = _read_description(sections.pop(DESCRIPTION, None), path)
    state: dict[str, Tensor] = {}
    for name, dtype, layout in _list_rest(description):
        sizes = [math.prod(shape) for shape in layout.values()]
        parts = _take(sections, name, dtype, sum(sizes)).split(sizes)
        for (key, shape), part in zip(layout.items(), parts, strict=True):
            state[key] = (part.float() if description.lossy and dtype == torch.float16 else part).view(shape)
    n_rest = len(state)
    recipe = _read_recipe(description, path)
    for key, codes in _read_codes(sections, description.quantized, recipe):
        grid = {f"{key}_{FakeQuantize.kept_as}.{part}": value for part, value in get_grid_state(codes, recipe).items()}
        state |= {key: codes.decode()} | grid
    if sections:
        raise ValueError(f"it has unknown tensors {some(sections)}")
    if len(state) != n_rest + len(description.quantized) * (1 + len(grid)):
        raise ValueError("a tensor is described twice")
    return {"model": state, "config": description.config}


def _read_sections(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, after comparing them with its checksum."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format", "")
            if not found.startswith(FORMAT):
                raise UserError(f"{path}: is a safetensors file, but no {PACKED} file of scripts/pack_quantized.py")
            if (version := found.removeprefix(FORMAT)) != VERSION:
                raise UserError(
                    f"{path}: has version {version!r:.80} of the format, and this program reads version {VERSION}: use "
                    "the program that wrote it, or pack the checkpoint again"
                )
            sections = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"no {PACKED} file, or cut short: {error}") from error
    if any(tensor.ndim != 1 for tensor in sections.values()):
        raise ValueError("a tensor has several axes")
    digest = sections.pop(DIGEST, None)
    if digest is None or not torch.equal(digest, compute_digest(sections)):
        raise ValueError("its content does not have its checksum")
    return sections


def _read_description(packed: Tensor | None, path: Path) -> PackedDescription:
    if packed is None or packed.dtype != torch.uint8:
        raise ValueError("it has no description")
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(_get_bytes(packed), _MAX_DESCRIPTION)
    except zlib.error as error:
        raise ValueError(f"its description is damaged: {error}") from error
    if not decompressor.eof:
        raise ValueError(f"its description has more than {_MAX_DESCRIPTION} bytes, or is cut short")
    return check_description(PackedDescription, parse_json(text), f"{path}: its description")


def _read_recipe(description: PackedDescription, path: Path) -> Quantization:
    try:
        config = check_description(ModelDescription, description.config, "its config")
        return Quantization.parse((config.model_args or {}).get("quantize"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _list_rest(description: PackedDescription) -> list[tuple[str, torch.dtype, Layout]]:
    found = []
    for name, layout in description.rest.items():
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or dtype.is_complex:
            raise ValueError(f"it describes tensors of type {name!r:.80}")
        found.append((f"{REST}{name}", dtype, layout))
    return found


def _take(sections: dict[str, Tensor], name: str, dtype: torch.dtype, n: int) -> Tensor:
    """Remove a tensor, or the compressed one, from those of a file, and return its n values."""
    if (packed := sections.pop(name + XZ, None)) is not None:
        if packed.dtype != torch.uint8:
            raise ValueError(f"{name}{XZ} has {name_type(packed.dtype)}, expected uint8")
        values = bytearray(_decompress(packed, n * dtype.itemsize))
        return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
    tensor = sections.pop(name, None)
    if tensor is None:
        raise ValueError(f"it lacks the tensor {name}")
    if tensor.dtype != dtype or len(tensor) != n:
        found = f"{len(tensor)} values of {name_type(tensor.dtype)}"
        raise ValueError(f"{name} has {found}, and its description has {n} of {name_type(dtype)}")
    return tensor


def _read_codes(sections: dict[str, Tensor], layout: Layout, recipe: Quantization) -> Iterator[tuple[str, Codes]]:
    """Remove the codes and grids from the tensors of a file; yield those of each weight."""
    sizes = [math.prod(shape) for shape in layout.values()]
    if not all(sizes) or not all(layout.values()):
        raise ValueError("a quantized weight has no values, or no axes")
    group_sizes = [recipe.group_size(shape) for shape in layout.values()]
    n_groups = [-(-n // size) for n, size in zip(sizes, group_sizes, strict=True)]
    bits, n_levels = recipe.weights, 1 << recipe.weights
    width = get_width(bits) if CODES + XZ in sections else bits
    n_bytes = [count_packed_bytes(width, n) for n in sizes]
    packed = _take(sections, CODES, torch.uint8, sum(n_bytes)).split(n_bytes)
    levels = None
    if recipe.scheme == "levels":
        levels = _take(sections, LEVELS, torch.bfloat16, n_levels * sum(n_groups)).float().view(-1, n_levels)
        if not bool((levels.diff(dim=1) >= 0).all()):
            raise ValueError("its levels are not finite, or not ascending")
        scales, zeros = torch.ones(len(levels)), torch.zeros(len(levels), dtype=torch.uint8)
    else:
        scales = _take(sections, SCALES, torch.bfloat16, sum(n_groups)).float()
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise ValueError("its scales are not finite and above zero")
        if recipe.scheme == "minmax":
            zeros = _take(sections, ZERO_POINTS, torch.uint8, sum(n_groups))
        else:
            zeros = torch.full((sum(n_groups),), n_levels >> 1, dtype=torch.uint8)
        if int(zeros.max()) >= n_levels:
            raise ValueError(f"a zero point is {int(zeros.max())}, expected at most {n_levels - 1}")
    grids = zip(
        scales.split(n_groups),
        zeros.split(n_groups),
        [None] * len(sizes) if levels is None else levels.split(n_groups),
        strict=True,
    )
    weights = zip(layout.items(), packed, group_sizes, sizes, strict=True)
    for ((key, shape), data, size, n), grid in zip(weights, grids, strict=True):
        values = torch.from_numpy(unpack_bits(data.numpy(), width, n))
        if int(values.max()) >= n_levels:
            raise ValueError(f"{key} has the code {int(values.max())}, expected at most {n_levels - 1}")
        yield key, Codes(values.view(shape), bits, size, *grid)
