"""Exported files compute what PyTorch computes, at shapes that the tracer never saw, and say what they are."""

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from common.errors import UserError
from models import attach_head, create_model, load_model, save_checkpoint
from models.audiotransformer import AudioTransformer
from models.headed import Head
from models.labels import AUDIOSET_LABELS, audioset_labels, read_labels
from models.onnx import export_onnx, resize_chunks, write_label_table
from models.onnx_comparison import compare
from tests.models.sounds import noise

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure
LABELS = ["Speech", "Chirp, tweet", 'A "quoted" name', "Ünïcode", "Rain"]


def small(name="audiotransformer_pico", **arguments):
    """A small network that hears differences, as if trained: its norms know spectrograms, its answers spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "audiotransformer_pico":
            arguments = {"depth": 1} | arguments
        model = create_model(name, labels=LABELS, **arguments)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            sounds = torch.stack([noise(8000, seed, 10.0**-seed) for seed in range(4)])
            model.forward_spectrogram(model.front_end(sounds))
        torch.nn.init.normal_(model.get_submodule(model.last_layer).weight, std=0.15)
    return model.eval()


def spectrograms(n_clips, n_frames, n_mels=64):
    """Spectrograms (B,F,T) in decibels, each of another level and tilt."""
    generator = torch.Generator().manual_seed(n_frames)
    tilt = torch.linspace(-1, 1, n_mels) * 30 * torch.randn(n_clips, 1, generator=generator)
    return tilt[:, :, None] + torch.randn(n_clips, n_mels, n_frames, generator=generator) * 15 - 40


def run(path, given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]


def tagged(model, mel):
    with torch.inference_mode():
        return model.probabilities(model.forward_spectrogram(mel)).numpy()


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.fixture(scope="module")
def ced():
    return small(pooling="logit")


@pytest.fixture(scope="module")
def files(ced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    precisions = ("fp32", "fp16", "int8")
    names = {takes: {each: folder / f"{takes}.{each}.onnx" for each in precisions} for takes in ("feats", "waveform")}
    differences = {takes: export_onnx(ced, targets, waveform=takes == "waveform") for takes, targets in names.items()}
    assert len(list(folder.iterdir())) == 6  # no weights beside the graphs, nothing left over
    assert all(each["fp32"] < 1e-5 and each["fp16"] < 2e-3 and each["int8"] < 0.05 for each in differences.values())
    return names


@pytest.mark.parametrize("shape", [(1, 16), (1, 17), (5, 101), (2, 1011), (1, 1012), (1, 1013), (3, 2024), (2, 2500)])
def test_spectrograms_of_any_batch_and_length_get_pytorchs_probabilities(ced, files, shape):
    mel = spectrograms(*shape)
    expected = tagged(ced, mel)
    assert expected.std(0).max() > 0.05 or shape[0] == 1
    np.testing.assert_allclose(run(files["feats"]["fp32"], mel), expected, atol=1e-5)
    np.testing.assert_allclose(run(files["feats"]["fp16"], mel), expected, atol=5e-3)
    np.testing.assert_allclose(run(files["feats"]["int8"], mel), expected, atol=0.1)


def test_fewer_frames_than_a_patch_are_followed_by_silence(ced, files):
    mel = spectrograms(2, 5)
    extended = torch.nn.functional.pad(mel, (0, 11), value=-100.0)
    np.testing.assert_allclose(run(files["feats"]["fp32"], mel), tagged(ced, extended), atol=1e-5)


@pytest.mark.parametrize("n_samples", [1, 255, 2399, 2401, 16001, 161919, 161920, 200001])
@pytest.mark.parametrize("level", [0.0, 1e-5, 0.1, 1.0])
def test_waveforms_of_any_length_and_level_get_pytorchs_probabilities(ced, files, n_samples, level):
    wave = torch.stack([noise(n_samples, seed, level).clamp(-1, 1) for seed in range(2 if n_samples < 20000 else 1)])
    np.testing.assert_allclose(run(files["waveform"]["fp32"], wave), ced.predict(wave).numpy(), atol=1e-5)


def test_a_quiet_clip_does_not_hear_its_loud_neighbour(files):
    quiet, loud = noise(16000, 0, 1e-5), noise(16000, 1, 1.0)
    together = run(files["waveform"]["fp32"], torch.stack([loud, quiet]))
    np.testing.assert_allclose(together[1], run(files["waveform"]["fp32"], quiet[None])[0], atol=1e-5)


def test_five_clips_get_what_each_gets_alone(files):
    waves = torch.stack([noise(8001, seed) for seed in range(5)])
    for precision, margin in (("fp32", 1e-5), ("fp16", 1e-3), ("int8", 0.05)):  # int8: the batch shares a scale
        alone = np.concatenate([run(files["waveform"][precision], wave[None]) for wave in waves])
        np.testing.assert_allclose(run(files["waveform"][precision], waves), alone, atol=margin)


def test_files_are_small_by_precision_and_say_nothing_of_this_machine(files):
    for targets in files.values():
        sizes = {precision: path.stat().st_size for precision, path in targets.items()}
        assert max(sizes["int8"], sizes["fp16"]) < 0.75 * sizes["fp32"]
        for path in targets.values():
            content = path.read_bytes()
            assert str(Path(__file__).parent.parent.parent).encode() not in content
            assert b".py" not in content
            graph = onnx.load(path)
            onnx.checker.check_model(graph, full_check=True)
            assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 18
            assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}  # nothing only one runtime knows


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("takes", ["feats", "waveform"])
def test_inputs_are_free_in_batch_and_length_and_outputs_have_a_static_number_of_classes(files, takes, precision):
    session = onnxruntime.InferenceSession(str(files[takes][precision]), providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, found.name, found.type) == (takes, "tensor(float)", "prob", "tensor(float)")
    assert [size if isinstance(size, int) else None for size in given.shape] == (
        [None, 64, None] if takes == "feats" else [None, None]
    )
    assert found.shape[1] == len(LABELS)
    assert isinstance(found.shape[0], str)


def test_metadata_has_what_a_program_needs(ced, files):
    facts = metadata(files["waveform"]["int8"])
    assert facts["model_type"] == "CED"
    assert facts["version"] == "1.0"
    assert {"model_author", "url", "comment"} < set(facts)
    assert json.loads(facts["labels"]) == LABELS
    assert json.loads(facts["front_end"]) == ced.front_end.description
    assert facts["name"] == "audiotransformer_pico"
    assert [facts[key] for key in ("input", "precision", "activation", "sample_rate", "max_frames")] == [
        "waveform",
        "int8",
        "sigmoid",
        "16000",
        "",
    ]
    assert metadata(files["feats"]["fp16"])["precision"] == "fp16"


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling": "token", "activation": "softmax", "patch_stride": 10, "target_length": 500, "init_values": 0.5},
        {
            "pooling": "dm",
            "eval_avg": "max",
            "n_mels": 40,
            "sample_rate": 8000,
            "f_max": None,
            "hop_size": 80,
            "init_bn": False,
        },
    ],
    ids=["token, softmax, overlapping patches", "dm, 8 kHz"],
)
def test_every_kind_of_transformer_can_be_exported(arguments, tmp_path):
    model = small(**arguments)
    export_onnx(model, {"fp32": tmp_path / "x.onnx"})
    for n_frames in (20, 333, 700, 1500):
        mel = spectrograms(2, n_frames, model.front_end.n_mels)
        expected = tagged(model, mel)
        np.testing.assert_allclose(run(tmp_path / "x.onnx", mel), expected, atol=1e-5)
        if model.activation == "softmax":
            np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)


def test_mobilenet_can_be_exported(tmp_path):
    model = small("mn01_as")
    targets = {precision: tmp_path / f"x.{precision}.onnx" for precision in ("fp32", "int8")}
    differences = export_onnx(model, targets, waveform=True)
    assert differences["fp32"] < 1e-5
    for n_samples in (1, 700, 32001):
        wave = torch.stack([noise(n_samples, seed, 10.0**-seed) for seed in range(3)])
        expected = model.predict(wave).numpy()
        np.testing.assert_allclose(run(targets["fp32"], wave), expected, atol=1e-4)
        np.testing.assert_allclose(run(targets["int8"], wave), expected, atol=0.1)
    assert expected.std(0).max() > 0.05
    facts = metadata(targets["fp32"])
    assert (facts["model_type"], facts["sample_rate"]) == ("MobileNetV3", "32000")
    operators = {node.op_type for node in onnx.load(targets["int8"]).graph.node}
    assert {"Conv", "MatMulInteger"} <= operators
    assert "ConvInteger" not in operators  # slower, and wrong


def with_head(model, **settings):
    """A model with a head that tells sounds apart, as one that was trained on its embeddings."""
    torch.manual_seed(0)
    head = Head(model.embed_dim, 3, labels=["dog, barking", "rain", "sea"], **settings).eval()
    with torch.no_grad():
        sounds = torch.stack([noise(20000, seed, 10.0**-seed) for seed in range(4)])
        embeddings = model.embed(sounds)[0]
        head.mean.copy_(embeddings.mean(0))
        head.scale.copy_(embeddings.std(0).clamp(min=1e-3))
    return attach_head(model, head)


@pytest.mark.parametrize(
    ("name", "arguments", "settings"),
    [
        ("audiotransformer_pico", {"target_length": 248}, {"hidden_sizes": [8]}),
        ("mn01_as", {}, {"activation": "sigmoid"}),
    ],
)
@torch.inference_mode()
def test_a_model_with_a_head_is_exported_with_the_heads_classes(name, arguments, settings, tmp_path):
    model = with_head(small(name, **arguments), **settings)
    assert export_onnx(model, {"fp32": tmp_path / "x.onnx"})["fp32"] < 1e-5
    found = []
    for n_clips, n_frames in ((1, 40), (2, 333), (3, 700)):
        mel = spectrograms(n_clips, n_frames, model.front_end.n_mels)
        expected = model.probabilities(model.head(model.model.embed_spectrogram(mel)[0])).numpy()
        np.testing.assert_allclose(run(tmp_path / "x.onnx", mel), expected, atol=1e-5)
        found.append(expected)
    assert np.concatenate(found).std(0).max() > 0.01
    facts = metadata(tmp_path / "x.onnx")
    assert json.loads(facts["labels"]) == model.labels
    assert facts["activation"] == model.activation
    assert facts["model_type"] == ("MobileNetV3" if name == "mn01_as" else "CED")


def test_a_head_on_chunks_of_another_length_keeps_the_head():
    model = with_head(small(target_length=248))
    other = resize_chunks(model, 96)
    assert other.model.target_length == 96
    assert other.labels == model.labels
    clip = noise(16000 * 3)[None]
    assert (other.predict(clip) - model.predict(clip)).abs().max() > 1e-5
    padded = with_head(small())
    padded.head.padded = True
    with pytest.raises(UserError, match="trained on clips filled up with zeros"):
        export_onnx(padded, {"fp32": "x.onnx"})


def test_the_model_stays_as_it_was(ced, files):
    assert next(ced.parameters()).dtype == torch.float32
    model = small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    resize_chunks(model, 300)
    assert model.training
    assert model.target_length == 1012
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_chunks_of_another_length_stretch_the_time_positions_as_published(ced, tmp_path, caplog):
    save_checkpoint(tmp_path / "ced.pt", ced)
    with caplog.at_level(logging.WARNING):
        longer = resize_chunks(ced, 3000)
    assert "1012" in caplog.text
    assert "3000" in caplog.text
    assert longer.labels == LABELS
    mel = spectrograms(1, 2900)
    expected = tagged(load_model(tmp_path / "ced.pt", target_length=3000), mel)
    np.testing.assert_array_equal(tagged(longer, mel), expected)
    assert resize_chunks(ced, 1012) is ced
    mobile = small("mn01_as")
    assert resize_chunks(mobile, 3000) is mobile
    with pytest.raises(UserError, match="must hold a patch of 16"):
        resize_chunks(ced, 8)


class Branching(AudioTransformer):
    """Looks at values where a tracer cannot follow."""

    def forward_export(self, mel):
        return super().forward_export(-mel if mel.mean() > 0 else mel)


class Frozen(AudioTransformer):
    """Keeps a length of the tracer's example in its graph."""

    def forward_export(self, mel):
        found = super().forward_export(mel)
        return found + torch.tensor(float(mel.shape[2] > 500))


