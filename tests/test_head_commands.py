"""`--head NAME` wherever there is `-m MODEL`: a head that `run.py probe` trained is evaluated, exported and teaches."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import export_onnx
import inference
from audio.dataset import Pack
from audio.io import resample
from distill.targets import SoftTargetStore
from models import create_model, load_head, load_model, load_tagger, save_checkpoint
from models.headed import Head
from models.heads import save_head
from run import Runner
from save_logits import save_logits
from training.evaluate import predict_pack
from training.metrics import evaluate_scores
from training.precision import Precision

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure
LABELS = [f"tone {index}" for index in range(7)]
CHUNK = 0.3  # seconds; clips of a second have three of these, and a tenth of a second


@pytest.fixture(scope="module")
def lists(tone_pack):
    """Half of the tones to learn from, and half to be judged by."""
    table = pd.read_csv(tone_pack, sep="\t", dtype=str).sort_values("filename")
    for name, rows in {"head_train": slice(14), "head_test": slice(14, None)}.items():
        table[rows].to_csv(tone_pack.parent / f"{name}.tsv", sep="\t", index=False)
    return {part: str(tone_pack.parent / f"head_{part}.tsv") for part in ("train", "test")}


@pytest.fixture(scope="module")
def work(lists, tmp_path_factory):
    """A folder with a checkpoint that embeds, and with the head "tones" on it."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        torch.manual_seed(0)
        model = create_model("mn01_as", num_classes=0)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        sounds = [Pack.open(lists["train"]).read(row) for row in range(14)]
        with torch.no_grad():  # embeddings that differ from clip to clip by more than rounding
            model.train()(torch.stack([torch.from_numpy(resample(sound, 16000, 32000)) for sound in sounds]))
        save_checkpoint("embeds.pt", model)
        data = {"train_data": lists["train"], "test_data": lists["test"], "valid_fraction": 0.0}
        options = {"epochs": 15, "lr": 3e-3, "num_workers": 0, "device": "cpu", "chunk_length": CHUNK}
        Runner().probe("embeds.pt", name="tones", **data, **options)
    return folder


@pytest.fixture(autouse=True)
def _there(work, monkeypatch):
    monkeypatch.chdir(work)


def refused(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == 1
    return capsys.readouterr().err


@torch.inference_mode()
def slow_scores(manifest):
    """Clip by clip and chunk by chunk: embeddings, their mean by length, the head, the softmax; and the classes."""
    pack, model, head = Pack.open(manifest), load_model("embeds.pt"), load_head("tones")
    size, scores = round(CHUNK * pack.sample_rate), []
    for row in range(len(pack)):
        clip = pack.read(row)
        chunks = [clip[start : start + size] for start in range(0, len(clip), size)]
        waves = [torch.from_numpy(resample(chunk, pack.sample_rate, model.sample_rate)) for chunk in chunks]
        embeddings = [model.embed(wave[None])[0].half().float() for wave in waves]
        total = sum(embedding * len(chunk) for embedding, chunk in zip(embeddings, chunks, strict=True))
        scores.append(head(total / len(clip)).softmax(1)[0].numpy())
    return np.stack(scores), pack


def test_evaluation_gives_the_figures_that_the_probe_reported(lists):
    Runner().evaluate("embeds.pt", lists["test"], head="tones", num_workers=0, device="cpu", batch_size=5)
    found = json.loads(Path("evaluation_head_test_head_tones.json").read_text())
    reported = json.loads(Path("heads/tones.json").read_text())
    assert 0.2 < found["top1"] < 1
    assert found["top1"] == reported["value"]
    for name, value in reported["figures"].items():
        assert found[name] == pytest.approx(value, abs=1e-3), name
    scores, pack = slow_scores(lists["test"])
    classes = np.array([LABELS.index(label) for label in pack.table["labels"]])
    assert found["mAP"] == pytest.approx(evaluate_scores(scores, classes, LABELS).mAP, abs=1e-9)


def test_a_clip_gets_the_mean_of_its_chunks_in_whatever_batch(lists):
    scores, pack = slow_scores(lists["test"])
    tagger = load_tagger("embeds.pt", head="tones")
    for batch_size in (1, 7):
        how = {"batch_size": batch_size, "num_workers": 0, "precision": Precision("fp32", torch.device("cpu"))}
        np.testing.assert_allclose(predict_pack(tagger, pack, **how), scores, atol=1e-5)
    whole = np.stack(
        [
            tagger.predict(torch.from_numpy(resample(pack.read(row), 16000, 32000))[None])[0].numpy()
            for row in range(len(pack))
        ]
    )
    assert np.abs(whole - scores).max() > 1e-3  # it matters


def test_an_exported_head_tags_as_the_model_with_it_does(lists, tone_pack, tmp_path, capsys):
    words = ["--waveform", "--precision", "fp32", "--output", str(tmp_path / "tones.onnx")]
    export_onnx.main(["-m", "embeds.pt", "--head", "tones", *words, "--calibrate", lists["test"]])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.removeprefix("PyTorch ").split() for line in lines if line.startswith(("PyTorch fp32", "fp32 "))]
    values = [float(row[1]) for row in rows]
    found = []
    for number, model in enumerate((["-m", str(tmp_path / "tones.onnx")], ["-m", "embeds.pt", "--head", "tones"])):
        target = tmp_path / f"{number}.csv"
        inference.main([str(tone_pack.parents[2] / "sounds"), *model, "-k", "7", "--quiet", "--output", str(target)])
        with open(target, newline="") as file:
            found.append({(row["filename"], row["label"]): float(row["probability"]) for row in csv.DictReader(file)})
    assert len(found[0]) == 28 * 7
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert {label for _, label in found[0]} == set(LABELS)
    assert len(values) >= 2


