"""Files that are not what they should be, given as a model: the right values or one sentence, never anything else."""

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from models.headed import Head, HeadedTagger
from models.heads import load_head, save_head
from models.huggingface import write_huggingface
from models.tensor_files import read_tensors
from tests.models.strange import LIMIT_BYTES, check_one, mutate_bytes, peak_bytes, run_limited

QUICK = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
N_QUICK, N_LONG = 100, 4000


def small(**settings):
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "labels": ["a", "b", "c"], "width": 2, "n_mels": 32}
    return create_model("resnet10_small", **arguments | settings).eval()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one file of each format, of the same small model."""
    folder = tmp_path_factory.mktemp("files")
    model = small()
    save_checkpoint(folder / "zip.pt", model, {"config": {"lr": 0.1}, "epoch": 3})
    content = torch.load(folder / "zip.pt", weights_only=True)
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.safetensors").write_bytes(save(model.state_dict()))
    head = Head(model.embed_dim, 2, labels=["x", "y"]).eval()
    head.facts = {"name": "birds", "model": model.name, "chunk_length": 5.0, "value": 0.5, "metric": "mAP"}
    save_head(folder / "birds.pt", head)
    save_checkpoint(folder / "headed.pt", HeadedTagger(model, head).eval())
    write_huggingface(folder / "hf", model)
    return folder


def run_mutations(path, read, n_mutations, others=(), allowed=lambda value: False):
    """Read `n_mutations` mutations of a file; return how many gave the right values and how many a sentence."""
    content, right = path.read_bytes(), read(path)
    target = path.with_name(f"mutated-{path.name}")
    counts = {"right": 0, "sentence": 0}
    before = peak_bytes()
    for seed in range(n_mutations):
        target.write_bytes(mutate_bytes(content, random.Random(seed), others))
        result = check_one(
            lambda: read(target), lambda value: same(right, value) or allowed(value), f"{path.name}, mutation {seed}"
        )
        counts["right" if result == "right" else "sentence"] += 1
    assert peak_bytes() - before < LIMIT_BYTES
    assert counts["sentence"] > n_mutations // 4  # else the mutations are none
    return counts


def check_archive(files, n_mutations):
    run_mutations(files / "zip.pt", read_tensors, n_mutations, [(files / "birds.pt").read_bytes()])


def check_legacy(files, n_mutations):
    run_mutations(files / "legacy.pth", read_tensors, n_mutations, allowed=lambda value: True)  # without checksums


def check_safetensors(files, n_mutations):
    run_mutations(files / "plain.safetensors", read_tensors, n_mutations, allowed=lambda value: True)


def check_pickles(files, n_mutations):
    """Mutations of the pickle alone, with right checksums: any content but no other exception, memory or time."""
    for name, load in (("zip.pt", load_model), ("birds.pt", load_head), ("headed.pt", load_model)):
        source = zipfile.ZipFile(files / name)
        members = {member: source.read(member) for member in source.namelist()}
        pickled = next(member for member in members if member.endswith("/data.pkl"))
        target = files / f"mutated-{name}"
        before = peak_bytes()
        for seed in range(n_mutations):
            mutated = mutate_bytes(members[pickled], random.Random(seed))
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                for member, content in members.items():
                    archive.writestr(member, mutated if member == pickled else content)
            check_one(partial(load, target), lambda value: True, f"pickle of {name}, mutation {seed}")
        assert peak_bytes() - before < LIMIT_BYTES


CHECKS = (check_archive, check_legacy, check_safetensors, check_pickles)


@pytest.mark.parametrize("check", CHECKS)
def test_damaged_files_give_their_values_or_a_sentence(files, check):
    check(files, N_QUICK)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_thousands_of_damaged_files_give_their_values_or_a_sentence(files, check):
    check(files, N_LONG)


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


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/mem", "fifo", "empty.pt", "folder.pt"]
)
def test_what_is_no_file_of_tensors_is_told_at_once(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    message = check_one(lambda: load_model(tmp_path / path), lambda model: False, path)
    assert path in message


def test_a_flipped_bit_in_weights_is_found_by_the_checksum(files):
    content = bytearray((files / "zip.pt").read_bytes())
    state = torch.load(files / "zip.pt", weights_only=True)["model"]
    at = bytes(content).index(state["stem.conv.weight"].numpy().tobytes())
    content[at + 2] ^= 1
    (files / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match="Bad CRC-32"):
        load_model(files / "flipped.pt")


def test_files_without_checksums_are_read(files, monkeypatch):
    content = torch.load(files / "zip.pt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, files / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_tensors(files / "unchecked.pt"), content)


VALUES = {
    "dtypes": [
        torch.arange(6).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.uint16)
    ],
    "views": [torch.arange(12.0).view(3, 4).T, torch.arange(12.0)[3:7], torch.zeros(1).expand(5), torch.zeros(0, 3)],
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "plain": [None, True, -(2**40), 2**100, 1.5, "text", "\u00e9", (1, (2, 3)), {"a": [1]}, {1, "x"}, b"bytes"],
    "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16],
}


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, new):
    shared = torch.arange(4.0)
    values = VALUES | {"shared": [shared, shared[1:]]}
    if not new:  # which torch.load cannot read again
        values["dtypes"] = values["dtypes"][:-1]
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    ours, theirs = read_tensors(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert same(theirs, ours)
    assert all(one.stride() == other.stride() for one, other in zip(theirs["views"], ours["views"], strict=True))
    ours["shared"][0][1] = 7.0  # of one storage
    assert ours["shared"][1][0] == 7.0


def pickled(*operations):
    return b"\x80\x02" + b"".join(operations) + b"."


def write_archive(path: Path, data: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"x/data/{name}", content)
    return path


def nested_tuple(depth):
    """A tuple of two equal tuples of two equal tuples ..., in a few bytes."""
    operations = [b")q\x00"]
    for index in range(depth):
        operations += [b"h", bytes([index]), b"h", bytes([index]), b"\x86q", bytes([index + 1])]
    return b"".join(operations)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
LONG = struct.pack
BOMBS = {
    "a key that takes for ever to hash": pickled(b"}", nested_tuple(60), b"Ns"),
    "a key in a call": pickled(b"ccollections\nOrderedDict\n]]", nested_tuple(60), b"aNaa\x85R"),
    "an item of a set": pickled(b"cbuiltins\nset\n]", nested_tuple(60), b"a\x85R"),
    "values that contain one another": pickled(b"}X\x01\x00\x00\x00a", nested_tuple(60), b"s"),
    "a list that contains itself": pickled(b"}X\x01\x00\x00\x00a]q\x00h\x00as"),
    "deep nesting": pickled(b"}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s"),
    "a bytearray of ten gigabytes": pickled(b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x80\x02\x85R"),
    "a tensor of ten gigabytes": pickled(b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x80\x02\x85R"),
    "a string that ends early": pickled(b"X\xff\xff\xff\x7f"),
    "a place of four billion": pickled(b"}r\xff\xff\xff\xff"),
    "a storage larger than the file": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\xff\xff\xff\x7ftQs"),
    "a storage of a negative length": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\xff\xff\xff\xfftQs"),
    "code": pickled(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"),
    "a method": pickled(b"cbuiltins\ngetattr\n}X\x06\x00\x00\x00update\x86R"),
    "an object of a class": pickled(b"ctorch\nFloatStorage\n)\x81"),
    "text where a number is expected": pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"X\x01\x00\x00\x00xtQs"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_fill_memory_or_time_are_one_sentence(tmp_path, bomb):
    path = write_archive(tmp_path / "bomb.pt", BOMBS[bomb])
    before = peak_bytes()
    check_one(lambda: load_model(path), lambda model: False, bomb)
    legacy = b"".join(map(pickle.dumps, ())) + BOMBS[bomb]
    (tmp_path / "legacy.pt").write_bytes(legacy)
    check_one(lambda: load_model(tmp_path / "legacy.pt"), lambda model: False, bomb)
    assert peak_bytes() - before < LIMIT_BYTES


def test_a_tensor_larger_than_its_storage_is_one_sentence(tmp_path):
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"model": {"x": huge}}, tmp_path / "huge.pt")
    message = check_one(lambda: load_model(tmp_path / "huge.pt"), lambda model: False, "huge")
    assert "larger than what the file holds of it" in message


def test_compressed_members_are_one_sentence(tmp_path):
    path = write_archive(
        tmp_path / "bomb.pt",
        pickled(b"}X\x01\x00\x00\x00a", STORAGE, b"J\x00\x00\x00\x10tQs"),
        zipfile.ZIP_DEFLATED,
        **{"0": bytes(100 << 20)},
    )
    message = check_one(lambda: load_model(path), lambda model: False, "bomb")
    assert "compressed" in message


def test_overlapping_members_are_one_sentence(files, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", bytes(1000))
        first = archive.infolist()[0]
        for index in range(2000):  # all of them the same bytes
            again = copy.copy(first)
            again.filename = again.orig_filename = f"x/data/{index:04d}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    (tmp_path / "overlap.pt").write_bytes(buffer.getvalue())
    message = check_one(lambda: load_model(tmp_path / "overlap.pt"), lambda model: False, "overlap")
    assert "overlap" in message


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "negative": struct.pack("<q", -1) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "nested": struct.pack("<Q", 20000) + b"[" * 20000,
    "outside": b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16000]}}',
    "overlapping": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "another length": b'{"x":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,16]}}',
    "overflow": b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "reversed": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    "type": b'{"x":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}}',
    "name": b'{"":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_safetensors_that_do_not_fit_are_one_sentence(tmp_path, header):
    content = HEADERS[header]
    if content.startswith(b'{"'):
        content = struct.pack("<Q", len(content)) + content
    (tmp_path / "x.safetensors").write_bytes(content + bytes(16))
    check_one(lambda: load_model(tmp_path / "x.safetensors"), lambda model: False, header)


def test_strange_files_need_little_address_space(files, tmp_path):
    """In a process whose memory is limited to a quarter of a gigabyte more than its imports."""
    paths = [write_archive(tmp_path / f"{index}.pt", bomb) for index, bomb in enumerate(BOMBS.values())]
    content = torch.load(files / "zip.pt", weights_only=True)
    for index, changes in enumerate(
        ({"num_classes": 10**9}, {"model_args": {"n_fft": 10**7}}, {"model_args": {"width": 60000}})
    ):
        paths.append(tmp_path / f"described-{index}.pt")
        torch.save(content | {"config": content["config"] | changes}, paths[-1])
    code = (
        "from common.errors import UserError\n"
        "from models import load_model\n"
        "limit()\n"
        "for path in words:\n"
        "    try:\n"
        "        load_model(path)\n"
        "    except UserError as error:\n"
        "        print('sentence' if 'memory' not in str(error) else str(error))\n"
    )
    result = run_limited(code, *paths, n_bytes=LIMIT_BYTES)
    assert result.stdout.split("\n")[:-1] == ["sentence"] * len(paths), result.stdout + result.stderr
