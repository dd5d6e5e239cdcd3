"""Packed files of quantized models: their bytes, what is read back, and damage."""

import json
import logging
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from common.errors import UserError
from models import attach_head, create_model, load_model, load_weights, save_checkpoint
from models.headed import Head
from models.heads import weights_sha256
from models.packed import (
    CODES,
    DESCRIPTION,
    LEVELS,
    SCALES,
    XZ,
    ZERO_POINTS,
    compute_digest,
    count_packed_bytes,
    pack_bits,
    unpack_bits,
)
from models.packing import count_bytes, pack_model
from models.parametrizations import bake_parametrizations
from models.quantization import quantized_weights
from models.weight_sources import read_weights

SOUND = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
NAME, SMALL = "audiotransformer_pico", {"depth": 1, "embed_dim": 16, "num_heads": 2}


def write_checkpoint(path, quantize, name=NAME, **settings):
    """A checkpoint as training writes it: latent weights and their grids."""
    torch.manual_seed(0)
    model = create_model(name, labels=["a", "b", "c"], quantize=quantize, **(settings or SMALL))
    for _, module, own, _ in quantized_weights(model):
        setattr(module, own, 0.1 * torch.randn_like(getattr(module, own)))
    save_checkpoint(path, model)
    return model


def write_packed(folder, quantize, entropy=False, rest="fp32", **settings):
    """A packed file, and the model that it was made from."""
    write_checkpoint(folder / "a.pt", quantize, **settings)
    model = load_model(folder / "a.pt")
    packed = pack_model(model, entropy=entropy, rest=rest)
    (folder / "a.ceq").write_bytes(packed.data)
    return folder / "a.ceq", model, packed


def read_sections(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name != "sha256"}  # noqa: SIM118


