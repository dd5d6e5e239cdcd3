"""Weights as they were quantized in training, in ONNX graphs: their codes and scales, never quantized again.

Codes are in the smallest type of ONNX that holds them, INT2 (from opset 25 on), INT4 (21) or INT8, and become float32
in a DequantizeLinear node. Weights of one scale, of one for each row or column, or of blocks along an axis need no
other node. Groups that lie otherwise in the matrix, and trained levels, are decoded in the order of training, and then
laid out by further nodes.

Letters: G groups, n weights of a group, L levels.
"""

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from common.errors import UserError, some
from models.onnx_recurrent import order_gates
from models.quantization import quantized_weights
from models.quantizers import Codes

logger = logging.getLogger(__name__)

Container = Literal["int2", "int4", "int8"]

MIN_OPSET, MAX_OPSET = 18, 25  # the exporter's own, which ONNX Runtime has since 1.14; the first with 2 bits
_TYPES: dict[int, tuple[int, int]] = {  # bits of a container: signed and unsigned
    2: (TensorProto.INT2, TensorProto.UINT2),
    4: (TensorProto.INT4, TensorProto.UINT4),
    8: (TensorProto.INT8, TensorProto.UINT8),
}
_OPSETS = {2: 25, 4: 21, 8: MIN_OPSET}  # the first that has them
_BLOCK_OPSET, _MIN_BLOCK = 21, 16  # of DequantizeLinear with blocks; ONNX Runtime multiplies none that are smaller


@dataclass(frozen=True)
class CodeType:
    """How the codes of a model are stored.

    Attributes:
        size: bits of the type of ONNX.
        opset: of the file.
        recipe: how the model was quantized, see `models.quantization_recipe.Quantization`.
    """

    size: int
    opset: int
    recipe: dict[str, Any]


def choose_code_type(
    model: nn.Module, precisions: Collection[str], opset: int | None, container: Container | None
) -> CodeType | None:
    """Choose how the codes of a model are stored in the file of the precision "quantized".

    Args:
        model: any tagger.
        precisions: of the files to write, see `models.onnx.export_onnx`.
        opset: of the files, None for the lowest possible.
        container: the type of ONNX, None for the smallest that holds the codes.

    Returns:
        None for a model of float weights.

    Raises:
        UserError: codes that do not fit in the type, an opset that does not have it, or a precision that does not suit
            the model.
    """
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise UserError(f"opset {opset} cannot be written; expected {MIN_OPSET} to {MAX_OPSET}")
    recipe = next((quantizer.settings for *_, quantizer in quantized_weights(model)), None)
    if container and "quantized" not in precisions:
        raise UserError("--container is for the codes of quantized weights: give --precision quantized with it")
    if recipe is None:
        if "quantized" in precisions:
            raise UserError(
                "the weights of the model are float, there are no codes to export; give --precision int8, or train it "
                "with `model_args: {quantize: ...}`"
            )
        return None
    if "int8" in precisions:
        raise UserError(
            f"the weights of the model are quantized to {recipe.weights} bits, and int8 would quantize them again; "
            "give --precision quantized, or fp32 for the same values as floats"
        )
    bits = recipe.weights
    size = int(container.removeprefix("int")) if container else min(size for size in _TYPES if size >= bits)
    if size < bits:
        raise UserError(f"codes of {bits} bits do not fit in {container}; leave --container out for the smallest type")
    if opset is not None and opset < _OPSETS[size]:
        fitting = next(other for other, first in _OPSETS.items() if other >= bits and first <= opset)
        raise UserError(
            f"codes of {bits} bits in int{size} need opset {_OPSETS[size]}, not {opset}; give --container "
            f"int{fitting}, which holds the same values in a larger file, or a higher --opset"
        )
    return CodeType(size, opset or _OPSETS[size], recipe.describe())