def write_config(path, lists, **changes):
    settings = {"train_data": lists["train"], "epochs": 1, "batch_size": 8, "num_workers": 0, "device": "cpu"}
    settings |= {"wavtransforms": {}, "spectransforms": [], "topk": 7, "outputpath": "logits"} | changes
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@torch.inference_mode()
def test_outputs_of_a_head_are_stored_and_belong_to_its_weights(lists, tmp_path, capsys):
    config = write_config(tmp_path / "targets.yaml", lists)
    save_logits(config, m="embeds.pt", head="tones")
    store = SoftTargetStore("logits/mn01_as+tones/head_train/chunk_10")
    assert (store.labels, store.meta["activation"]) == (LABELS, "softmax")
    pack, model, head = Pack.open(lists["train"]), load_model("embeds.pt"), load_head("tones")
    arrays, rows = store.read_arrays(1), store.read_rows(1)
    for row, name in enumerate(rows["filename"]):
        wave = torch.from_numpy(resample(pack.read(pack.names.index(name)), 16000, 32000))[None]
        expected = head(model.embed(wave)[0]).softmax(1)[0].numpy()
        found = np.zeros(7)
        found[arrays["topk_indexes"][row]] = arrays["topk_values"][row]
        np.testing.assert_allclose(found, expected, atol=2e-3)
    save_logits(config, m="embeds.pt", head="heads/tones.pt")  # the same head, by its path
    before = load_head("tones")
    try:
        with torch.no_grad():
            head.layers[0].bias[0] += 0.1
        save_head("heads/tones.pt", head)
        text = refused(capsys, save_logits, config, m="embeds.pt", head="tones")
        assert "has soft targets made with another teacher" in text
    finally:
        save_head("heads/tones.pt", before)


def test_wrong_use_ends_with_a_message(lists, tmp_path, capsys):
    save_head("heads/wide.pt", Head(961, 2))
    test = {"test_data": lists["test"], "num_workers": 0, "device": "cpu"}
    for words, sentence in (
        ({"experiment": "embeds.pt", "head": "tone"}, "no head is called 'tone' (did you mean 'tones'?)"),
        (
            {"experiment": "embeds.pt", "head": "wide"},
            "the head takes embeddings of width 961, those of 'mn01_as' have 96",
        ),
        ({"experiment": "tagger.onnx", "head": "tones"}, "tagger.onnx has no embeddings for --head"),
        ({"experiment": "embeds.pt", "hed": "tones"}, "unknown option --hed (did you mean 'head'?)"),
    ):
        assert sentence in refused(capsys, Runner().evaluate, **words, **test)
    text = refused(capsys, export_onnx.main, ["-m", "embeds.pt", "--output", str(tmp_path / "x.onnx")])
    assert "embeds.pt: mn01_as only embeds and has no classes" in text
    config = write_config(tmp_path / "targets.yaml", lists)
    text = refused(capsys, save_logits, config, model=["embeds.pt", "embeds.pt"], head="tones")
    assert "number of heads: 1, of models: 2; give a list with a head for each model, in order, null" in text
    text = refused(capsys, save_logits, config, m="embeds.pt", head=["tones", None])
    assert "number of heads: 2, of models: 1" in text
    text = refused(capsys, save_logits, config, m="embeds.pt", head="tones", targets="embeddings")
    assert "head is for probabilities" in text
    train = tmp_path / "train.yaml"
    train.write_text(yaml.safe_dump({"train_data": lists["train"], "model": "audiotransformer_pico"}))
    text = refused(capsys, Runner().train, str(train), head="tones")
    assert "unknown key 'head': a run trains the student's own last layer. teacher_head" in text
