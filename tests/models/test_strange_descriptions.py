"""Descriptions of models with entries of any kind: the described model or one sentence."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from common.errors import UserError
from models import create_model, load_model
from models.heads import load_head
from models.huggingface import write_huggingface
from models.tensor_files import read_tensors
from tests.models.strange import LIMIT_BYTES, check_one, peak_bytes, write_files

QUICK = settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one file of each format, of the same small model."""
    return write_files(tmp_path_factory.mktemp("files"))


# Values of the right and of the wrong kind for entries of a description.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 10**7, 10**9, 2**31, 2**63, 10**200]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["x", "", "\ud800", "resnet10", "../../x", "ced_base"]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.floats()), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.just([["a"], {}]),
    st.builds(lambda: torch.zeros(3)),
)
KEYS = ("model", "model_args", "num_classes", "labels", "activation", "sample_rate", "format_version", "head")
ARGUMENTS = (
    *("width", "dropout", "sample_rate", "n_mels", "n_fft", "win_size", "hop_size", "f_min", "f_max", "band_limit"),
    *("parametrize", "embed_dim", "num_heads", "target_length", "num_classes", "name", "labels", "activation"),
)


def check_description(files, config, load=load_model, entry="config"):
    content = torch.load(files / "zip.pt", weights_only=True)
    target = files / "described.pt"
    torch.save(content | {entry: config}, target)
    state = content["model"]
    before = peak_bytes()

    def is_right(model):
        described = config if isinstance(config, dict) else {}
        own = model.state_dict()
        return (
            all(torch.equal(value, state[key]) for key, value in own.items() if not key.startswith("front_end"))
            and (not described.get("labels") or list(described["labels"]) == model.labels)
            and described.get("num_classes", model.num_classes) in (model.num_classes, None)
        )

    check_one(lambda: load(target), is_right, f"{entry}: {config!r:.300}")
    assert peak_bytes() - before < LIMIT_BYTES


def good_config(files):
    return copy.deepcopy(torch.load(files / "zip.pt", weights_only=True)["config"])


@QUICK
@given(key=st.sampled_from(KEYS), value=ODD)
def test_an_entry_of_any_kind_gives_the_described_model_or_a_sentence(files, key, value):
    check_description(files, good_config(files) | {key: value})


@QUICK
@given(key=st.sampled_from(ARGUMENTS), value=ODD)
def test_an_argument_of_any_kind_gives_the_described_model_or_a_sentence(files, key, value):
    config = good_config(files)
    config["model_args"][key] = value
    check_description(files, config)


@pytest.mark.long
@settings(QUICK, max_examples=2000)
@given(keys=st.lists(st.sampled_from([*KEYS, *ARGUMENTS]), min_size=1, max_size=3), value=ODD)
def test_thousands_of_descriptions_give_the_described_model_or_a_sentence(files, keys, value):
    config = good_config(files)
    for key in keys:
        (config if key in KEYS else config["model_args"])[key] = copy.deepcopy(value)
        if not isinstance(config["model_args"], dict):
            break
    check_description(files, config)


HEAD_KEYS = ("embed_dim", "num_classes", "hidden_sizes", "labels", "activation", "dropout", "padded", "facts")


@QUICK
@given(key=st.sampled_from(HEAD_KEYS), value=ODD, inside=st.booleans())
def test_an_entry_of_a_head_of_any_kind_gives_the_head_or_a_sentence(files, key, value, inside):
    content = torch.load(files / "birds.pt", weights_only=True)
    if inside:
        content["config"]["facts"]["chunk_length" if key == "padded" else "name"] = value
    else:
        content["config"][key] = value
    torch.save(content, files / "described-head.pt")
    weight = content["head"]["layers.0.weight"]
    check_one(
        lambda: load_head(files / "described-head.pt"),
        lambda head: torch.equal(head.layers[0].weight, weight) and len(head.labels) == 2 and head.chunk_seconds > 0,
        f"{key}: {value!r:.200}",
    )