@dataclass(frozen=True)
class _Layout:
    """How a graph has a weight: its rows ordered by gate, or transposed, or as it is.

    Attributes:
        rows: the order of the rows of a recurrent weight, which gets an axis before them; None for others.
        transposed: columns first.
    """

    rows: Tensor | None = None
    transposed: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """Lay out a tensor of the weight's shape."""
        if self.rows is not None:
            return weight[self.rows][None]
        return weight.T if self.transposed else weight


def _layouts(module: nn.Module, weight: Tensor) -> list[_Layout]:
    if isinstance(module, nn.RNNBase):
        return [_Layout(order_gates(module, torch.arange(len(weight))))]
    return [_Layout(), _Layout(transposed=True)] if weight.ndim == 2 else [_Layout()]


def embed_codes(graph: onnx.ModelProto, model: nn.Module, code_type: CodeType) -> onnx.ModelProto:
    """Replace the quantized weights of a graph by their codes, in place, and return it.

    Weights that the graph does not have as they are stay float32, with a warning.

    Args:
        graph: traced from the model, with the values of its weights unchanged.
        model: with plain weights beside their quantizers, see `models.parametrizations.bake_parametrizations`.
        code_type: see `choose_code_type`.

    Raises:
        UserError: the graph has none of the weights.
    """
    floats: dict[int, list[TensorProto]] = {}
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            floats.setdefault(math.prod(tensor.dims), []).append(tensor)
    nodes: list[NodeProto] = []
    missing = []
    for name, module, parameter, quantizer in quantized_weights(model):
        weight = cast(Tensor, getattr(module, parameter)).detach()
        found = [
            (tensor, layout)
            for layout in _layouts(module, weight)
            for tensor in floats.get(weight.numel(), [])
            if _holds(tensor, layout.apply(weight))
        ]
        if not found:
            missing.append(name)
        for tensor, layout in found:
            floats[weight.numel()].remove(tensor)
            graph.graph.initializer.remove(tensor)
            nodes += _decode(graph, tensor.name, quantizer.encode(weight), layout, code_type.size)
    if not nodes:
        raise UserError("the graph has none of the quantized weights as they are; give --precision fp32")
    if missing:
        logger.warning("%s: stays float32, since the graph has it in another form", some(missing))
    others = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *others])
    return graph


def _holds(tensor: TensorProto, values: Tensor) -> bool:
    return tuple(tensor.dims) == tuple(values.shape) and np.array_equal(numpy_helper.to_array(tensor), values.numpy())


