"""Exported files where they are used: ONNX Runtime alone, sherpa-onnx, and the two programs with foreign features.

The network is a trained one (tests/trained.py): its probabilities are confident, and what it hears is really there.
"""

import json
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch

import onnx_inference_with_torchaudio
from common.errors import UserError
from models import audioset_labels
from models.onnx import export_onnx, resize_chunks, write_label_table
from tagging.engines import MAX_THREADS
from tagging.mel_files import open_for_features, tag_chunks
from tagging.onnx_engine import OnnxEngine
from tests.trained import LABELS, RATE, trained_tagger, unheard
from training.metrics import evaluate_scores

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of the trained network's files: as published for sherpa-onnx (30 s, mel in), and with its front-end."""
    folder = tmp_path_factory.mktemp("trained")
    model = trained_tagger()
    longer = resize_chunks(model, 3000)
    export_onnx(longer, {"fp32": folder / "model.onnx", "int8": folder / "model.int8.onnx"})
    export_onnx(model, {"fp32": folder / "wave.onnx", "int8": folder / "wave.int8.onnx"}, waveform=True)
    write_label_table(folder / "class_labels_indices.csv", model.labels)
    return folder


def predict(model, clip):
    return model.predict(torch.from_numpy(clip)[None])[0].numpy()


def with_sherpa(sherpa_onnx, folder, clip, name="model.onnx"):
    """Probabilities (C,) from sherpa-onnx, by the names that it gives the classes."""
    config = sherpa_onnx.AudioTaggingConfig(
        model=sherpa_onnx.AudioTaggingModelConfig(ced=str(folder / name), num_threads=1),
        labels=str(folder / "class_labels_indices.csv"),
        top_k=len(LABELS),
    )
    tagging = sherpa_onnx.AudioTagging(config)
    stream = tagging.create_stream()
    stream.accept_waveform(RATE, clip)
    events = tagging.compute(stream)
    assert all(event.name == LABELS[event.index].replace('"', '""') for event in events)
    return np.array([event.prob for event in sorted(events, key=lambda event: event.index)])


@pytest.mark.parametrize("seconds", [5.0, 7.3, 12.0, 29.0])
def test_sherpa_onnx_tags_as_pytorch_does(exported, seconds):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    model = resize_chunks(trained_tagger(), 3000)
    clips, targets = unheard(9, seconds)
    expected = np.stack([predict(model, clip) for clip in clips])
    found = np.stack([with_sherpa(sherpa_onnx, exported, clip) for clip in clips])
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.mean((expected > 0.5) == (targets == 1)) > 0.95  # a network that knows
    for one, other, target in zip(found, expected, targets, strict=True):
        if target.sum() == 3:
            assert set(np.argsort(-one)[:3]) == set(np.argsort(-other)[:3]) == set(np.flatnonzero(target))


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 5.0, 31.0])
def test_the_program_with_kaldi_features_gives_what_sherpa_onnx_gives(exported, seconds, name, tmp_path):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    pytest.importorskip("kaldi_native_fbank")
    from onnx_inference_with_kaldi import kaldi_features

    engine = open_for_features(exported / name)
    for index, clip in enumerate(unheard(3, seconds)[0]):
        soundfile.write(tmp_path / f"{index}.wav", clip, RATE, subtype="FLOAT")
        ((start, end, found),) = tag_chunks(engine, kaldi_features, tmp_path / f"{index}.wav", 60.0)
        assert (start, end) == (0, pytest.approx(seconds))
        np.testing.assert_allclose(found, with_sherpa(sherpa_onnx, exported, clip, name), atol=1e-3)


