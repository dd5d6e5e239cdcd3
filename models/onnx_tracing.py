"""Tracing of taggers for ONNX.

Letters: B batch, F mel bands, T frames, S samples, C classes.
"""

import math
import operator
import warnings
from typing import Any

import onnx
import torch
from onnx import helper
from onnx.compose import add_prefix
from onnxscript import ir
from onnxscript import opset18 as op
from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger
from models.fourier import PortableFrontEnd
from models.frontends import FrontEnd
from models.onnx_recurrent import replace_recurrent_layers


def trace_network(model: AudioTagger, mel: Tensor, opset: int, keep_weights: bool = False) -> onnx.ModelProto:
    """Trace a tagger from spectrograms, `feats`, to probabilities, `prob`.

    Args:
        model: in evaluation mode, on the CPU.
        mel: an example (B,F,T).
        opset: of the graph.
        keep_weights: do not fold batch norms into the weights of convolutions.

    Raises:
        UserError: the model cannot be traced.
    """
    return _trace(_Network(replace_recurrent_layers(model)), mel, "feats", "prob", opset, keep_weights)


def trace_front_end(front_end: FrontEnd, wave: Tensor, opset: int) -> onnx.ModelProto:
    """Trace a front-end from an example of samples (B,S), `waveform`, to spectrograms, `mel`."""
    graph = _trace(PortableFrontEnd(front_end), wave, "waveform", "mel", opset)
    return add_prefix(graph, "front_end/", rename_inputs=False, rename_outputs=False)


class _Network(nn.Module):
    """What every graph holds: spectrograms to probabilities."""

    def __init__(self, model: AudioTagger) -> None:
        super().__init__()
        self.model = model

    def forward(self, feats: Tensor) -> Tensor:
        """(B,F,T) -> (B,C); other programs compute the features without the model's band limit."""
        return self.model.forward_export(self.model.front_end.silence_bands(feats))


def _gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in the order of factors that ONNX Runtime recognises and fuses."""
    if approximate != "none":
        raise NotImplementedError(f"GELU with approximate={approximate!r}")
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0)), 0.5)


def _attention(query: Any, key: Any, value: Any, bias: Any = None, *rest: Any, **settings: Any) -> Any:
    """Attention with what is added to its scores, scaled once: a third of the nodes that the exporter would write."""
    if any(rest) or any(settings.values()):  # no network here has them in its graph
        raise NotImplementedError("attention with dropout, causality or another scale")
    scores = op.MatMul(op.Mul(query, 1 / math.sqrt(query.shape[-1])), op.Transpose(key, perm=[0, 1, 3, 2]))
    if bias is not None and bias.dtype == ir.DataType.BOOL:
        scores = op.Where(bias, scores, -math.inf)
    elif bias is not None:
        scores = op.Add(scores, bias)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _sort(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Sorted values and their places; equal values keep their order, with any `stable`."""
    axis = dim % len(x.shape)
    return op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending))


def _floor_divide(x: Any, y: Any) -> Any:
    """Divide sizes, rounded downwards as in Python: ONNX rounds a negative quotient upwards."""
    return op.Div(op.Sub(x, op.Mod(x, y)), y)


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float) -> Any:
    """Batch norm as a product and a sum, which the exporter does not fold into the weights before it.

    ONNX Runtime does it at run time.
    """
    factor = op.Div(1.0, op.Sqrt(op.Add(variance, eps)))
    factor = factor if weight is None else op.Mul(factor, weight)
    offset = op.Neg(op.Mul(mean, factor))
    offset = offset if bias is None else op.Add(offset, bias)
    shape: Any = [-1, *[1] * (len(x.shape) - 2)]  # the channels are the second axis
    y = op.Add(op.Mul(x, op.Reshape(factor, shape)), op.Reshape(offset, shape))
    return y, factor, offset  # nothing uses the other two, which must be results of operators


def _trace(
    module: nn.Module, example: Tensor, name_in: str, name_out: str, opset: int, keep_weights: bool = False
) -> onnx.ModelProto:
    """Trace a module whose one input has a free first and last axis."""
    last = example.ndim - 1
    shapes = ({0: torch.export.Dim("batch", min=1), last: torch.export.Dim(f"{name_in}_length", min=1)},)
    aten = torch.ops.aten
    translations: dict[Any, Any] = {
        aten.gelu.default: _gelu,
        aten.scaled_dot_product_attention.default: _attention,
        aten.sort.stable: _sort,
        operator.floordiv: _floor_divide,
    }
    if keep_weights:
        translations[aten._native_batch_norm_legit_no_training.default] = _batch_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module.eval(),
                (example,),
                input_names=[name_in],
                output_names=[name_out],
                dynamic_shapes=shapes,
                opset_version=opset,
                custom_translation_table=translations,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(
                f"the model cannot be traced for ONNX ({cause}): `forward_export` must depend on shapes alone. Usual "
                "causes are conditions on values, `len(x)` in place of `x.shape[0]`, and an nn.LSTM or nn.GRU of "
                "several layers or two directions (give each layer a module of its own)"
            ) from error
    assert program is not None
    graph = program.model_proto
    graph.ir_version = max(graph.ir_version, helper.find_min_ir_version_for(list(graph.opset_import)))
    # Recorded shapes mislead the quantiser; metadata and documentation name files of this machine.
    del graph.graph.value_info[:]
    for part in (*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer, graph.graph):
        del part.metadata_props[:]
        part.doc_string = ""
    return graph
