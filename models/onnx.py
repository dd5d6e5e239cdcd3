"""Export to ONNX: one file with the network, its probabilities, and the metadata to use it.

The graph takes any batch and any number of frames (`feats`, float32 (B,F,T) in the front-end's own scale, as published
CED exports and sherpa-onnx have it) or of samples (`waveform`, float32 (B,S)) and gives probabilities (`prob`, (B,C)).
Clips longer than the network's chunk are cut and averaged inside, chunks weighed as in PyTorch. Every file is run by
ONNX Runtime on shapes that the export never saw, and compared with PyTorch, before it gets its name.

Letters: B batch, S samples, F mel bands, T frames, C classes.
"""

import copy
import csv
import itertools
import json
import logging
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.compose import add_prefix, merge_models
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from onnxscript import ir
from onnxscript import opset18 as op
from torch import Tensor, nn

from common.errors import UserError
from common.files import whole_file, write_text
from common.temporary import temporary_folder
from models.audiotransformer import AudioTransformer
from models.base import AudioTagger
from models.creation import create_model
from models.fourier import PortableFrontEnd
from models.headed import HeadedTagger
from models.labels import AUDIOSET_LABELS
from models.onnx_recurrent import replace_recurrent_layers
from models.parametrizations import bake_parametrizations
from models.vit import SpectrogramTransformer

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "int8"]
Input = Literal["feats", "waveform"]
# How far a probability may be from PyTorch's: float rounding, 11 bits of mantissa, 7 bits of weight.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.2}
# How far log-odds may be, for all precisions, as a share of how much they differ from clip to clip: probabilities of
# rare classes are below any tolerance. Eight bits need 0.02 for CED of all sizes and 0.08 for mn04; 1 is a graph that
# is insensitive to, and classes in another order have more.
SHARE = 0.3
OPSET = 18  # the exporter's own; ONNX Runtime has it since 1.14


def export_onnx(
    model: AudioTagger, targets: Mapping[Precision, str | Path], *, waveform: bool = False
) -> dict[Precision, float]:
    """Write a model to ONNX files, all of them or none.

    Args:
        model: any tagger; it is not changed.
        targets: the file for each precision: "fp32"; "fp16", the network in half precision; "int8", the weights
            of matrix products in 8 bits, their inputs quantised as they come. A front-end is float32 in all of them,
            and so are input and output.
        waveform: the graph takes waveforms (B,S) and holds the front-end, instead of spectrograms (B,F,T).

    Returns:
        For each precision the largest difference of a probability from PyTorch's.

    Raises:
        UserError: the model cannot be traced, or a file computes something else.
    """
    if isinstance(model, HeadedTagger) and model.head.padded:
        raise UserError(
            f"{model.full_name}: the head was trained on clips filled up with zeros, which no exported file can do; "
            "train one with `run.py probe`"
        )
    model = copy.deepcopy(model).cpu().float().eval()
    bake_parametrizations(model)  # a quantiser finds constants only
    takes: Input = "waveform" if waveform else "feats"
    wave = _sounds(2, model.sample_rate)
    network = _trace(_Network(replace_recurrent_layers(model)), model.front_end(wave), "feats", "prob")
    front_end = _trace(PortableFrontEnd(model.front_end), wave, "waveform", "mel") if waveform else None
    differences: dict[Precision, float] = {}
    with ExitStack() as files:
        for precision, target in targets.items():
            graph = _CONVERSIONS[precision](copy.deepcopy(network))
            if front_end is not None:
                graph = merge_models(front_end, graph, [("mel", "feats")])
            _describe(graph, model, takes, precision)
            onnx.checker.check_model(graph)
            file = files.enter_context(whole_file(target))
            onnx.save_model(graph, file)
            file.finish()
            differences[precision] = _compare(file.path, model, takes, precision, str(target))
    return differences