HF_KEYS = (
    "model_type",
    "problem_type",
    "id2label",
    "head",
    "width",
    "n_mels",
    "n_fft",
    "sample_rate",
    "f_max",
    "hop_size",
)
JSON = ODD.filter(lambda value: not isinstance(value, torch.Tensor) and value != "\ud800")


@QUICK
@given(key=st.sampled_from(HF_KEYS), value=JSON)
def test_a_config_json_of_any_kind_gives_the_described_model_or_a_sentence(files, key, value):
    path = files / "hf" / "config.json"
    good = path.read_text()
    state = read_tensors(files / "hf" / "model.safetensors")
    try:
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        check_one(
            lambda: load_model(files / "hf"),
            lambda model: torch.equal(model.stem.conv.weight, state["encoder.stem.conv.weight"]),
            f"{key}: {value!r:.200}",
        )
    finally:
        path.write_text(good)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "3", "", "{", '{"model_type": 1e999}', "1" * 5000, "\x00"])
def test_what_is_no_json_object_is_one_sentence(files, text):
    path = files / "hf" / "config.json"
    good = path.read_text()
    try:
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            load_model(files / "hf")
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "x"}, "num_classes is 'x': expected a valid integer"),
        ({"labels": 3}, "labels is 3: expected a valid"),
        ({"labels": ["a", "b"]}, "2 labels were given for 3 classes"),
        ({"labels": ["a", "b", "b"]}, "two classes have the label 'b'"),
        ({"labels": ["a", "", "b"]}, "label 1 is ''"),
        ({"num_classes": 10**9}, "num_classes is 1000000000: expected less than or equal to 100000"),
        ({"num_classes": 5, "labels": None}, "describes 5 classes, and its last layer has 3"),
        ({"model_args": {"n_fft": 10**7}}, "n_fft is 10000000; expected whole number, at least 2, at most 32768"),
        ({"model_args": {"width": 20000}}, r"describes a network of \d+ weights, and has \d+"),
        ({"activation": "relu"}, "activation is 'relu': expected 'sigmoid' or 'softmax'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"model": ["x"]}, r"model is \['x'\]: expected a valid string"),
    ],
)
def test_a_wrong_description_is_named_with_what_is_expected(files, changes, message):
    content = torch.load(files / "zip.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | changes}, files / "wrong.pt")
    with pytest.raises(UserError, match=message):
        load_model(files / "wrong.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "blocks.0.first.conv.weight holds NaN or infinite values"),
        (float("-inf"), "blocks.0.first.conv.weight holds NaN or infinite values"),
    ],
)
def test_weights_that_are_not_finite_are_named(files, value, message):
    content = torch.load(files / "zip.pt", weights_only=True)
    content["model"]["blocks.0.first.conv.weight"][0, 0, 0, 0] = value
    torch.save(content, files / "wrong.pt")
    with pytest.raises(UserError, match=message):
        load_model(files / "wrong.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.long(),
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x[:1],
        lambda x: x.flatten()[0],
        lambda x: x.new_zeros(0),
    ],
)
@pytest.mark.parametrize("key", ["stem.conv.weight", "classifier.1.weight", "bands.running_mean"])
def test_tensors_of_another_type_or_shape_are_one_sentence(files, change, key):
    content = torch.load(files / "zip.pt", weights_only=True)
    content["model"][key] = change(content["model"][key])
    torch.save(content, files / "wrong.pt")
    check_one(lambda: load_model(files / "wrong.pt"), lambda model: False, key)


def test_half_precision_weights_are_taken(files):
    content = torch.load(files / "zip.pt", weights_only=True)
    content["model"] = {
        key: value.half() if value.is_floating_point() else value for key, value in content["model"].items()
    }
    torch.save(content, files / "half.pt")
    assert torch.equal(load_model(files / "half.pt").stem.conv.weight, content["model"]["stem.conv.weight"].float())