def test_a_clip_without_a_whole_frame_is_tagged_with_kaldi_features(exported, tmp_path):
    pytest.importorskip("kaldi_native_fbank")
    from onnx_inference_with_kaldi import kaldi_features

    soundfile.write(tmp_path / "tick.wav", np.full(5, 0.1), RATE)
    ((_, _, found),) = tag_chunks(
        open_for_features(exported / "model.onnx"), kaldi_features, tmp_path / "tick.wav", 5.0
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("seconds", [0.01, 0.5, 3.0, 31.0])
def test_the_program_with_torchaudio_features_gives_what_pytorch_gives(exported, seconds, tmp_path):
    model = resize_chunks(trained_tagger(), 3000)
    engine = open_for_features(exported / "model.onnx")
    clip = unheard(2, seconds)[0][1]
    soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
    features = onnx_inference_with_torchaudio.torchaudio_features
    ((_, _, found),) = tag_chunks(engine, features, tmp_path / "a.wav", 60.0)
    np.testing.assert_allclose(found, predict(model, clip), atol=1e-4)


@pytest.mark.parametrize("program", ["onnx_inference_with_kaldi", "onnx_inference_with_torchaudio"])
def test_the_programs_print_the_best_labels_of_every_chunk(exported, program, tmp_path, capsys):
    if program.endswith("kaldi"):
        pytest.importorskip("kaldi_native_fbank")
    clips, targets = unheard(3, 5.0)
    paths = [tmp_path / "one.wav", tmp_path / "two.flac"]
    soundfile.write(paths[0], np.concatenate([clips[0], clips[1], clips[2][:RATE]]), RATE)
    soundfile.write(paths[1], np.repeat(clips[2], 3), 3 * RATE)
    module = __import__(program)
    module.main([*map(str, paths), "-m", str(exported / "model.onnx"), "--chunk", "5", "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == list(map(str, paths))
    assert [line[:23] for line in lines[1:4]] == [
        f"  [{a:6.1f} - {b:6.1f} s]  " for a, b in ((0, 5), (5, 10), (10, 11))
    ]
    for line, target in ((lines[1], targets[0]), (lines[2], targets[1]), (lines[5], targets[2])):
        present = [name for name, here in zip(LABELS, target, strict=True) if here]
        assert any(line[23:].startswith(f"{name} 0.") or line[23:].startswith(f"{name} 1.") for name in present)
        assert line[23:].count(" 0.") + line[23:].count(" 1.") == 2
    for wrong, sentence in ((exported / "wave.onnx", "without --waveform"), (tmp_path / "absent.onnx", "no such file")):
        with pytest.raises(SystemExit):
            module.main([str(paths[0]), "-m", str(wrong)])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("program", ["onnx_inference_with_kaldi", "onnx_inference_with_torchaudio"])
def test_unreadable_files_are_listed_at_the_end_and_the_others_are_tagged(exported, program, tmp_path, capsys):
    if program.endswith("kaldi"):
        pytest.importorskip("kaldi_native_fbank")
    (tmp_path / "a.wav").write_text("words")
    (tmp_path / "b.flac").write_text("")
    soundfile.write(tmp_path / "c.wav", unheard(1, 1.0)[0][0], RATE)
    with pytest.raises(SystemExit) as status:
        __import__(program).main([str(tmp_path), "-m", str(exported / "model.onnx")])
    assert status.value.code == 1
    lines = capsys.readouterr()
    assert re.search(r"c\.wav\n  \[   0\.0 -    1\.0 s\]  \w+", lines.out)
    assert "2 of 3 sound files could not be tagged" in lines.err
    assert f"{tmp_path / 'a.wav'}: cannot be decoded" in lines.err
    assert f"{tmp_path / 'b.flac'}: the file is empty" in lines.err


def test_long_files_are_tagged_block_by_block(exported, tmp_path, monkeypatch):
    clip = np.tile(unheard(1, 1.0)[0][0], 40)
    soundfile.write(tmp_path / "a.wav", clip, RATE)
    n_read = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, out: n_read.append(len(out)) or read(file, out=out))
    features = onnx_inference_with_torchaudio.torchaudio_features
    chunks = tag_chunks(open_for_features(exported / "model.onnx"), features, tmp_path / "a.wav", 2.0)
    assert next(chunks)[:2] == (0, 2)
    assert len(n_read) == 2  # of four blocks, one ahead: the rest is still in the file
    assert [end for _, end, _ in chunks] == list(range(4, 42, 2))


SINGLE_PROCESS = """
import json, sys
import numpy, onnxruntime, soundfile
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
waveform, rate = soundfile.read(sys.argv[2], dtype="float32")
assert rate == int(facts["sample_rate"]) and facts["input"] == "waveform"
probabilities = session.run(None, {"waveform": waveform[None]})[0][0]
print(json.dumps(dict(zip(json.loads(facts["labels"]), probabilities.tolist()))))
"""


def test_onnx_runtime_alone_tags_a_sound_file(exported, tmp_path):
    clip = unheard(3, 4.0)[0][2]
    soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
    words = [sys.executable, "-c", SINGLE_PROCESS, exported / "wave.onnx", tmp_path / "a.wav"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert list(found) == LABELS
    np.testing.assert_allclose(list(found.values()), predict(trained_tagger(), clip), atol=1e-5)


def test_the_engine_tags_waveforms_without_pytorch(exported, tmp_path):
    program = (
        "import sys; import numpy; from tagging.onnx_engine import OnnxEngine\n"
        f"engine = OnnxEngine({str(exported / 'wave.int8.onnx')!r}); engine.predict([numpy.zeros(800, 'f4')])\n"
        "assert not {'torch', 'onnx'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_eight_bits_cost_less_than_half_a_point_of_map(exported):
    clips, targets = unheard(200, 1.5, noise=0.25)  # so noisy that the network errs
    scores = {name: OnnxEngine(exported / f"{name}.onnx").predict(clips) for name in ("wave", "wave.int8")}
    full, eight_bit = (evaluate_scores(each, targets).mAP for each in scores.values())
    print(f"mAP {full:.4f} in float32, {eight_bit:.4f} in 8 bits")
    assert 0.7 < full < 0.99
    assert full - eight_bit <= 0.005


@pytest.mark.parametrize("name", ["model.onnx", "wave.onnx"])
def test_the_engine_gives_clips_of_mixed_lengths_what_pytorch_gives_them(exported, name):
    model = trained_tagger() if name == "wave.onnx" else resize_chunks(trained_tagger(), 3000)
    engine = OnnxEngine(exported / name)
    assert (engine.name, engine.sample_rate, engine.labels) == ("audiotransformer_pico", RATE, LABELS)
    assert (engine.max_samples, engine.precision) == (None, "fp32")
    clips = [unheard(3, seconds)[0][2] for seconds in (1.0, 0.001, 12.0, 1.0, 0.3)]
    found = engine.predict(clips)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [predict(model, clip) for clip in clips], atol=1e-5)


def test_several_threads_may_call_one_engine(exported):
    engine = OnnxEngine(exported / "wave.onnx", n_threads=4)
    clips = unheard(24, 1.0)[0]
    expected = engine.predict(clips)
    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(lambda clip: engine.predict([clip]), clips)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["model.int8.onnx", "wave.int8.onnx"])
def test_in_eight_bits_a_clip_depends_on_itself_alone(exported, name):
    engine = OnnxEngine(exported / name)
    assert engine.batch_size == 1
    clips = [np.float32(level) * clip for level, clip in zip((1.0, 0.01, 0.3), unheard(3, 1.0)[0], strict=True)]
    alone = np.concatenate([engine.predict([clip]) for clip in clips])
    np.testing.assert_array_equal(engine.predict(clips), alone)
    np.testing.assert_array_equal(engine.predict(clips[::-1]), alone[::-1])


def test_with_many_cores_few_threads_call_and_each_has_several(exported, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "32")
    engine = OnnxEngine(exported / "wave.onnx")
    assert engine.n_threads == MAX_THREADS == 8
    assert engine.session.get_session_options().intra_op_num_threads == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert OnnxEngine(exported / "wave.onnx").n_threads == 2


def published(path, n_classes, metadata):
    """Write a file with no more than published exports have: a name for the input, one word of metadata."""
    tensor, helper = onnx.numpy_helper.from_array, onnx.helper
    weights = np.random.default_rng(0).standard_normal((64, n_classes)).astype(np.float32)
    nodes = [
        helper.make_node("Slice", ["feats", "start", "end", "axis"], ["cut"]),
        helper.make_node("ReduceMean", ["cut"], ["mean"], axes=[2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["prob"]),
    ]
    constants = [tensor(np.array([value]), name) for value, name in ((0, "start"), (9, "end"), (2, "axis"))]
    graph = helper.make_graph(
        nodes,
        "published",
        [helper.make_tensor_value_info("feats", onnx.TensorProto.FLOAT, ["batch_size", 64, "time_dim"])],
        [helper.make_tensor_value_info("prob", onnx.TensorProto.FLOAT, ["batch_size", n_classes])],
        [*constants, tensor(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_published_exports_are_taken_with_audiosets_labels_and_their_bound(tmp_path):
    engine = OnnxEngine(published(tmp_path / "ced_tiny.onnx", 527, {"model_type": "CED"}))
    assert (engine.name, engine.sample_rate, engine.labels) == ("ced_tiny", 16000, audioset_labels())
    assert engine.max_samples == 1012 * 160 - 1
    assert engine.predict([np.zeros(engine.max_samples, np.float32)]).shape == (1, 527)
    with pytest.raises(UserError, match=r"1 to 161919 samples .*not 161920: cut them"):
        engine.predict([np.zeros(engine.max_samples + 1, np.float32)])
    with pytest.raises(UserError, match="has no samples"):
        engine.predict([np.zeros(0, np.float32)])
    with pytest.raises(UserError, match="clips 1 of the batch hold NaN"):
        engine.predict([np.zeros(800, np.float32), np.full(800, np.nan, np.float32)])
    assert OnnxEngine(published(tmp_path / "own.onnx", 3, {"model_type": "CED"})).labels == ["0", "1", "2"]


def test_other_files_are_refused_with_a_sentence(tmp_path, exported):
    with pytest.raises(UserError, match=r"export_onnx.py has not written: found inputs feats"):
        OnnxEngine(published(tmp_path / "foreign.onnx", 3, {}))
    (tmp_path / "text.onnx").write_text("these are words")
    with pytest.raises(UserError, match=r"text.onnx: ONNX Runtime cannot read it"):
        OnnxEngine(tmp_path / "text.onnx")
    (tmp_path / "cut.onnx").write_bytes((exported / "wave.onnx").read_bytes()[:-2000])
    with pytest.raises(UserError, match="is the file whole"):
        OnnxEngine(tmp_path / "cut.onnx")
    graph = onnx.load(exported / "wave.onnx")
    next(entry for entry in graph.metadata_props if entry.key == "labels").value = '["one"]'
    onnx.save(graph, tmp_path / "labels.onnx")
    with pytest.raises(UserError, match="1 labels were given for 6 classes"):
        OnnxEngine(tmp_path / "labels.onnx")
    with pytest.raises(UserError, match="takes waveforms"):
        OnnxEngine(exported / "wave.onnx").predict_spectrogram(np.zeros((1, 64, 100), np.float32))