def resize_chunks(model: AudioTagger, n_frames: int) -> AudioTagger:
    """Return the model for chunks of another length, its positions stretched or cropped to it, with a notice.

    Networks that take any length in one piece are returned as they are.

    Args:
        model: as `models.load_model` gives it.
        n_frames: longest spectrogram that goes through the network in one piece.

    Raises:
        UserError: fewer frames than the network's smallest input.
    """
    if isinstance(model, HeadedTagger):
        return HeadedTagger(resize_chunks(model.model, n_frames), model.head).eval()
    if not isinstance(model, SpectrogramTransformer) or model.target_length == n_frames:
        return model
    logger.warning(
        "%s was made for %d frames at a time, and is exported for %d", model.name, model.target_length, n_frames
    )
    arguments = {**model.arguments, "target_length": n_frames}
    other = create_model(
        model.name, num_classes=model.num_classes, labels=model.labels, activation=model.activation, **arguments
    )
    other.load_state_dict(other.adapt_weights(model.state_dict()))
    return other.eval()


def name_files(output: Path, precisions: Sequence[Precision], is_given: bool) -> dict[Precision, Path]:
    """Name the file of each precision: `output` for float32, or for the only one if the name was given."""
    if is_given and len(precisions) == 1:
        return {precisions[0]: output}
    return {each: output if each == "fp32" else output.with_suffix(f".{each}.onnx") for each in precisions}


def check_label_table(table: Path, labels: list[str]) -> None:
    """Check that a label table does not exist yet, or is that of these labels.

    Raises:
        UserError: it belongs to another model.
    """
    if table.exists() and table.read_text(encoding="utf-8", errors="replace") != format_label_table(labels):
        raise UserError(
            f"{table}: holds other labels, of another model in this folder; give the table another name with "
            "--labels-output, or write to another folder with --output"
        )


def write_label_table(path: str | Path, labels: list[str]) -> None:
    """Write the table that sherpa-onnx reads beside a model, see `format_label_table`."""
    write_text(path, format_label_table(labels))


def format_label_table(labels: list[str]) -> str:
    """Lay out the table of labels: a header, then index,mid,"display name".

    Names of AudioSet's classes get AudioSet's mid, others /own/INDEX.
    """
    with open(AUDIOSET_LABELS, newline="", encoding="utf-8") as file:
        mids = {row[2]: row[1] for row in csv.reader(file)}
    lines = ["index,mid,display_name"]
    for index, label in enumerate(labels):
        name = " ".join(label.split()).replace('"', '""')
        lines.append(f'{index},{mids.get(label, f"/own/{index}")},"{name}"')
    return "\n".join(lines) + "\n"


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


def _trace(module: nn.Module, example: Tensor, name_in: str, name_out: str) -> onnx.ModelProto:
    """Trace a module whose one input has a free first and last axis."""
    last = example.ndim - 1
    shapes = ({0: torch.export.Dim("batch", min=1), last: torch.export.Dim(f"{name_in}_length", min=1)},)
    aten = torch.ops.aten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module.eval(),
                (example,),
                input_names=[name_in],
                output_names=[name_out],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                custom_translation_table={
                    aten.gelu.default: _gelu,
                    aten.scaled_dot_product_attention.default: _attention,
                    aten.sort.stable: _sort,
                    operator.floordiv: _floor_divide,
                },
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
    # Recorded shapes mislead the quantiser; metadata and documentation name files of this machine.
    del graph.graph.value_info[:]
    for part in (*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer, graph.graph):
        del part.metadata_props[:]
        part.doc_string = ""
    return graph if name_in == "feats" else add_prefix(graph, "front_end/", rename_inputs=False, rename_outputs=False)


def _keep_float32(graph: onnx.ModelProto) -> onnx.ModelProto:
    return graph