def _decode(graph: onnx.ModelProto, name: str, codes: Codes, layout: _Layout, container: int) -> list[NodeProto]:
    """Add a weight's codes and grid to a graph; return the nodes that compute the weight called `name` from them."""
    n_groups = len(codes.scale)
    groups = layout.apply((torch.arange(codes.codes.numel()) // codes.group_size).view(codes.codes.shape)).numpy()
    version = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    fit = _fit_axis(groups, version >= _BLOCK_OPSET)
    if codes.levels is None and fit is not None:
        index, attributes = fit
        return [_dequantize(graph, name, name, layout.apply(codes.codes).numpy(), codes, index, container, attributes)]
    flat = np.zeros(n_groups * codes.group_size, np.uint8)
    flat[: codes.codes.numel()] = codes.codes.flatten().numpy()
    grouped, values = flat.reshape(n_groups, -1), f"{name}_groups"
    if codes.levels is None:
        nodes = [_dequantize(graph, name, values, grouped, codes, np.arange(n_groups), container, {"axis": 0})]
    else:
        table = _add(graph, f"{name}_levels", codes.levels.numpy())
        stored = _add_codes(graph, f"{name}_codes", grouped, _TYPES[container][1], container)
        nodes = [
            helper.make_node("Cast", [stored], [f"{name}_indices"], to=TensorProto.INT32),
            helper.make_node("GatherElements", [table, f"{name}_indices"], [values], axis=1),
        ]
    return [*nodes, *_lay_out(graph, name, values, codes.codes.shape, layout)]


def _fit_axis(groups: np.ndarray, with_blocks: bool) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Find how DequantizeLinear can share scales as groups do.

    Args:
        groups: the group of each weight, as laid out in the graph.
        with_blocks: whether blocks along an axis are possible.

    Returns:
        The group of each scale, and the attributes; None where no choice of them fits.
    """
    if not groups.any():
        return np.zeros((), np.int64), {}
    for axis in range(groups.ndim):
        lines = np.moveaxis(groups, axis, 0).reshape(groups.shape[axis], -1)
        if (lines == lines[:, :1]).all():
            return lines[:, 0], {"axis": axis}
    if with_blocks:
        for axis in reversed(range(groups.ndim)):
            changes = np.diff(groups, axis=axis).nonzero()[axis] + 1
            size = math.gcd(groups.shape[axis], *changes.tolist())
            if size >= _MIN_BLOCK:
                starts = np.arange(0, groups.shape[axis], size)
                return groups.take(starts, axis), {"axis": axis, "block_size": size}
    return None


def _dequantize(
    graph: onnx.ModelProto,
    name: str,
    output: str,
    values: np.ndarray,
    codes: Codes,
    index: np.ndarray,
    container: int,
    attributes: dict[str, Any],
) -> NodeProto:
    """Add codes in any order, and the scales of the groups at `index`; return the node that multiplies them."""
    signed, unsigned = _TYPES[container]
    zero_points = codes.zero_point.numpy()
    inputs = [f"{name}_codes", _add(graph, f"{name}_scale", codes.scale.numpy()[index])]
    if (zero_points == 1 << (codes.bits - 1)).all():
        _add_codes(graph, inputs[0], values.astype(np.int16) - zero_points[0], signed, container)
    else:
        _add_codes(graph, inputs[0], values, unsigned, container)
        inputs.append(_add_codes(graph, f"{name}_zero_point", zero_points[index], unsigned, container))
    return helper.make_node("DequantizeLinear", inputs, [output], **attributes)


def _lay_out(graph: onnx.ModelProto, name: str, values: str, shape: torch.Size, layout: _Layout) -> Iterator[NodeProto]:
    """Yield the nodes that bring groups (G,n) into the layout of a graph."""
    size = math.prod(shape)
    ends = [
        _add(graph, f"{name}_{key}", np.array([value])) for key, value in (("all", -1), ("start", 0), ("end", size))
    ]
    yield helper.make_node("Reshape", [values, ends[0]], [f"{name}_flat"])
    yield helper.make_node("Slice", [f"{name}_flat", *ends[1:]], [f"{name}_cut"])
    is_last = layout.rows is None and not layout.transposed
    target = _add(graph, f"{name}_shape", np.array(shape))
    yield helper.make_node("Reshape", [f"{name}_cut", target], [name if is_last else f"{name}_plain"])
    if layout.transposed:
        yield helper.make_node("Transpose", [f"{name}_plain"], [name], perm=[1, 0])
    elif layout.rows is not None:
        rows = _add(graph, f"{name}_rows", layout.rows.numpy()[None])
        yield helper.make_node("Gather", [f"{name}_plain", rows], [name], axis=0)


def _add(graph: onnx.ModelProto, name: str, values: Any) -> str:
    graph.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
    return name


def _add_codes(graph: onnx.ModelProto, name: str, values: np.ndarray, kind: int, container: int) -> str:
    """Add integers as a tensor of the type `kind`, several in a byte, the first one in the lowest bits."""
    per_byte = 8 // container
    flat = values.ravel().astype(np.uint8) & (2**container - 1)
    parts = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    packed = np.bitwise_or.reduce(parts << (container * np.arange(per_byte, dtype=np.uint8)), axis=1)
    graph.graph.initializer.append(
        helper.make_tensor(name, kind, values.shape, packed.astype(np.uint8).tobytes(), raw=True)
    )
    return name
