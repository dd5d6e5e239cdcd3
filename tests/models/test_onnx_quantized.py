"""Exported files have the codes and scales of training, and compute what the quantized model computes."""

import json
import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import export_onnx as command
from common.errors import UserError
from common.onnx_runtime import SESSION_OPTIONS
from models import create_model, load_model, save_checkpoint
from models.onnx import export_onnx
from models.onnx_quantized import CodeType, choose_code_type, embed_codes
from models.parametrizations import bake_parametrizations
from models.quantization import quantize_model, quantized_weights
from models.quantization_recipe import Quantization
from tagging.onnx_engine import OnnxEngine
from tests.models.sounds import noise

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure
N_IN, N_OUT = 48, 32  # units of the layers
SIZES = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a code → those of its type in a file
OPSETS = {2: 25, 4: 21, 8: 18}
GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}  # of PyTorch, in ONNX's order: i o f c from i f g o; z r h from r z n


def build_layer(kind, **recipe):
    """A layer with quantized weights, its input, its output in PyTorch, and its graph with float weights."""
    torch.manual_seed(0)
    layer = {
        "MatMul": lambda: nn.Linear(N_IN, N_OUT, bias=False),
        "Gemm": lambda: nn.Linear(N_IN, N_OUT),
        "Conv": lambda: nn.Conv2d(N_IN, N_OUT, 3),
        "LSTM": lambda: nn.LSTM(N_IN, N_OUT),
        "GRU": lambda: nn.GRU(N_IN, N_OUT),
    }[kind]()
    model = nn.ModuleDict({"layer": layer}).eval()
    quantize_model(model, Quantization(**recipe))
    bake_parametrizations(model)
    x = torch.randn({"MatMul": (2, 5, N_IN), "Gemm": (5, N_IN), "Conv": (2, N_IN, 7, 7)}.get(kind, (9, 2, N_IN)))
    with torch.no_grad():
        y = layer(x)
    if kind in GATES:
        y, order = y[0][:, None], GATES[kind]

        def reorder(tensor):
            return torch.cat([tensor[gate * N_OUT : (gate + 1) * N_OUT] for gate in order])

        weights = {"w": reorder(layer.weight_ih_l0)[None], "r": reorder(layer.weight_hh_l0)[None]}
        weights["b"] = torch.cat([reorder(layer.bias_ih_l0), reorder(layer.bias_hh_l0)])[None]
        settings = {"hidden_size": N_OUT} | ({"linear_before_reset": 1} if kind == "GRU" else {})
    else:
        weights = {"w": layer.weight.T if kind == "MatMul" else layer.weight}
        weights |= {} if kind == "MatMul" else {"b": layer.bias}
        settings = {"transB": 1} if kind == "Gemm" else {}
    return model, x, y, weights, settings


def write_graph(kind, weights, settings, x, opset):
    node = helper.make_node(kind, ["x", *weights], ["y"], **settings)
    initializers = [numpy_helper.from_array(value.detach().numpy().copy(), name) for name, value in weights.items()]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (4 if kind in GATES else x.ndim))],
        initializers,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13 if opset == 25 else 10
    )


def run_graph(graph, x, *, decode_at_each_run=False):
    options = onnxruntime.SessionOptions()
    for key, value in (SESSION_OPTIONS | ({"session.disable_quant_qdq": "0"} if decode_at_each_run else {})).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def embed(kind, opset=None, **recipe):
    """The graph of a layer with its codes; checks its output against PyTorch."""
    model, x, y, weights, settings = build_layer(kind, **recipe)
    size = SIZES[recipe["weights"]]
    graph = write_graph(kind, weights, settings, x, opset or OPSETS[size])
    embed_codes(graph, model, CodeType(size, opset or OPSETS[size], {}))
    onnx.checker.check_model(graph, full_check=True)
    for decode_at_each_run in (False, True):
        np.testing.assert_allclose(run_graph(graph, x, decode_at_each_run=decode_at_each_run), y, atol=1e-5)
    return model["layer"], graph, {tensor.name: tensor for tensor in graph.graph.initializer}