def _to_float16(graph: onnx.ModelProto) -> onnx.ModelProto:
    # Sums of what is scattered, as in token merging, are float32 alone in ONNX Runtime on CPUs.
    kept = [*DEFAULT_OP_BLOCK_LIST, "ScatterND", "ScatterElements"]
    halved = convert_float_to_float16(graph, keep_io_types=True, op_block_list=kept)
    nodes = {node.output[0]: node for node in halved.graph.node}  # the converter casts a shared constant twice
    del halved.graph.node[:]
    halved.graph.node.extend(nodes.values())
    OnnxModel(halved).topological_sort()  # the converter puts its casts last
    del halved.graph.value_info[:]
    return halved


def _to_int8(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Quantise the weights of matrix products, a scale for each column; convolutions stay as they are.

    With 7 of the 8 bits, because two products of 8 bits overflow the 16 bits that processors without VNNI add them in.
    Convolutions quantised at run time are slower than float32 ones, and wrong: mn04 on real sounds, 11 ms instead of 5
    and probabilities that are off by up to 0.9.
    """
    # Else it recommends a preparation that fails on such graphs.
    graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with temporary_folder() as folder:
        path = folder / "int8.onnx"
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(path)


# of the architectures
_AUTHORS = {
    "AST": ("YuanGongND", "https://github.com/YuanGongND/ast"),
    "CED": ("RicherMans", "https://github.com/RicherMans/CED"),
    "EfficientNet": ("YuanGongND", "https://github.com/YuanGongND/psla"),
    "MobileNetV3": ("fschmid56", "https://github.com/fschmid56/EfficientAT"),
    "PaSST": ("kkoutini", "https://github.com/kkoutini/PaSST"),
}
_CONVERSIONS = {"fp32": _keep_float32, "fp16": _to_float16, "int8": _to_int8}


def _describe(graph: onnx.ModelProto, model: AudioTagger, takes: Input, precision: Precision) -> None:
    """Write the metadata of a file; all values are strings."""
    network = model.model if isinstance(model, HeadedTagger) else model
    architecture = "CED" if isinstance(network, AudioTransformer) else type(network).__name__
    author, url = _AUTHORS.get(architecture, ("", ""))
    facts = {
        "model_type": architecture,  # this and the next three as in published exports
        "version": "1.0",
        "model_author": author,
        "url": url,
        "comment": f"{model.full_name}: {takes} to the probabilities of {model.num_classes} classes",
        "name": model.full_name,
        "labels": json.dumps(model.labels, ensure_ascii=False),
        "activation": model.activation,
        "precision": precision,
        "input": takes,
        "sample_rate": str(model.sample_rate),
        "front_end": json.dumps(model.front_end.description),
        "max_frames": "",  # no bound
    }
    del graph.metadata_props[:]
    for key, value in facts.items():
        graph.metadata_props.add(key=key, value=value)
    graph.producer_name, graph.doc_string = "export_onnx", facts["comment"]
    graph.graph.name = model.full_name


def _sounds(n_clips: int, n_samples: int, seed: int = 0) -> Tensor:
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
def _compare(path: Path, model: AudioTagger, takes: Input, precision: Precision, target: str) -> float:
    """Return the largest difference from PyTorch of what ONNX Runtime computes from a file.

    Raises:
        UserError: it is larger than the precision explains, or the runtime does not take the file.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest, pairs = 0.0, []
    for seed, (n_clips, n_samples) in enumerate(_shapes_to_compare(model), 1):
        given = _sounds(n_clips, n_samples, seed)
        expected = model.predict(given).numpy()
        if takes == "feats":
            given = model.front_end(given)
        try:
            found = cast(np.ndarray, session.run(None, {takes: given.numpy()})[0])
        except Exception:  # of no common class: a shape of the tracer's example has stayed in the graph
            found = np.full_like(expected, np.nan)
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
        if not difference <= TOLERANCE[precision]:
            raise UserError(
                f"{target}: its probabilities for {n_clips} clips of {n_samples / model.sample_rate:.2f} s are up to "
                f"{difference:.2g} from PyTorch's; {precision} may differ by {TOLERANCE[precision]:g}, and no file is "
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