def write_changed(path, change_description=None, change_sections=None, version="1"):
    """Write the file with another description or other tensors, and the checksum that belongs to them."""
    sections = read_sections(path)
    if change_description:
        description = json.loads(zlib.decompress(sections[DESCRIPTION].numpy().tobytes()))
        found = change_description(description)
        description = found if isinstance(found, list) else description
        data = zlib.compress(json.dumps(description).encode())
        sections[DESCRIPTION] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if change_sections:
        change_sections(sections)
    path.write_bytes(save(sections | {"sha256": compute_digest(sections)}, {"format": f"ceq/{version}"}))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert value.contiguous().numpy().tobytes() == second[key].contiguous().numpy().tobytes(), key


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_bit_by_bit_with_the_lowest_bit_first(bits):
    for n in (0, 1, 5, 8, 37):
        codes = np.random.default_rng(bits).integers(0, 1 << bits, n).astype(np.uint8)
        number = sum(int(code) << bits * place for place, code in enumerate(codes))
        packed = pack_bits(codes, bits)
        assert packed.tobytes() == number.to_bytes(count_packed_bytes(bits, n), "little")
        assert count_packed_bytes(bits, n) == int(np.ceil(bits * n / 8))
        np.testing.assert_array_equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "scope", "scheme"),
    [(3, "channel", "symmetric"), (5, "bucket", "minmax"), (2, "tensor", "levels"), (4, "channel", "minmax")],
)
def test_a_file_has_the_bytes_of_the_formula(bits, scope, scheme, tmp_path):
    recipe = {"weights": bits, "scope": scope, "scheme": scheme, "bucket_size": 100}
    path, model, packed = write_packed(tmp_path, recipe)
    sections = read_sections(path)
    codes = [quantizer.encode(getattr(module, own)) for _, module, own, quantizer in quantized_weights(model)]
    groups = sum(len(each.scale) for each in codes)
    assert len(sections[CODES]) == sum(-(-bits * each.codes.numel() // 8) for each in codes)
    expected = {
        "symmetric": {SCALES: 2 * groups},
        "minmax": {SCALES: 2 * groups, ZERO_POINTS: groups},
        "levels": {LEVELS: 2 * groups * 2**bits},
    }[scheme]
    assert {name: sections[name].nbytes for name in (SCALES, ZERO_POINTS, LEVELS) if name in sections} == expected
    quantized = {name for name, *_ in quantized_weights(model)}
    plain = {key: value for key, value in model.state_dict().items() if key not in quantized}
    rest = [value for key, value in plain.items() if "_quantizer." not in key and not key.startswith("front_end.")]
    assert packed.sizes["rest"] == sum(value.nbytes for value in rest)
    assert packed.sizes["scales"] == sum(expected.values())
    assert sum(packed.sizes.values()) == len(packed.data) == path.stat().st_size
    assert packed.sizes["description"] < 1600
    assert packed.full_size == packed.sizes["rest"] + 4 * sum(each.codes.numel() for each in codes)


CASES = [({"weights": bits}, False) for bits in range(2, 9)] + [({"weights": bits}, True) for bits in (2, 3, 5)]
CASES += [
    ({"weights": 3, "scope": scope, "scheme": scheme, "clip": clip, "bucket_size": 50}, scope == "tensor")
    for scope in ("tensor", "channel", "bucket")
    for scheme, clip in (("symmetric", "learned"), ("minmax", "mse"), ("minmax", "learned"), ("levels", None))
]


@pytest.mark.parametrize(("recipe", "entropy"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else None)
def test_what_is_read_is_the_model_bit_by_bit(recipe, entropy, tmp_path):
    trained = write_checkpoint(tmp_path / "a.pt", recipe)
    expected = {
        name: quantizer.encode(getattr(module, own)) for name, module, own, quantizer in quantized_weights(trained)
    }
    model = load_model(tmp_path / "a.pt")
    (tmp_path / "a.ceq").write_bytes(pack_model(model, entropy=entropy).data)
    read = load_model(tmp_path / "a.ceq")
    assert (read.name, read.arguments, read.labels) == (model.name, model.arguments, model.labels)
    inexact = {}
    if recipe.get("clip") == "learned" or recipe.get("scheme") == "levels":  # grids are stored rounded to bfloat16
        inexact = {key for key in model.state_dict() if key.endswith((".scale", ".log_scale", ".levels"))}
    states = [{key: value for key, value in each.state_dict().items() if key not in inexact} for each in (model, read)]
    assert_same(*states)
    assert model.state_dict().keys() == read.state_dict().keys()
    for name, module, own, quantizer in quantized_weights(read):
        codes = quantizer.encode(getattr(module, own))
        assert torch.equal(codes.codes, expected[name].codes)  # those of training
        assert torch.equal(codes.scale, expected[name].scale)
        assert codes.levels is None or torch.equal(codes.levels, expected[name].levels)
    assert torch.equal(read.predict(SOUND), model.predict(SOUND))
    assert weights_sha256(read) == weights_sha256(model)  # a head of one fits the other
    assert pack_model(read, entropy=entropy).data == (tmp_path / "a.ceq").read_bytes()


@pytest.mark.parametrize(
    ("name", "settings", "recipe"),
    [
        ("resnet10_small", {"n_mels": 32}, {}),
        ("resnet10_small", {"n_mels": 32}, {"fold_batch_norm": True}),
        ("lstm_small", {"hidden_size": 8}, {"activations": 8}),
        ("gru_small", {"hidden_size": 8}, {"skip": ["classifier"]}),
    ],
)
def test_convolutions_recurrent_layers_and_batch_norms_are_read_back_bit_by_bit(name, settings, recipe, tmp_path):
    path, model, packed = write_packed(tmp_path, {"weights": 4, **recipe}, name=name, **settings)
    read = load_model(path)
    assert_same(read.state_dict(), model.state_dict())
    assert torch.equal(read.predict(SOUND), model.predict(SOUND))
    assert packed.full_size == count_bytes(create_model(name, num_classes=3, **settings))


def test_a_head_stays_float(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"weights": 4})
    model = load_model(tmp_path / "a.pt")
    head = Head(model.embed_dim, 2, labels=["x", "y"], hidden_sizes=[4])
    head.facts["value"] = float("nan")
    tagger = attach_head(model, head.eval())
    (tmp_path / "a.ceq").write_bytes(pack_model(tagger).data)
    read = load_model(tmp_path / "a.ceq")
    assert read.labels == ["x", "y"]
    assert_same(read.state_dict(), tagger.state_dict())
    assert torch.equal(read.predict(SOUND), tagger.predict(SOUND))


def test_entropy_coding_makes_peaked_codes_smaller_than_their_bits(tmp_path):
    plain = write_packed(tmp_path, {"weights": 4, "clip": "absmax", "scope": "tensor"})[2]
    coded = write_packed(tmp_path, {"weights": 4, "clip": "absmax", "scope": "tensor"}, entropy=True)[2]
    values = torch.cat(
        [q.encode(getattr(m, own)).codes.flatten() for _, m, own, q in quantized_weights(load_model(tmp_path / "a.pt"))]
    )
    share = values.bincount() / len(values)
    entropy = float(-(share * share.log2().nan_to_num(neginf=0)).sum()) * len(values) / 8  # bytes, Shannon
    assert coded.sizes["codes"] < min(plain.sizes["codes"], 1.05 * entropy + 200)


def test_codes_that_compression_makes_larger_or_that_only_a_bomb_would_contain_are_stored_plainly(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"weights": 8})
    for change in (lambda weight: weight, torch.zeros_like):
        model = load_model(tmp_path / "a.pt")
        with torch.no_grad():
            for _, module, own, quantizer in quantized_weights(model):
                codes = quantizer.encode(change(getattr(module, own)))
                noise = torch.randint(0, 256, codes.codes.shape, dtype=torch.uint8)
                getattr(module, own).copy_(replace(codes, codes=change(noise)).decode())
        (tmp_path / "a.ceq").write_bytes(pack_model(model, entropy=True).data)
        assert CODES in read_sections(tmp_path / "a.ceq")
        assert torch.equal(load_model(tmp_path / "a.ceq").predict(SOUND), model.predict(SOUND))


def test_float16_is_declared_and_rounds_only_what_is_not_quantized(tmp_path):
    path, model, packed = write_packed(tmp_path, {"weights": 4}, rest="fp16")
    assert packed.lossy
    read, expected = load_model(path), model.state_dict()
    for name, *_ in quantized_weights(model):
        assert torch.equal(read.state_dict()[name], expected.pop(name))
    for key, value in expected.items():
        is_rest = value.is_floating_point() and "_quantizer." not in key and not key.startswith("front_end.")
        stored = value.half().float() if is_rest else value
        assert torch.equal(read.state_dict()[key], stored), key
    assert pack_model(read, rest="fp16").data == packed.data
    with torch.no_grad():
        model.init_bn[1].running_var.fill_(1e6)
    with pytest.raises(UserError, match=r"running_var has values beyond 65504, the range of float16"):
        pack_model(model, rest="fp16")


def test_training_goes_on_from_a_file(tmp_path, caplog):
    path, model, _ = write_packed(tmp_path, {"weights": 4})
    student = create_model(NAME, labels=["a", "b", "c"], quantize={"weights": 4}, **SMALL)
    load_weights(student, path)
    bake_parametrizations(student.eval())
    assert_same(student.state_dict(), model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert load_model(path, num_classes=5).num_classes == 5


def test_what_is_not_quantized_or_off_its_grid_is_not_packed(tmp_path):
    with pytest.raises(UserError, match=r"is not quantized: run scripts/quantize.py"):
        pack_model(create_model(NAME, num_classes=2, **SMALL))
    _, model, _ = write_packed(tmp_path, {"weights": 4})
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"blocks.0.mlp.fc1.weight: values are not on the grid"):
        pack_model(model)


@pytest.mark.parametrize("entropy", [False, True])
def test_any_damaged_byte_is_reported(entropy, tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 2, "scheme": "minmax"}, entropy=entropy)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = np.random.default_rng(0)
    places = [*range(0, header, 4 if entropy else 1), *generator.integers(header, len(data), 100)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"a\.ceq"):
            read_weights(path)


