"""ONNX files of strangers, given as a model: probabilities of the right shape, or one sentence."""

import json
import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.errors import UserError
from tagging.engines import open_engine
from tests.models.strange import LIMIT_BYTES, check_one, mutate_bytes, peak_bytes

LABELS = ["a", "b", "c"]
FRONT_END = {"class": "CedMel", "sample_rate": 16000, "min_frames": 16}
FACTS = {
    **{"labels": json.dumps(LABELS), "sample_rate": "16000", "front_end": json.dumps(FRONT_END), "max_frames": "1012"},
    **{"precision": "fp32", "name": "small", "model_type": "CED"},
}
CLIP = np.sin(np.arange(8000) / 7).astype(np.float32)


def write_graph(path, takes="feats", facts=FACTS, n_classes=3, input_shape=None, output_shape=None, kind=1):
    """Write a small classifier of spectrograms (B,64,T) or waveforms (B,S)."""
    n_features, axis = (64, 2) if takes == "feats" else (1, 1)
    shape = ["batch", 64, "frames"] if takes == "feats" else ["batch", "samples"]
    weight = np.random.default_rng(0).normal(size=(n_features, n_classes)).astype(np.float32) / 100
    nodes = [
        helper.make_node("ReduceMean", [takes, "axes"], ["mean"], keepdims=int(takes != "feats")),
        helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["prob"]),
    ]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([axis]), "axes")]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(takes, kind, input_shape or shape)],
        [helper.make_tensor_value_info("prob", TensorProto.FLOAT, output_shape or ["batch", n_classes])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for key, value in ({"input": takes} | facts).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
    return path


def tag(path):
    engine = open_engine(path)
    return engine, engine.predict([CLIP])


def is_tagged(result):
    engine, probabilities = result
    return probabilities.shape == (1, len(engine.labels)) and bool(((probabilities >= 0) & (probabilities <= 1)).all())


@pytest.mark.parametrize("takes", ["feats", "waveform"])
def test_the_small_graph_tags(tmp_path, takes):
    engine, probabilities = tag(write_graph(tmp_path / "x.onnx", takes))
    assert engine.labels == LABELS
    assert is_tagged((engine, probabilities))


def mutate_files(folder, n_mutations):
    before = peak_bytes()
    for takes in ("feats", "waveform"):
        content = write_graph(folder / "good.onnx", takes).read_bytes()
        for seed in range(n_mutations):
            (folder / "x.onnx").write_bytes(mutate_bytes(content, random.Random(seed)))
            check_one(lambda: tag(folder / "x.onnx"), is_tagged, f"{takes}, mutation {seed}")
    assert peak_bytes() - before < LIMIT_BYTES


def test_damaged_files_tag_or_give_a_sentence(tmp_path, capfd):
    mutate_files(tmp_path, 60)
    assert "EP Error" not in capfd.readouterr().out  # all is in the sentence


@pytest.mark.long
def test_thousands_of_damaged_files_tag_or_give_a_sentence(tmp_path, record_property):
    mutate_files(tmp_path, 3000)
    record_property("damaged ONNX files", 3000)


VALUES = {
    "labels": [
        "3",
        "null",
        "{}",
        '["a", "b"]',
        '["a", "b", "b"]',
        '["a", "b", 3]',
        '["a", "b", ""]',
        "[",
        "[" * 5000,
        "",
    ],
    "front_end": [
        *("3", "[]", "{}", "[" * 5000, '{"class": 3}', '{"class": "Mel"}', '{"class": ["CedMel"]}'),
        *('{"class": "CedMel", "n_fft": 10000000}', '{"class": "CedMel", "n_mels": "x"}'),
        *('{"class": "CedMel", "hop_size": 0}', '{"class": "CedMel", "min_frames": 1000000000}'),
        *('{"class": "CedMel", "min_frames": 999999}', '{"class": "CedMel", "f_min": 1e999}'),
        *('{"class": "CedMel", "nothing": 1}', '{"class": "CedMel", "sample_rate": 32000}'),
        '{"class": "CedMel", "band_limit": "x"}',
    ],
    "sample_rate": ["x", "", "-1", "0", "1e9", "16000.5", "9" * 5000, "1", "\u0661\u0662\u0663\u0664"],
    "max_frames": ["x", "-1", "0", "1", "9" * 5000, "1e3"],
    "input": ["x", "", "prob"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in VALUES for value in VALUES[key]])
def test_metadata_of_another_kind_is_one_sentence(tmp_path, key, value):
    path = write_graph(tmp_path / "x.onnx", facts=FACTS | {key: value})
    message = check_one(lambda: tag(path), lambda result: False, f"{key}: {value:.50}")
    assert str(path) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"n_classes": 4, "output_shape": ["batch", 3]},
        {"n_classes": 4},
        {"output_shape": ["batch"]},
        {"input_shape": ["batch", 64]},
        {"input_shape": [1, 64, 5]},
        {"kind": TensorProto.INT64},
        {"kind": TensorProto.STRING},
    ],
)
def test_graphs_of_another_shape_are_one_sentence(tmp_path, changes):
    path = write_graph(tmp_path / "x.onnx", **changes)
    check_one(lambda: tag(path), lambda result: False, str(changes))


def test_a_graph_without_inputs_is_one_sentence(tmp_path):
    model = onnx.load(write_graph(tmp_path / "x.onnx"))
    del model.graph.input[:]
    onnx.save(model, str(tmp_path / "x.onnx"))
    check_one(lambda: tag(tmp_path / "x.onnx"), lambda result: False, "no inputs")


def test_data_outside_the_folder_are_not_read(tmp_path):
    model = onnx.load(write_graph(tmp_path / "x.onnx"))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "/etc/passwd"), ("offset", "0"), ("length", str(64 * 3 * 4))):
        weight.external_data.add(key=key, value=value)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    check_one(lambda: tag(tmp_path / "x.onnx"), lambda result: False, "external data")


def test_text_that_is_not_utf8_in_metadata_is_one_sentence(tmp_path):
    content = write_graph(tmp_path / "x.onnx", facts=FACTS | {"name": "NAMENAME"}).read_bytes()
    (tmp_path / "x.onnx").write_bytes(content.replace(b"NAMENAME", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe"))
    check_one(lambda: tag(tmp_path / "x.onnx"), lambda result: False, "not UTF-8")


@pytest.mark.parametrize("name", ["folder.onnx", "empty.onnx", "text.onnx", "missing.onnx"])
def test_what_is_no_onnx_file_is_one_sentence(tmp_path, name):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello\n" * 100)
    with pytest.raises(UserError, match=name):
        open_engine(tmp_path / name)