@pytest.mark.parametrize("kind", [Branching, Frozen])
def test_an_export_that_differs_is_refused_and_leaves_no_file(kind, tmp_path):
    model = kind(num_classes=3, embed_dim=64, num_heads=1, depth=1).eval()
    with pytest.raises(UserError, match="forward_export"):
        export_onnx(model, {"int8": tmp_path / "a.onnx", "fp32": tmp_path / "b.onnx"})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=[0.0, -6.0], ids=["random", "rare classes"])
def eight_bit(request, tmp_path_factory):
    """A model and its file in eight bits; what few clips hold is far less probable than the tolerance."""
    path = tmp_path_factory.mktemp("eight") / "x.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=4, depth=1).eval()
    torch.nn.init.constant_(model.outputlayer[1].bias, request.param)
    export_onnx(model, {"int8": path}, waveform=True)
    return model, path


@pytest.mark.parametrize("fault", ["zero", "deaf", "other order"])
def test_eight_bits_do_not_excuse_a_graph_that_computes_something_else(fault, eight_bit, tmp_path):
    model, path = eight_bit
    graph = onnx.load(path)
    last = next(node for node in graph.graph.node if "prob" in node.output)
    last.output[0] = "right"
    if fault == "other order":
        added = onnx.helper.make_node("Gather", ["right", "wrong"], ["prob"], axis=1)
        constant = np.roll(np.arange(model.num_classes), 1)
    else:
        added = onnx.helper.make_node("Mul" if fault == "zero" else "Min", ["right", "wrong"], ["prob"])
        constant = np.float32(0 if fault == "zero" else 1e-3)
    graph.graph.node.append(added)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constant), "wrong"))
    onnx.save(graph, tmp_path / "wrong.onnx")
    assert compare(path, model, "waveform", "int8", "right.onnx") < 0.05
    with pytest.raises(UserError, match=r"wrong\.onnx: its (log-odds|probabilities)"):
        compare(tmp_path / "wrong.onnx", model, "waveform", "int8", "wrong.onnx")