def test_a_file_that_is_cut_or_has_more_is_reported(tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 4})
    data = path.read_bytes()
    for end in [*range(20), *range(20, len(data), len(data) // 50), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"a\.ceq"):
            load_model(path)
    path.write_bytes(data + b"0")
    with pytest.raises(UserError, match=r"a\.ceq"):
        load_model(path)


def test_files_of_other_kinds_and_versions_are_reported(tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 4})
    write_changed(path, version="2")
    with pytest.raises(UserError, match=r"a\.ceq: has version '2' of the format, and this program reads version 1"):
        load_model(path)
    save_file({"x": torch.ones(2)}, tmp_path / "b.ceq")
    with pytest.raises(UserError, match=r"b\.ceq: is a safetensors file, but no \.ceq file"):
        load_model(tmp_path / "b.ceq")
    (tmp_path / "a.pt").rename(tmp_path / "c.ceq")
    with pytest.raises(UserError, match=r"c\.ceq: .*no \.ceq file"):
        load_model(tmp_path / "c.ceq")


def _change_recipe(**settings):
    return lambda description: description["config"]["model_args"]["quantize"].update(settings)


def _change_shape(kind, shape):
    def change(description):
        layout = description["quantized"] if kind == "quantized" else description["rest"][kind]
        layout[next(iter(layout))] = shape

    return change


def _repeat_name(description):
    layout = description["rest"]["float32"]
    layout[next(iter(description["quantized"]))] = layout.pop(next(iter(layout)))
    description["rest"]["float32"] = {key: layout[key] for key in sorted(layout, key=list(layout).index)}


STRANGE = {
    "more levels than bits": (_change_recipe(weights=3), "codes has .* values of uint8, and its description has"),
    "bits": (_change_recipe(weights=9), "weights is 9; expected a number of bits, 2 to 8"),
    "no recipe": (lambda d: d["config"]["model_args"].pop("quantize"), "quantize is None"),
    "no arguments": (lambda d: d["config"].pop("model_args"), "quantize is None"),
    "arguments": (lambda d: d["config"].update(model_args=[1]), "model_args"),
    "another scheme": (_change_recipe(scheme="minmax"), "lacks the tensor zero_points"),
    "levels": (_change_recipe(scheme="levels"), "lacks the tensor levels"),
    "another scope": (_change_recipe(scope="tensor"), "scales has .* values of bfloat16, and its description has"),
    "a huge weight": (_change_shape("quantized", [10**9, 10**9]), "codes has .* and its description has"),
    "a huge tensor": (_change_shape("float32", [10**9, 10**9]), "float32 has .* and its description has"),
    "a weight without values": (_change_shape("quantized", [0, 3]), "a quantized weight has no values"),
    "a weight without axes": (_change_shape("quantized", []), "no values, or no axes"),
    "a negative size": (_change_shape("float32", [-4]), "expected"),
    "a size that is no number": (_change_shape("float32", ["4"]), "expected"),
    "many axes": (_change_shape("float32", [1] * 70), "at most 16 items"),
    "another type": (lambda d: d["rest"].update(float99=d["rest"].pop("float32")), "tensors of type 'float99'"),
    "no type": (lambda d: d["rest"].update(complex64=d["rest"].pop("float32")), "tensors of type 'complex64'"),
    "twice": (lambda d: d["rest"].update(float16=d["rest"]["float32"]), "lacks the tensor rest.float16"),
    "nothing quantized": (lambda d: d.update(quantized={}), "quantized"),
    "a list": (lambda d: [d], "expected a mapping"),
    "another model": (lambda d: d["config"].update(model="x"), "no model here"),
    "one name for two": (_repeat_name, "a tensor is described twice"),
}


@pytest.mark.parametrize(("change", "sentence"), STRANGE.values(), ids=STRANGE)
def test_a_description_that_contradicts_the_file_is_reported(change, sentence, tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 4})
    write_changed(path, change)
    with pytest.raises(UserError, match=sentence):
        load_model(path)


