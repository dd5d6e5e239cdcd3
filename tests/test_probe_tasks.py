"""`run.py probe --tasks`, and heads of all kinds in evaluation and tagging: as a user types it, on tones."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import inference
from audio.dataset import Pack
from audio.io import read_audio
from models import create_model, load_model, load_tagger, save_checkpoint
from models.heads import load_head
from probing.comparison import Row, draw_rows, format_rows
from run import Runner

QUICK = {"epochs": 12, "lr": 1e-2, "num_workers": 0, "device": "cpu", "prototypes": 3, "neighbours": 3}
CHUNK = 0.4  # seconds; clips of a second have two of these, and a fifth of a second


@pytest.fixture(scope="module")
def work(tone_pack, tmp_path_factory):
    """A folder with two checkpoints, lists of the tones, and a file of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    table = pd.read_csv(tone_pack, sep="\t", dtype=str).sort_values("filename")
    table["fold"] = [str(1 + index // 14) for index in range(28)]
    table["kinds"] = [f"{index % 7};{10 + index % 2}" for index in range(28)]
    for name, rows in {"folds": slice(None), "train": slice(14), "test": slice(14, None)}.items():
        table[rows].to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(folder / "cnn.pt", create_model("resnet10_small", num_classes=0))
        save_checkpoint(folder / "vit.pt", create_model("audiotransformer_pico", num_classes=0, depth=2))
    lines = ["parts: {train_data: train.tsv, test_data: test.tsv, chunk_length: 0.4}"]
    lines += ["kinds: {data: folds.tsv, label_column: kinds, baseline: false, epochs: 5}"]
    (folder / "tasks.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _there(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setattr("probing.probe.draw_probe", lambda *_: None)  # pictures of heads would take most of the time
    monkeypatch.setattr("probing.probe.render_png", lambda _: b"")


def refused(capsys, function, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_a_table_has_every_task_with_every_model_head_and_choice_of_layers(capsys):
    given = {"tasks": "tasks.yaml", "name": "all", "head": "linear,knn", "layers": "all", **QUICK}
    Runner().probe("cnn.pt,vit.pt", **given)
    text = capsys.readouterr().out
    folder = Path("heads/all")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["", "parts", "kinds", "average"]
    rows = [f"{model} {head} all" for model in ("cnn.pt", "vit.pt") for head in ("linear", "knn")]
    assert [line[0] for line in lines[2:]] == [*rows, "baseline", "chance"]
    assert lines[-2][2] == lines[-2][3] == ""  # a task without a baseline
    assert "accuracy of parts, mAP of kinds" in text
    assert (folder / "probes.md").read_text().strip() in text
    assert (folder / "probes.png").stat().st_size > 5000
    found = {
        (entry["task"], entry["row"]): entry for entry in json.loads((folder / "probes.json").read_text())["probes"]
    }
    assert len(found) == 8
    record = json.loads((folder / "parts-vit.pt-linear-all.json").read_text())
    entry = found["parts", "vit.pt linear all"]
    assert (entry["value"], entry["metric"]) == (record["value"], "accuracy")
    assert sum(entry["layer_weights"].values()) == pytest.approx(1)
    assert record["chunk_length"] == CHUNK
    stores = sorted(path.parent.name for path in Path("embeddings").rglob("meta.json"))
    assert stores.count("chunk_10_layers") == 2  # one for each model: two kinds of heads share it

    single = {"train_data": "train.tsv", "test_data": "test.tsv", "chunk_length": CHUNK, "layers": "all", **QUICK}
    Runner().probe("vit.pt", name="single", **single)
    assert json.loads(Path("heads/single.json").read_text())["folds"] == record["folds"]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    (folder / "parts-cnn.pt-knn-all.pt").unlink()  # as where the command was stopped
    capsys.readouterr()
    Runner().probe("cnn.pt,vit.pt", **given)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"parts-cnn.pt-knn-all.pt"}
    assert capsys.readouterr().out == text
    text = refused(capsys, Runner().probe, "cnn.pt,vit.pt", **given | {"head": "linear"})
    assert "heads/all/probes.json is of 4 other probes as well: heads/all/kinds-cnn.pt-knn-all.pt" in text
    assert len(json.loads((folder / "probes.json").read_text())["probes"]) == 8
    text = refused(capsys, Runner(seed=9).probe, "cnn.pt,vit.pt", **given)
    assert "task kinds: heads/all/kinds-cnn.pt-linear-all.pt is a head made with other seed" in text
    assert "fault" in text


def test_every_fault_is_reported_before_anything_is_computed(tmp_path, capsys):
    lines = ["a: {data: folds.tsv, fold_column: fuld, epoch: 3}", "b: {train_data: nowhere.tsv, test_data: test.tsv}"]
    lines += ["c: 3", "d: {data: folds.tsv, head: knn}"]
    Path("faulty.yaml").write_text("\n".join(lines))
    given = {"outputpath": str(tmp_path), "cache": str(tmp_path), **QUICK, "lr": -1}
    text = refused(capsys, Runner().probe, "gone.pt", tasks="faulty.yaml", name="x", weights="null,null", **given)
    for part in (
        "--weights has 2 values for 1 models",
        "faulty.yaml: task a: unknown key 'epoch' (did you mean 'epochs'?)",
        "task a: folds.tsv has no column 'fuld' (did you mean 'fold'?)",
        "task b: ",
        "nowhere.tsv",
        "task c: expected options",
        "task d: unknown key 'head'; it is the same for all tasks",
        "--lr is -1",
        "gone.pt",
    ):
        assert text.count(part) >= 1, part
    assert text.count("--lr is -1") == 1
    Path("empty.yaml").write_text("{}")
    text = refused(capsys, Runner().probe, "cnn.pt", tasks="empty.yaml", name="x", data="a.tsv", **given)
    assert "it has no task" in text
    assert "--data: clips are those of the tasks" in text
    text = refused(capsys, Runner().probe, "cnn.pt,cnn.pt", tasks="tasks.yaml", name="x", **given | {"lr": 1})
    assert "several models would write" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"neighbours": 15, "head": "knn"}, "--neighbours is 15, but a head has 14 training clips: give 14 or fewer"),
        ({"layers": "0,7"}, "resnet10_small has no layer 7: it has 5, 0 to 4"),
        ({"layers": "lest"}, "--layers is 'lest'"),
        ({"head": "prototypes", "layers": "all"}, "takes the time steps of the last layer"),
        ({"head": "linear,knn"}, "several heads or choices of layers are compared with --tasks TASKS.yaml"),
        ({"head": "tree"}, "--head is 'tree'; expected"),
    ],
)
def test_what_a_head_cannot_do_is_a_sentence_and_writes_nothing(options, sentence, tmp_path, capsys):
    given = {**QUICK, "outputpath": str(tmp_path), "cache": str(tmp_path), **options}
    text = refused(capsys, Runner().probe, "cnn.pt", data="folds.tsv", name="x", **given)
    assert sentence in text
    assert not list(tmp_path.iterdir())


