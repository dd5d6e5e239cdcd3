"""`run.py probe`, and its heads in inference.py: as a user types it, on tones in seven classes."""

import csv
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import inference
from audio.dataset import Pack
from audio.io import read_audio, resample
from models import create_model, load_model, save_checkpoint
from models.heads import load_head
from run import Runner
from training.metrics import evaluate_scores

LABELS = [f"tone {index}" for index in range(7)]
QUICK = {"epochs": 25, "lr": 1e-2, "num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def pack(tone_pack):
    """The tones in four folds, and as a training and a test list."""
    table = pd.read_csv(tone_pack, sep="\t", dtype=str).sort_values("filename")
    table["fold"] = [str(1 + index // 7) for index in range(28)]
    for name, rows in {"tones_folds": slice(None), "tones_train": slice(21), "tones_test": slice(21, None)}.items():
        table[rows].to_csv(tone_pack.parent / f"{name}.tsv", sep="\t", index=False)
    return tone_pack.parent / "tones_folds.tsv"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that embeds and does not tag."""
    path = tmp_path_factory.mktemp("model") / "embeds.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(path, create_model("mn01_as", num_classes=0))
    return path


@pytest.fixture(scope="module")
def work(model, pack, tmp_path_factory):
    """A working folder with the head "tones", made by folds."""
    folder = tmp_path_factory.mktemp("work")
    Runner().probe(str(model), data=str(pack), name="tones", **places(folder), **QUICK)
    return folder


def places(folder):
    return {"outputpath": str(folder / "heads"), "cache": str(folder / "embeddings")}


def read_record(folder, name="tones"):
    return json.loads((folder / "heads" / f"{name}.json").read_text())


def refused(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_figures_are_of_clips_that_their_heads_were_not_trained_on(work, pack):
    facts, head = read_record(work), load_head(work / "heads" / "tones.pt")
    assert (facts["metric"], facts["chance"], facts["labels"]) == ("accuracy", pytest.approx(1 / 7), LABELS)
    assert [(fold["fold"], fold["n_test"], fold["n_train"], fold["n_valid"]) for fold in facts["folds"]] == [
        (str(fold), 7, 17, 4) for fold in (1, 2, 3, 4)
    ]
    assert facts["value"] > 0.5
    assert facts["value"] == pytest.approx(np.mean([fold["value"] for fold in facts["folds"]])) == facts["folds_mean"]
    assert facts["interval"][0] < facts["value"] <= facts["interval"][1]
    assert facts["figures"]["n_clips"] == 28
    assert (head.labels, head.activation, head.facts["model"]) == (LABELS, "softmax", "mn01_as")
    assert {path.suffix for path in (work / "heads").iterdir()} == {".pt", ".json", ".png"}


def test_the_same_command_gives_the_same_figures_from_embeddings_that_are_kept(work, model, pack, capsys):
    files = {path: path.stat().st_mtime_ns for path in (work / "embeddings").rglob("*.h5")}
    first, head = read_record(work), load_head(work / "heads" / "tones.pt")
    Runner().probe(str(model), data=str(pack), name="tones", **places(work), **QUICK)
    assert {path: path.stat().st_mtime_ns for path in (work / "embeddings").rglob("*.h5")} == files
    assert read_record(work) == first
    again = load_head(work / "heads" / "tones.pt")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    out = capsys.readouterr().out
    assert f"accuracy      {first['value']:.4f}, 95% interval {first['interval'][0]:.4f} to" in out
    assert f"next: python inference.py FILES_OR_FOLDERS -m {model} --head {work / 'heads' / 'tones.pt'}" in out


def test_another_head_of_that_name_is_not_replaced_without_overwrite(work, model, pack, capsys):
    before = (work / "heads" / "tones.pt").read_bytes()
    options = places(work) | QUICK | {"epochs": 2}
    text = refused(capsys, Runner(seed=3).probe, str(model), data=str(pack), name="tones", **options)
    assert "tones.pt is a head made with other epochs, seed;" in text
    assert (work / "heads" / "tones.pt").read_bytes() == before
    (work / "heads" / "other.pt").write_bytes(b"of unknown make")
    text = refused(capsys, Runner(seed=3).probe, str(model), data=str(pack), name="other", **options)
    assert "other embeddings, data, labels, settings" in text
    Runner(seed=3).probe(str(model), data=str(pack), name="other", overwrite=True, **options)
    assert read_record(work, "other")["made_with"]["settings"]["seed"] == 3
    assert load_head(work / "heads" / "other.pt").labels == LABELS


def test_stored_embeddings_need_no_model(work, pack, capsys):
    (folder,) = {path.parent for path in (work / "embeddings").rglob("*.h5")}
    Runner().probe(embeddings=str(folder), data=str(pack), name="stored", **places(work), **QUICK)
    keys = ("value", "interval", "folds", "figures", "chunk_length")
    assert {key: read_record(work, "stored")[key] for key in keys} == {key: read_record(work)[key] for key in keys}
    capsys.readouterr()
    text = refused(capsys, Runner().probe, embeddings=f"{folder},nowhere", data=str(pack), name="x", **places(work))
    assert "nowhere is not a folder" in text
    shutil.copytree(folder, work / "damaged")
    with h5py.File(next((work / "damaged").glob("*.h5")), "r+") as file:
        file["embedding"][3] = np.nan
        del file["embedding"].attrs["checksum"]  # as in stores of an earlier version
    damaged = str(work / "damaged")
    text = refused(capsys, Runner().probe, embeddings=damaged, data=str(pack), name="x", **places(work))
    assert "row 3 (sounds/tone_003.wav) has values that are not finite" in text


def test_a_test_list_evaluates_a_head_of_the_training_list(work, model, pack):
    lists = {part: str(pack.with_name(f"tones_{part}.tsv")) for part in ("train", "test")}
    data = {"train_data": lists["train"], "test_data": lists["test"]}
    Runner().probe(model=str(model), name="parts", head="mlp", hidden_sizes=9, **data, **places(work), **QUICK)
    facts, head = read_record(work, "parts"), load_head(work / "heads" / "parts.pt")
    assert (facts["n_train"], facts["n_valid"], facts["figures"]["n_clips"]) == (17, 4, 7)
    opened, network = Pack.open(lists["test"]), load_model(model)
    waves = torch.stack([torch.from_numpy(resample(opened.read(row), 16000, 32000)) for row in range(7)])
    with torch.no_grad():
        scores = head(network.embed(waves)[0]).softmax(1).numpy()
    assert head.hidden_sizes == (9,)
    assert facts["value"] == evaluate_scores(scores, np.arange(7)).top1
    folders = [str(next((work / "embeddings").rglob(f"tones_{part}_*/*"))) for part in ("test", "train")]
    Runner().probe(embeddings=folders, name="two_stores", head="mlp", hidden_sizes="9", **data, **places(work), **QUICK)
    assert read_record(work, "two_stores")["folds"] == facts["folds"]


def test_several_labels_a_clip_are_evaluated_by_mean_average_precision(work, model, pack, capsys):
    table = pd.read_csv(pack, sep="\t", dtype=str)
    table["kinds"] = [f"{index % 7};{10 + index % 2}" for index in range(28)]
    table.to_csv(pack.with_name("kinds.tsv"), sep="\t", index=False)
    options = {"data": str(pack.with_name("kinds.tsv")), "label_column": "kinds", **places(work), **QUICK}
    Runner().probe(str(model), name="kinds", **options)
    facts = read_record(work, "kinds")
    assert (facts["metric"], facts["labels"]) == ("mAP", [*"0123456", "10", "11"])
    assert facts["chance"] == pytest.approx((7 / 7 + 2 / 2) / 9)
    assert load_head(work / "heads" / "kinds.pt").activation == "sigmoid"
    assert "mAP" in capsys.readouterr().out


def test_all_faults_are_reported_before_anything_is_computed(model, pack, tmp_path, capsys):
    columns = {"fold_column": "fuld", "label_column": "label"}
    text = refused(capsys, Runner().probe, str(model), data=str(pack), epoch=3, **columns, **places(tmp_path))
    assert "has 4 faults" in text
    for part in ("--name is missing", "'fuld' (did you mean 'fold'?)", "'label' (did you mean 'labels'?)", "'epochs'"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_tags_are_what_the_head_computes_from_the_models_embeddings(work, model, tone_pack, tmp_path, capsys):
    sound, tags = tone_pack.parents[2] / "sounds" / "tone_003.wav", tmp_path / "tags.csv"
    words = [str(sound), "-m", str(model), "-k", "7", "--output", str(tags), "--device", "cpu"]
    inference.main([*words, "--head", str(work / "heads" / "tones.pt")])
    with open(tags, newline="") as file:
        found = {row["label"]: float(row["probability"]) for row in csv.DictReader(file)}
    with torch.no_grad():
        clip = load_model(model).embed(torch.from_numpy(read_audio(sound, 32000)[0])[None])[0]
        expected = load_head(work / "heads" / "tones.pt")(clip).softmax(1)[0].tolist()
    assert [found[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)
    assert "tone 3" in capsys.readouterr().out
    text = refused(capsys, inference.main, [*words, "--head", str(work / "heads" / "parts.pt")])
    assert "was made with head" in text


def test_a_model_without_classes_embeds_and_reports_why_it_does_not_tag(model, tone_pack, tmp_path, capsys):
    sound = tone_pack.parents[2] / "sounds" / "tone_003.wav"
    words = [str(sound), "-m", str(model), "--device", "cpu"]
    for more in ([], ["--embeddings", str(tmp_path / "e.h5"), "--output", str(tmp_path / "tags.csv")]):
        text = refused(capsys, inference.main, [*words, *more])
        assert "embeds sounds and has no classes to tag them with: give --head NAME" in text
    inference.main([*words, "--embeddings", str(tmp_path / "e.h5")])
    with torch.no_grad():
        expected = load_model(model).embed(torch.from_numpy(read_audio(sound, 32000)[0])[None])[0][0]
    with h5py.File(tmp_path / "e.h5") as file:
        np.testing.assert_allclose(file["window/embedding"][0], expected, rtol=1e-3, atol=1e-3)
    assert capsys.readouterr().out == ""
    text = refused(capsys, Runner().evaluate, str(model), str(tone_pack))
    assert f"`python run.py probe {model} --data PACK.tsv --name NAME`" in text