def leaves(config, path=()):
    """Paths to the values of nested dictionaries."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        yield (*path, key)


SSONDO = {
    "student_model": {"model_name": "mn", "sr": 32000, "width_mult": 0.1, "strides": [2, 2, 2, 2], "se_dims": "c"},
    "classification_head": {"head_type": "mlp", "n_classes": 6, "pooling": "mean"},
    "preprocess": {
        "slice_audio": {"win_len": 10, "step_size": 10},
        "logmelspec": {"win_len": 0.032, "hop_len": 0.016, "n_mels": 128, "f_min": 50, "f_max": None},
        "normalize": {"mean": 0.0, "std": 1.0},
    },
    "knowledge_distillation": {"lambda": 0, "loss": "cosine_similarity"},
}


@pytest.fixture(scope="module")
def ssondo():
    torch.manual_seed(0)
    model = create_model("mobilenetv3", num_classes=6, width=0.1)
    return {f"student_model.{key}": value for key, value in model.state_dict().items()}


def check_ssondo(folder, state, path, value):
    config = copy.deepcopy(SSONDO)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    torch.save({"state_dict": state, "training_config": config}, folder / "student.ckpt")
    key = "model.features.0.0.weight"
    check_one(
        lambda: load_model(folder / "student.ckpt"),
        lambda model: torch.equal(model.state_dict()[key], state[f"student_model.{key}"]),
        f"{path}: {value!r:.200}",
    )


@settings(QUICK, max_examples=10)
@given(path=st.sampled_from(list(leaves(SSONDO))), value=ODD)
def test_a_setting_of_ssondo_of_any_kind_gives_the_student_or_a_sentence(files, ssondo, path, value):
    check_ssondo(files, ssondo, path, value)


@pytest.mark.long
@settings(QUICK, max_examples=1000)
@given(path=st.sampled_from(list(leaves(SSONDO))), value=ODD)
def test_thousands_of_settings_of_ssondo_give_the_student_or_a_sentence(files, ssondo, path, value):
    check_ssondo(files, ssondo, path, value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of CED and AST."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    small_ced = {"depth": 1, "n_mels": 32, "target_length": 64}
    write_huggingface(folder / "ced", create_model("audiotransformer_pico", num_classes=2, **small_ced).eval())
    ast = create_model("ast_pico", num_classes=2, depth=1, target_length=64, n_mels=32)
    (folder / "ast").mkdir()
    (folder / "ast" / "model.safetensors").write_bytes(save(ast.state_dict()))
    config = {
        **{"model_type": "audio-spectrogram-transformer", "hidden_size": 64, "num_attention_heads": 1},
        **{"num_hidden_layers": 1, "intermediate_size": 256, "layer_norm_eps": 1e-6, "qkv_bias": True},
        **{"max_length": 64, "num_mel_bins": 32, "patch_size": 16, "frequency_stride": 16, "time_stride": 16},
        **{"hidden_act": "gelu", "id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"},
    }
    (folder / "ast" / "config.json").write_text(json.dumps(config))
    preprocessor = {"sampling_rate": 16000, "num_mel_bins": 32, "do_normalize": True, "mean": -4.2, "std": 4.5}
    (folder / "ast" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def check_folder(folder, name, index, value):
    path = folder / name
    good = path.read_text()
    config = json.loads(good)
    key = sorted(config)[index % len(config)]
    try:
        path.write_text(json.dumps(config | {key: value}))
        weight = "encoder.norm.weight" if name.startswith("ced") else "norm.weight"
        state = read_tensors(path.with_name("model.safetensors"))
        check_one(
            lambda: load_model(path.parent),
            lambda model: torch.equal(model.norm.weight, state[weight]),
            f"{name}, {key}: {value!r:.200}",
        )
    finally:
        path.write_text(good)


NAMES = ("ced/config.json", "ast/config.json", "ast/preprocessor_config.json")


@settings(QUICK, max_examples=20)
@given(name=st.sampled_from(NAMES), index=st.integers(0, 40), value=JSON)
def test_a_setting_of_a_folder_of_any_kind_gives_the_model_or_a_sentence(folders, name, index, value):
    check_folder(folders, name, index, value)


@pytest.mark.long
@settings(QUICK, max_examples=1500)
@given(name=st.sampled_from(NAMES), index=st.integers(0, 40), value=JSON)
def test_thousands_of_settings_of_folders_give_the_model_or_a_sentence(folders, name, index, value):
    check_folder(folders, name, index, value)
