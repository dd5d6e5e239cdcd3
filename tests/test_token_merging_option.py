"""`--token_merging` of the entry points: a checkpoint that merges nothing, and what it says when told to merge."""

import csv
import json

import numpy as np
import pytest
import torch

import export_onnx
import inference
from audio.dataset import Pack
from audio.io import read_audio
from models import create_model, load_model, save_checkpoint
from run import Runner
from training.labelled import open_labelled
from training.metrics import evaluate_scores

LABELS = [f"tone {index}" for index in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", labels=LABELS, depth=2).eval()
        for parameter in model.parameters():
            parameter.data *= 1.5  # else random weights say 0.5 to everything
        torch.nn.init.normal_(model.outputlayer[1].weight, std=0.5)
        save_checkpoint(folder / "vit.pt", model)
        save_checkpoint(folder / "cnn.pt", create_model("mn01_as", labels=LABELS).eval())
    return folder


def waveforms(pack):
    opened = Pack.open(pack)
    return torch.stack([torch.from_numpy(opened.read(row)) for row in range(len(opened))])


def expected(path, pack, setting):
    """Probabilities (28,7) with another setting of merging."""
    with torch.inference_mode():
        return load_model(path, token_merging=setting).predict(waveforms(pack)).numpy()


def refused(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == (2 if "x" in (arguments[0] if arguments else []) else 1)
    return capsys.readouterr().err


def test_evaluate_merges_as_set(folder, tone_pack, tmp_path, capsys):
    data = open_labelled(str(tone_pack), LABELS, None)
    figures = []
    plain = {"r": 5, "proportional": "false"}  # as Fire has it
    settings = ((None, ""), (5, "_merging_5"), ((4, -1), "_merging_4_-1"), (plain, "_merging_5_plain"))
    for setting, name in settings:
        how = {"output": str(tmp_path), "num_workers": 0, "device": "cpu"}
        Runner().evaluate(str(folder / "vit.pt"), str(tone_pack), token_merging=setting, **how)
        found = json.loads((tmp_path / f"evaluation_tones{name}.json").read_text())
        by_hand = evaluate_scores(expected(folder / "vit.pt", tone_pack, setting), data.multi_hot())
        assert (found["mAP"], found["lwlrap"]) == pytest.approx((by_hand.mAP, by_hand.lwlrap), abs=1e-6)
        figures.append(found["mAP"])
    assert len(set(figures)) == 3  # of two blocks one attends to merged tokens: too few for another order of clips
    text = refused(capsys, Runner().evaluate, str(folder / "cnn.pt"), str(tone_pack), token_merging=5)
    assert "mn01_as has no tokens to merge" in text
    text = refused(capsys, Runner().evaluate, str(folder / "vit.pt"), str(tone_pack), token_merging=-1)
    assert "token_merging is -1; expected" in text


def test_tagging_merges_as_set_and_does_not_add_to_tags_made_otherwise(folder, tone_pack, tmp_path, capsys):
    sounds, tags = tone_pack.parents[2] / "sounds", tmp_path / "tags.csv"
    words = [str(sounds), "-m", str(folder / "vit.pt"), "-k", "7", "--output", str(tags), "--quiet", "--device", "cpu"]
    waves = torch.stack([torch.from_numpy(read_audio(path, 16000)[0]) for path in sorted(sounds.iterdir())])
    for option, setting, other in (("{r: 5, proportional: false}", {"r": 5, "proportional": False}, 5), ("5", 5, 0)):
        inference.main([*words, "--overwrite", "--token_merging", option])
        found = np.zeros((28, 7))
        with open(tags, newline="") as file:
            for row in csv.DictReader(file):
                found[int(row["filename"][-7:-4]), LABELS.index(row["label"])] = float(row["probability"])
        merged, others = (
            load_model(folder / "vit.pt", token_merging=r).predict(waves).numpy() for r in (setting, other)
        )
        np.testing.assert_allclose(found, merged, atol=1e-5)
        assert np.abs(found - others).max() > (1e-4 if other else 5e-3)
    assert "was made with token_merging 5; now it is token_merging None" in refused(capsys, inference.main, words)
    words[2] = str(folder / "cnn.pt")
    text = refused(capsys, inference.main, [*words[:-1], "cpu", "--overwrite", "--token_merging", "5"])
    assert "mn01_as has no tokens to merge" in text
    words[2] = str(folder / "vit.pt")
    setting = "{r: 5, proportional: false}"
    assert "was made with token_merging 5" in refused(capsys, inference.main, [*words, "--token_merging", setting])
    assert "--token_merging is 'x'" in refused(capsys, inference.main, [*words, "--token_merging", "x"])


def test_an_export_merges_as_set_and_its_file_takes_no_other_setting(folder, tone_pack, tmp_path, monkeypatch, capsys):
    exported = []

    def export(model, files, **options):
        exported.append(model)
        files["fp32"].write_bytes(b"")
        return {"fp32": 0.0}

    monkeypatch.setattr(export_onnx, "export_onnx", export)
    words = ["-m", str(folder / "vit.pt"), "--precision", "fp32", "--output", str(tmp_path / "merging.onnx")]
    export_onnx.main([*words, "--token_merging", "5", "--max-frames", "1012"])
    with torch.inference_mode():
        found = exported[0].predict(waveforms(tone_pack)).numpy()
    np.testing.assert_allclose(found, expected(folder / "vit.pt", tone_pack, 5), rtol=1e-5)
    text = refused(
        capsys, inference.main, [str(tone_pack.parents[2] / "sounds"), "-m", "merging.onnx", "--token_merging", "5"]
    )
    assert "give --token_merging to export_onnx.py" in text
    words[1] = str(folder / "cnn.pt")
    assert "mn01_as has no tokens" in refused(capsys, export_onnx.main, [*words, "--token_merging", "5"])