def test_the_label_table_is_read_back_and_quotes_every_name(tmp_path):
    write_label_table(tmp_path / "own.csv", LABELS)
    assert read_labels(tmp_path / "own.csv") == LABELS
    lines = (tmp_path / "own.csv").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["index,mid,display_name", '0,/m/09x0r,"Speech"', '1,/m/07pggtn,"Chirp, tweet"']
    assert lines[4] == '3,/own/3,"Ünïcode"'
    write_label_table(tmp_path / "audioset.csv", audioset_labels())
    assert (tmp_path / "audioset.csv").read_text() == AUDIOSET_LABELS.read_text()


@pytest.mark.parametrize(
    ("name", "arguments", "waveform"),
    [
        ("audiotransformer_pico", {"pooling": "logit", "target_length": 200}, False),
        ("passt_pico", {"target_length": 100, "token_merging": {"r": 8, "proportional": False}}, False),
        pytest.param("ast_pico", {"target_length": 128}, True, marks=pytest.mark.long),
        pytest.param("passt_pico", {"target_length": 250}, True, marks=pytest.mark.long),
    ],
)
def test_networks_that_merge_tokens_can_be_exported(name, arguments, waveform, tmp_path):
    """Compared on several lengths and batches before it is written; here, too, on some more."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, depth=2, **{"token_merging": 8} | arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    targets = {"fp32": tmp_path / "a.onnx", "int8": tmp_path / "b.onnx", "fp16": tmp_path / "c.onnx"}
    export_onnx(model, targets, waveform=waveform)
    session = onnxruntime.InferenceSession(str(targets["fp32"]))
    unmerged = create_model(name, num_classes=5, depth=2, **arguments | {"token_merging": 0}).eval()
    unmerged.load_state_dict(model.state_dict())
    for n_clips, seconds in ((3, 0.6), (1, 4.2)):
        wave = torch.stack([noise(round(seconds * model.sample_rate), seed, 0.2) for seed in range(n_clips)])
        given = wave if waveform else model.front_end(wave)
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        error = np.abs(found - model.predict(wave).numpy()).max()
        assert error < 0.1 * np.abs(found - unmerged.predict(wave).numpy()).max()


@pytest.mark.parametrize(("name", "positions"), [("ast_pico", "pos_embed"), ("passt_pico", "time_new_pos_embed")])
def test_other_transformers_can_be_exported_for_chunks_of_another_length(name, positions, tmp_path, caplog):
    model = small(name, depth=1, target_length=96)
    longer = resize_chunks(model, 144)
    assert longer.target_length == 144
    assert positions in caplog.text
    assert export_onnx(longer, {"fp32": tmp_path / "x.onnx"})["fp32"] < 1e-4
    assert metadata(tmp_path / "x.onnx")["model_type"] == type(model).__name__
    assert metadata(tmp_path / "x.onnx")["model_author"]