def types(graph):
    return Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in graph.graph.initializer)


def expected_codes(layer, kind, parameter="weight"):
    """Codes of training as the operator has them: of PyTorch's gates in ONNX's order, or of columns first."""
    codes = getattr(layer, f"{parameter}_quantizer").encode(getattr(layer, parameter)).codes.numpy().astype(int)
    if kind in GATES:
        return codes.reshape(len(GATES[kind]), N_OUT, -1)[GATES[kind]].reshape(1, len(codes), -1)
    return codes.T if kind == "MatMul" else codes


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv", "LSTM", "GRU"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_of_training_are_in_the_smallest_type_with_one_scale_a_row(bits, kind):
    layer, graph, tensors = embed(kind, weights=bits)
    assert f"INT{SIZES[bits]}" in types(graph)
    for name, parameter in [("w", "weight_ih_l0"), ("r", "weight_hh_l0")] if kind in GATES else [("w", "weight")]:
        codes = numpy_helper.to_array(tensors[f"{name}_codes"]).astype(int)
        np.testing.assert_array_equal(codes + 2 ** (bits - 1), expected_codes(layer, kind, parameter))
        assert len(tensors[f"{name}_codes"].raw_data) == codes.size * SIZES[bits] // 8
        assert f"{name}_zero_point" not in tensors
        assert len(tensors[f"{name}_scale"].raw_data) == 4 * len(getattr(layer, parameter))
    assert all("float" not in name for name in tensors)


