"""Export to ONNX: one file with the network, its probabilities, and the metadata to use it.

The graph takes any batch and any number of frames (`feats`, float32 (B,F,T) in the front-end's own scale, as published
CED exports and sherpa-onnx have it) or of samples (`waveform`, float32 (B,S)) and gives probabilities (`prob`, (B,C)).
Clips longer than the network's chunk are cut and averaged inside, chunks weighed as in PyTorch. Every file is run by
ONNX Runtime on shapes that the export never saw, and compared with PyTorch, before it gets its name.

Letters: B batch, S samples, F mel bands, T frames, C classes.
"""

import copy
import csv
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx
from onnx.compose import merge_models
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from common.errors import UserError
from common.files import whole_file, write_text
from common.onnx_runtime import SESSION_OPTIONS
from common.temporary import temporary_folder
from models.audiotransformer import AudioTransformer
from models.base import AudioTagger
from models.creation import create_model
from models.headed import HeadedTagger
from models.labels import AUDIOSET_LABELS
from models.onnx_comparison import Input, Precision, compare, draw_sounds
from models.onnx_quantized import MIN_OPSET, CodeType, Container, choose_code_type, embed_codes
from models.onnx_tracing import trace_front_end, trace_network
from models.parametrizations import bake_parametrizations, fit_plain_weights, plain_state
from models.vit import SpectrogramTransformer

logger = logging.getLogger(__name__)


def export_onnx(
    model: AudioTagger,
    targets: Mapping[Precision, str | Path],
    *,
    waveform: bool = False,
    opset: int | None = None,
    container: Container | None = None,
) -> dict[Precision, float]:
    """Write a model to ONNX files, all of them or none.

    Args:
        model: any tagger; it is not changed.
        targets: the file for each precision: "fp32"; "fp16", the network in half precision; "int8", the weights
            of matrix products and LSTM layers in 8 bits, their inputs quantised as they come; "quantized", the codes
            that the weights were trained with, see `models.onnx_quantized`. A front-end is float32 in all of them, and
            so are input and output.
        waveform: the graph takes waveforms (B,S) and holds the front-end, instead of spectrograms (B,F,T).
        opset: of the files; None for the lowest that has the types of a precision, at least 18.
        container: the type of the codes of "quantized"; None for the smallest that holds them.

    Returns:
        For each precision the largest difference of a probability from PyTorch's.

    Raises:
        UserError: the model cannot be traced, a file computes something else, or the model is not quantized, or the
            opset too low, for a precision.
    """
    if isinstance(model, HeadedTagger) and model.head.padded:
        raise UserError(
            f"{model.full_name}: the head was trained on clips filled up with zeros, which no exported file can do; "
            "train one with `run.py probe`"
        )
    network = model.model if isinstance(model, HeadedTagger) else model
    if isinstance(model, HeadedTagger) and model.head.input.stride and isinstance(network, SpectrogramTransformer):
        raise UserError(
            f"{model.full_name}: the head takes time steps, which exported files of transformers do not have; train "
            "another one with `run.py probe --head linear`"
        )
    codes = choose_code_type(model, targets, opset, container)
    model = copy.deepcopy(model).cpu().float().eval()
    bake_parametrizations(model)  # a quantiser finds constants only
    takes: Input = "waveform" if waveform else "feats"
    trace = functools.cache(functools.partial(_trace_parts, model, waveform))
    differences: dict[Precision, float] = {}
    with ExitStack() as files:
        for precision, target in targets.items():
            if codes is not None and precision == "quantized":
                network, front_end = trace(codes.opset, True)
                graph = embed_codes(copy.deepcopy(network), model, codes)
            else:
                network, front_end = trace(opset or MIN_OPSET, False)
                graph = _CONVERSIONS[precision](copy.deepcopy(network))
            if front_end is not None:
                graph = merge_models(front_end, graph, [("mel", "feats")])
            _describe(graph, model, takes, precision, codes)
            onnx.checker.check_model(graph)
            file = files.enter_context(whole_file(target))
            onnx.save_model(graph, file)
            file.finish()
            differences[precision] = compare(file.path, model, takes, precision, str(target))
    return differences