def _set(name, value):
    return lambda sections: sections.update({name: value(sections[name])})


STRANGE_TENSORS = {
    "a scale below zero": (_set(SCALES, lambda x: -x), "scales are not finite and above zero"),
    "a scale that is no number": (_set(SCALES, lambda x: x * torch.nan), "scales are not finite and above zero"),
    "a zero point": (_set(ZERO_POINTS, lambda x: x + 99), "a zero point is .*, expected at most 7"),
    "codes of another type": (_set(CODES, lambda x: x.float()), "codes has .* values of float32"),
    "an axis": (_set(CODES, lambda x: x[:, None]), "a tensor has several axes"),
    "no codes": (lambda sections: sections.pop(CODES), "lacks the tensor codes"),
    "no description": (lambda sections: sections.pop(DESCRIPTION), "it has no description"),
    "more": (lambda sections: sections.update(more=torch.ones(1)), "unknown tensors more"),
    "a description that is cut": (_set(DESCRIPTION, lambda x: x[:-9]), "cut short"),
    "a description that is noise": (_set(DESCRIPTION, lambda x: 7 * x), "its description is damaged"),
    "a description that grows": (
        _set(DESCRIPTION, lambda x: torch.frombuffer(bytearray(zlib.compress(bytes(9 << 20))), dtype=torch.uint8)),
        "more than 4194304 bytes",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), STRANGE_TENSORS.values(), ids=STRANGE_TENSORS)
def test_tensors_that_contradict_the_description_are_reported(change, sentence, tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 3, "scheme": "minmax"})
    write_changed(path, None, change)
    with pytest.raises(UserError, match=sentence):
        load_model(path)


STRANGE_CODES = {
    "another number": (_change_shape("quantized", [16, 1, 16, 17]), None, "does not hold the .* bytes"),
    "far more": (_change_shape("quantized", [10**9, 10**9]), None, "compressed ones cannot hold"),
    "noise": (None, _set(CODES + XZ, lambda x: 5 * x), "cannot be read as a checkpoint"),
    "a type": (None, _set(CODES + XZ, lambda x: x.half()), "expected uint8"),
    "more bits": (_change_recipe(weights=3), None, "has the code .*, expected at most 7"),
    "more behind it": (None, _set(CODES + XZ, lambda x: torch.cat([x, x])), "does not hold the .* bytes"),
}


@pytest.mark.parametrize(("description", "sections", "sentence"), STRANGE_CODES.values(), ids=STRANGE_CODES)
def test_compressed_tensors_that_contradict_the_description_are_reported(description, sections, sentence, tmp_path):
    path, *_ = write_packed(tmp_path, {"weights": 4}, entropy=True)
    write_changed(path, description, sections)
    with pytest.raises(UserError, match=sentence):
        load_model(path)