@pytest.mark.parametrize("kind", ["MatMul", "Conv", "LSTM"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_kept_beside_unsigned_codes(bits, kind):
    layer, graph, tensors = embed(kind, weights=bits, scheme="minmax")
    assert f"UINT{SIZES[bits]}" in types(graph)
    np.testing.assert_array_equal(
        numpy_helper.to_array(tensors["w_codes"]).astype(int),
        expected_codes(layer, kind, "weight_ih_l0" if kind == "LSTM" else "weight"),
    )
    assert len(tensors["w_zero_point"].dims) == 1


@pytest.mark.parametrize("kind", ["MatMul", "Conv", "LSTM"])
@pytest.mark.parametrize("scheme", ["symmetric", "minmax"])
def test_one_scale_for_a_tensor_is_a_scalar(scheme, kind):
    _, _, tensors = embed(kind, weights=4, scope="tensor", scheme=scheme)
    assert list(tensors["w_scale"].dims) == []


@pytest.mark.parametrize(
    ("kind", "bucket_size", "axis"),
    [("MatMul", 16, 0), ("Gemm", 24, 1), ("LSTM", 16, 2), ("Conv", 16 * 9, 1), ("MatMul", 96, 1)],
)
def test_buckets_within_rows_are_blocks(kind, bucket_size, axis):
    """Those of two rows are two equal scales."""
    _, graph, tensors = embed(kind, weights=4, scope="bucket", bucket_size=bucket_size)
    decoders = [node for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    assert {attribute.name: attribute.i for attribute in decoders[0].attribute}["axis"] == axis
    if kind in ("MatMul", "Gemm") and bucket_size < N_IN:
        assert len(tensors["w_scale"].raw_data) == 4 * N_IN * N_OUT // bucket_size


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv", "LSTM", "GRU"])
@pytest.mark.parametrize("recipe", [{"bucket_size": 100}, {"bucket_size": 16, "opset": 18, "weights": 8}])
def test_other_buckets_are_decoded_in_the_order_of_training(recipe, kind):
    layer, _, tensors = embed(kind, **{"weights": 4, "scope": "bucket", "scheme": "minmax", **recipe})
    parameter = "weight_ih_l0" if kind in GATES else "weight"
    codes = getattr(layer, f"{parameter}_quantizer").encode(getattr(layer, parameter))
    found = numpy_helper.to_array(tensors["w_codes"]).astype(int).ravel()[: codes.codes.numel()]
    np.testing.assert_array_equal(found, codes.codes.flatten().numpy())
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["w_scale"]), codes.scale.numpy())


@pytest.mark.parametrize("kind", ["MatMul", "Conv", "LSTM", "GRU"])
@pytest.mark.parametrize(("scope", "bits"), [("channel", 2), ("channel", 3), ("tensor", 3), ("tensor", 8)])
def test_trained_levels_are_a_table_beside_compact_codes(scope, bits, kind):
    layer, graph, tensors = embed(kind, weights=bits, scheme="levels", scope=scope)
    assert f"UINT{SIZES[bits]}" in types(graph)
    n_groups = 1 if scope == "tensor" else len(layer.weight_ih_l0 if kind in GATES else layer.weight)
    assert list(tensors["w_levels"].dims) == [n_groups, 2**bits]


def test_weights_that_the_graph_has_in_another_form_stay_float_with_a_warning(caplog):
    model, x, _, weights, settings = build_layer("LSTM", weights=4)
    weights["r"] = weights["r"] * 2
    graph = write_graph("LSTM", weights, settings, x, 21)
    embed_codes(graph, model, CodeType(4, 21, {}))
    assert "layer.weight_hh_l0: stays float32" in caplog.text
    weights["w"] = weights["w"] * 2
    with pytest.raises(UserError, match="none of the quantized weights as they are; give --precision fp32"):
        embed_codes(write_graph("LSTM", weights, settings, x, 21), model, CodeType(4, 21, {}))


def tagger(name, quantize=None):
    """A small tagger whose output differs from sound to sound, quantized as by `load_model`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defaults = {"pooling": "logit", "depth": 1} if name == "audiotransformer_pico" else {}
        defaults = {"hidden_size": 32} if name.endswith("_small") else defaults
        model = create_model(name, num_classes=5, **defaults)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model(torch.stack([noise(16000, seed, 10.0**-seed) for seed in range(4)]))
        nn.init.normal_(model.get_submodule(model.last_layer).weight, std=0.3)
    if quantize:
        recipe = Quantization(**quantize)
        quantize_model(model, recipe)
        model.arguments["quantize"] = recipe.describe()
    bake_parametrizations(model.eval())
    return model


def test_the_command_writes_the_quantized_file_of_a_quantized_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tagger("lstm_small", {"weights": 4})
    save_checkpoint("model.pt", model)
    command.main(["-m", "model.pt"])
    assert capsys.readouterr().out.startswith("lstm_small.quantized.onnx: 0.")
    graph = onnx.load("lstm_small.quantized.onnx")
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert graph.opset_import[0].version == 21
    assert json.loads(facts["session_options"]) == SESSION_OPTIONS
    assert SESSION_OPTIONS["session.qdq_matmulnbits_accuracy_level"] == "0"
    recipe = json.loads(facts["quantization"])
    assert (recipe["weights"], recipe["scope"], recipe["container"]) == (4, "channel", "int4")
    assert types(graph)["INT4"] == len(list(quantized_weights(model)))
    stored = sorted(len(tensor.raw_data) for tensor in graph.graph.initializer if "_codes" in tensor.name)
    assert stored == sorted(getattr(module, name).numel() // 2 for _, module, name, _ in quantized_weights(model))

    wave = torch.stack([noise(16000, seed, 10.0**-seed) for seed in range(3)])
    engine = OnnxEngine("lstm_small.quantized.onnx")
    assert (engine.precision, engine.batch_size) == ("quantized", 8)
    expected = load_model("model.pt").predict(wave).numpy()
    assert expected.std(0).max() > 0.003
    np.testing.assert_allclose(engine.predict(list(wave.numpy())), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("quantize", "options", "sentence"),
    [
        ({"weights": 4}, {"opset": 18}, "codes of 4 bits in int4 need opset 21, not 18; give --container int8"),
        ({"weights": 2}, {"opset": 21}, "codes of 2 bits in int2 need opset 25, not 21; give --container int4"),
        ({"weights": 4}, {"container": "int2"}, "codes of 4 bits do not fit in int2"),
        ({"weights": 4}, {"opset": 17}, "opset 17 cannot be written; expected 18 to 25"),
        ({"weights": 4}, {"precisions": ["int8"]}, "are quantized to 4 bits, and int8 would quantize them again"),
        (None, {}, "there are no codes to export; give --precision int8"),
        (None, {"precisions": ["int8"], "container": "int8"}, "--container is for the codes of quantized weights"),
    ],
)
def test_what_does_not_suit_model_or_opset_is_refused_before_the_export(quantize, options, sentence, tmp_path):
    model = create_model("audiotransformer_pico", num_classes=5, quantize=quantize)
    precisions = options.pop("precisions", ["quantized"])
    with pytest.raises(UserError, match=sentence):
        export_onnx(model, {each: tmp_path / f"{each}.onnx" for each in precisions}, **options)
    assert not list(tmp_path.iterdir())
    assert choose_code_type(create_model("audiotransformer_pico", num_classes=5), ["fp32"], 21, None) is None


@pytest.mark.parametrize("name", ["lstm_small", pytest.param("gru_small", marks=pytest.mark.long)])
def test_int8_runs_lstm_layers_in_8_bits_and_says_that_it_has_no_such_gru(name, tmp_path, caplog):
    model = tagger(name)
    targets = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "int8")}
    differences = export_onnx(model, targets)
    assert differences["fp32"] < 1e-5
    assert differences["int8"] < 0.05
    operators = Counter(node.op_type for node in onnx.load(targets["int8"]).graph.node)
    assert (operators["LSTM"], operators["DynamicQuantizeLSTM"]) == (0, 2 if name == "lstm_small" else 0)
    assert ("GRU layers in float32 only" in caplog.text) == (name == "gru_small")


@pytest.mark.long
@pytest.mark.parametrize(
    "quantize",
    [
        {"weights": 2},
        {"weights": 3, "scheme": "minmax"},
        {"weights": 4, "scope": "bucket", "bucket_size": 100},
        {"weights": 4, "activations": 8},
        {"weights": 8, "clip": "learned"},
        {"weights": 3, "scheme": "levels"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as", "lstm_small", "gru_small"])
def test_every_kind_of_network_is_exported_as_trained(name, quantize, tmp_path):
    model = tagger(name, quantize)
    waveform = quantize["weights"] == 2
    (difference,) = export_onnx(model, {"quantized": tmp_path / "x.onnx"}, waveform=waveform).values()
    assert difference < (0.05 if "activations" in quantize else 1e-5)
    names = types(onnx.load(tmp_path / "x.onnx"))
    n_weights = len(list(quantized_weights(model)))
    assert sum(count for kind, count in names.items() if kind.endswith(str(SIZES[quantize["weights"]]))) >= n_weights


@pytest.mark.long
@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as", "lstm_small"])
def test_an_older_opset_holds_the_same_codes_in_int8(name, tmp_path):
    model = tagger(name, {"weights": 4})
    targets = {"fp32": tmp_path / "fp32.onnx", "quantized": tmp_path / "quantized.onnx"}
    differences = export_onnx(model, targets, opset=18, container="int8")
    assert max(differences.values()) < 1e-5
    graph = onnx.load(targets["quantized"])
    assert (graph.opset_import[0].version, types(graph)["INT4"]) == (18, 0)
    largest = max(np.abs(numpy_helper.to_array(each)).max() for each in graph.graph.initializer if each.data_type == 3)
    assert largest <= 8
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)
    weights = sum(getattr(module, name).numel() for _, module, name, _ in quantized_weights(model))
    saved = targets["fp32"].stat().st_size - targets["quantized"].stat().st_size
    assert saved == pytest.approx(3 * weights, rel=0.25)