def _trace_parts(
    model: AudioTagger, waveform: bool, opset: int, keep_weights: bool
) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """Trace the network, and the front-end if waveforms are taken."""
    wave = draw_sounds(2, model.sample_rate)
    network = trace_network(model, model.front_end(wave), opset, keep_weights)
    return network, trace_front_end(model.front_end, wave, opset) if waveform else None


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
    other.load_state_dict(fit_plain_weights(other, other.adapt_weights(plain_state(model))))
    if model.arguments.get("quantize"):
        bake_parametrizations(other)  # as `load_model` does
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


def _keep_float32(graph: onnx.ModelProto) -> onnx.ModelProto:
    return graph


def _to_float16(graph: onnx.ModelProto) -> onnx.ModelProto:
    # Sums of what is scattered, as in token merging, are float32 alone in ONNX Runtime on CPUs.
    kept = {*DEFAULT_OP_BLOCK_LIST, "ScatterND", "ScatterElements"}
    operators = {node.op_type for node in graph.graph.node}
    is_recurrent = bool(operators & {"LSTM", "GRU"})
    if is_recurrent:  # which it has in float32 alone, and crashes at where others are not: only weights are halved
        kept |= operators
    halved = convert_float_to_float16(
        graph, keep_io_types=True, op_block_list=list(kept), force_fp16_initializers=is_recurrent
    )
    nodes = {node.output[0]: node for node in halved.graph.node}  # the converter casts a shared constant twice
    del halved.graph.node[:]
    halved.graph.node.extend(nodes.values())
    OnnxModel(halved).topological_sort()  # the converter puts its casts last
    del halved.graph.value_info[:]
    return halved


def _to_int8(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Quantise the weights of matrix products and LSTM layers, a scale for each column; the others stay as they are.

    With 7 of the 8 bits, because two products of 8 bits overflow the 16 bits that processors without VNNI add them in.
    Convolutions quantised at run time are slower than float32 ones, and wrong: mn04 on real sounds, 11 ms instead of 5
    and probabilities that are off by up to 0.9.
    """
    if any(node.op_type == "GRU" for node in graph.graph.node):
        logger.warning("ONNX Runtime has GRU layers in float32 only: theirs are as large and as fast in int8")
    # Else it recommends a preparation that fails on such graphs.
    graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with temporary_folder() as folder:
        path = folder / "int8.onnx"
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(path)


# of the architectures
_AUTHORS = {
    "AST": ("YuanGongND", "https://github.com/YuanGongND/ast"),
    "CED": ("RicherMans", "https://github.com/RicherMans/CED"),
    "Dasheng": ("XiaoMi", "https://github.com/XiaoMi/dasheng"),
    "EfficientNet": ("YuanGongND", "https://github.com/YuanGongND/psla"),
    "MATPAC": ("aurianworld", "https://github.com/aurianworld/matpac"),
    "MobileNetV3": ("fschmid56", "https://github.com/fschmid56/EfficientAT"),
    "PaSST": ("kkoutini", "https://github.com/kkoutini/PaSST"),
}
_CONVERSIONS = {"fp32": _keep_float32, "fp16": _to_float16, "int8": _to_int8}


def _describe(
    graph: onnx.ModelProto, model: AudioTagger, takes: Input, precision: Precision, codes: CodeType | None
) -> None:
    """Write the metadata of a file; all values are strings."""
    network = model.model if isinstance(model, HeadedTagger) else model
    architecture = "CED" if type(network) is AudioTransformer else type(network).__name__
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
    if codes is not None and precision == "quantized":
        facts["quantization"] = json.dumps(codes.recipe | {"container": f"int{codes.size}"})
        facts["session_options"] = json.dumps(SESSION_OPTIONS)  # without which ONNX Runtime is less accurate
    del graph.metadata_props[:]
    for key, value in facts.items():
        graph.metadata_props.add(key=key, value=value)
    graph.producer_name, graph.doc_string = "export_onnx", facts["comment"]
    graph.graph.name = model.full_name