def test_stores_hold_clip_embeddings_alone(capsys):
    text = refused(capsys, Runner().probe, embeddings="a", data="folds.tsv", name="x", layers="all")
    assert "other layers, and prototypes, need a model" in text


@pytest.mark.parametrize("head", [pytest.param("knn", marks=pytest.mark.long), "layers", "prototypes"])
def test_a_head_of_any_kind_is_evaluated_and_tags_as_the_probe_reported(head, tone_pack, tmp_path, capsys):
    """Clips have several chunks; the command that the report names tags one of them."""
    kind = {"layers": "0,4"} if head == "layers" else {"head": head}
    options = {**QUICK, **kind, "chunk_length": CHUNK, "outputpath": str(tmp_path)}
    Runner().probe("cnn.pt", name=head, train_data="train.tsv", test_data="test.tsv", **options)
    assert f"--head {tmp_path / head}.pt -c 0.4" in capsys.readouterr().out
    reported = json.loads((tmp_path / f"{head}.json").read_text())
    words = {"num_workers": 0, "device": "cpu", "batch_size": 5, "output": str(tmp_path / "e")}
    Runner().evaluate("cnn.pt", "test.tsv", head=str(tmp_path / f"{head}.pt"), **words)
    (path,) = [*tmp_path.glob("e*.json"), *tmp_path.glob("e/*.json")]
    found = json.loads(path.read_text())
    assert found["top1"] == reported["value"]
    for name, value in reported["figures"].items():
        assert found[name] == pytest.approx(value, abs=2e-3), name

    sound = tone_pack.parents[2] / "sounds" / "tone_003.wav"
    tags = [str(sound), "-m", "cnn.pt", "-k", "7", "--output", str(tmp_path / "t.csv"), "--device", "cpu", "--quiet"]
    inference.main([*tags, "--head", str(tmp_path / f"{head}.pt")])
    with open(tmp_path / "t.csv", newline="") as file:
        probabilities = {row["label"]: float(row["probability"]) for row in csv.DictReader(file)}
    tagger = load_tagger("cnn.pt", head=str(tmp_path / f"{head}.pt"))
    expected = tagger.predict(torch.from_numpy(read_audio(sound, 16000)[0])[None])[0].tolist()
    assert probabilities == pytest.approx(dict(zip(tagger.labels, expected, strict=True)), abs=1e-5)


