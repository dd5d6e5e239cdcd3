import json
import logging
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_onnx
from models import create_model, load_model, save_checkpoint
from models.huggingface import write_huggingface
from models.labels import read_labels
from models.onnx import write_label_table
from run import Runner
from tagging.onnx_engine import OnnxEngine
from tests.conftest import run_command
from tests.models.sounds import noise
from training.labelled import open_labelled
from training.metrics import evaluate_scores

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure
LABELS = [f"tone {index}" for index in range(7)]


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", labels=LABELS, depth=1).eval()
        torch.nn.init.normal_(model.outputlayer[1].weight, std=0.2)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    path = tmp_path / "run" / "best.pt"
    save_checkpoint(path, model)
    return path


def test_the_published_command_writes_both_files_and_the_label_table(checkpoint, tmp_path):
    # As scripts of sherpa-onnx call it, but for the weights, which are fetched there.
    command = ("-m", "audiotransformer_pico", "--weights", checkpoint, "--max-frames", "1012")
    done = run_command(Path(export_onnx.__file__), *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not re.search("(?i)warning|quantiz|initializer", done.stderr)  # nothing of the libraries' own steps
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run", "audiotransformer_pico.onnx", "audiotransformer_pico.int8.onnx", "class_labels_indices.csv"}
    assert read_labels(tmp_path / "class_labels_indices.csv") == LABELS
    message = done.stdout.splitlines()
    assert re.match(r"audiotransformer_pico.onnx: \d.\d\d MB, up to \S+ from PyTorch", message[0])
    assert message[2] == "class_labels_indices.csv: 7 labels"
    session = onnxruntime.InferenceSession(tmp_path / "audiotransformer_pico.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["feats"]
    assert session.get_modelmeta().custom_metadata_map["model_type"] == "CED"


def test_calibration_tells_what_every_precision_costs(checkpoint, model, tone_pack, tmp_path, capsys):
    export_onnx.main(
        f"-m {checkpoint.parent} --waveform --precision fp32,int8 --calibrate {tone_pack} "
        f"--output {tmp_path / 'out' / 'own.onnx'} --labels_output {tmp_path / 'names.csv'}".split()
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["own.int8.onnx", "own.onnx"]
    assert read_labels(tmp_path / "names.csv") == LABELS
    message = capsys.readouterr().out
    data = open_labelled(str(tone_pack), LABELS, None)
    waves = torch.stack([torch.from_numpy(data.pack.read(row)) for row in range(len(data.pack))])
    expected = evaluate_scores(model.predict(waves).numpy(), data.multi_hot()).mAP
    assert re.search(rf"^PyTorch fp32 +{expected:.4f} ", message, re.MULTILINE)
    assert re.search(rf"^fp32 +{expected:.4f} +-?0.00 +\d.\d\d +\d+.\d$", message, re.MULTILINE)
    eight_bit = re.search(r"^int8 +(\d.\d+) +(-?\d+.\d\d) ", message, re.MULTILINE)
    assert float(eight_bit[2]) == pytest.approx(100 * (expected - float(eight_bit[1])), abs=0.02)

    figures = []
    for source in (checkpoint, tmp_path / "out" / "own.onnx"):
        Runner().evaluate(str(source), str(tone_pack), num_workers=0, device="cpu", output=str(tmp_path / source.stem))
        (written,) = (tmp_path / source.stem).glob("*.json")
        figures.append(json.loads(written.read_text()))
    assert figures[0]["mAP"] == pytest.approx(expected, abs=1e-6)
    classes = [each.pop("per_class") for each in figures]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
    for one, other in zip(*classes, strict=True):
        assert one.pop("label") == other.pop("label")
        assert one == pytest.approx(other, abs=1e-4)


def test_hugging_face_folders_and_longer_chunks_and_one_name_for_one_file(model, tmp_path, caplog):
    write_huggingface(tmp_path / "hf", model)
    target = tmp_path / "half.onnx"
    with caplog.at_level(logging.WARNING, "models"):
        export_onnx.main(
            ["-m", str(tmp_path / "hf"), "--max_frames", "1500", "--precision", "fp16", "--output", str(target)]
        )
    assert "1012" in caplog.text
    assert "1500" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "half.onnx", "class_labels_indices.csv"}
    wave = noise(14 * 16000)
    expected = load_model(tmp_path / "hf", target_length=1500).predict(wave[None]).numpy()
    engine = OnnxEngine(target)
    assert engine.precision == "fp16"
    np.testing.assert_allclose(engine.predict([wave.numpy()]), expected, atol=5e-3)
    assert onnx.load(target).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-m", "ced_minni"], "ced_mini"),
        (["-m", "{checkpoint}", "--calibrate", "absent.tsv"], "absent.tsv"),
        (["-m", "{checkpoint}", "--max-frames", "3"], "must hold a patch of 16"),
    ],
)
def test_faults_are_sentences_and_nothing_is_written(words, sentence, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        export_onnx.main([word.format(checkpoint=checkpoint) for word in words])
    assert status.value.code == 1
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_labels_of_another_model_are_not_overwritten(checkpoint, tmp_path, capsys):
    table, words = tmp_path / "class_labels_indices.csv", ["-m", str(checkpoint), "--precision", "fp32", "--output"]
    table.write_text("index,mid,display_name\n0,/own/0,other\n")
    with pytest.raises(SystemExit):
        export_onnx.main([*words, str(tmp_path / "second.onnx")])
    assert "--labels-output" in capsys.readouterr().err
    assert "other" in table.read_text()
    assert not (tmp_path / "second.onnx").exists()
    write_label_table(table, LABELS)
    export_onnx.main([*words, str(tmp_path / "second.onnx")])  # the same labels
    assert (tmp_path / "second.onnx").exists()


@pytest.mark.parametrize("words", [["--precision", "int4"], ["--output", "model.pt"], ["--max-frames", "0"]])
def test_impossible_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as status:
        export_onnx.main(words)
    assert status.value.code == 2
    assert words[1] in capsys.readouterr().err