def test_the_cache_keeps_every_layer_and_the_chosen_ones_are_read_from_it(tmp_path):
    options = {**QUICK, "data": "folds.tsv", "outputpath": str(tmp_path), "cache": str(tmp_path / "cache")}
    Runner().probe("cnn.pt", name="one", layers="-4,0", **options)
    (store,) = (tmp_path / "cache").rglob("embeddings_*.h5")
    time = store.stat().st_mtime_ns
    Runner().probe("cnn.pt", name="two", layers="all", head="knn", **options)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("embeddings_*.h5")] == [time]
    head, pack, model = load_head(tmp_path / "one.pt"), Pack.open("folds.tsv"), load_model("cnn.pt")
    assert (head.read_layers, head.widths) == ((0, 1), (8, 8))
    waves = torch.from_numpy(np.stack([pack.read(row) for row in range(28)]))
    with torch.no_grad():
        layers = model.embed_layers(model.front_end(waves), None, range(5))
    with h5py.File(store) as file:
        stored = {tuple(row) for row in np.asarray(file["embedding"], np.float32).round(2).tolist()}
    assert len(stored) == 28
    expected = torch.cat(layers, 1).half().float().numpy()
    mean = head.mean.numpy()
    np.testing.assert_allclose(mean, expected[:, :16].mean(0), rtol=0.5, atol=0.5)  # of those not held out


def test_rows_of_a_table_may_have_seeds_intervals_or_nothing():
    rows = [Row("one", {"a": [50.0, 60.0], "b": [10.0, 20.0]}), Row("two", {"a": [1.0], "b": [2.0]}, {"a": (0.5, 1.5)})]
    lines = format_rows(rows, [Row("baseline", {"a": [], "b": [3.0]})]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2:] == [
        ["one", "55.0 ± 7.1", "15.0 ± 7.1", "35.0 ± 7.1"],
        ["two", "1.0 (0.5 to 1.5)", "2.0", "1.5"],
        ["baseline", "", "3.0", ""],
    ]
    axes = draw_rows(rows, [Row("chance", {"a": [10.0], "b": [3.0]})]).axes
    assert [axis.get_title().splitlines()[0] for axis in axes] == ["a", "b", "average"]
    assert "dashed: chance 10.0" in axes[0].get_title()
    assert len(draw_rows([Row("x", {"a": [1.0]})]).axes) == 1
