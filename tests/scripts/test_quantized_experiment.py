"""The experiment of quantized distillation, on two folds of tones."""

import csv
import json

import pandas as pd
import pytest
import yaml

from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from scripts.benchmarks.quantized import Experiment, QuantizedOptions, main, measure_size


@pytest.fixture
def folds(tone_pack, tmp_path):
    table = pd.read_csv(tone_pack, sep="\t")
    table["fold"] = 1 + table.groupby("labels").cumcount() % 2
    table.to_csv(tmp_path / "folds.tsv", sep="\t", index=False)
    return tmp_path / "folds.tsv"


def options(folds, **given):
    events = sorted(set(pd.read_csv(folds, sep="\t")["labels"].astype(str)))[:2]
    return {"data": str(folds), "events": events, "published": None, "output": str(folds.parent / "out")} | given


def test_clips_without_an_event_are_labelled_other_and_each_fold_is_held_out_once(folds):
    experiment = Experiment(QuantizedOptions(**options(folds)))
    lists = {
        (part, fold): pd.read_csv(folds.parent / "out" / "lists" / f"{part}{fold}.tsv", sep="\t")
        for part in ("train", "test")
        for fold in (1, 2)
    }
    assert all(set(table["labels"]) == {*experiment.options.events, "other"} for table in lists.values())
    assert set(lists["train", 1]["filename"]) == set(lists["test", 2]["filename"])
    assert not set(lists["train", 1]["filename"]) & set(lists["test", 1]["filename"])
    assert experiment.positive.sum(axis=0).tolist() == [4, 4]


def test_an_event_without_clips_is_named(folds):
    with pytest.raises(UserError, match="has no clips of gunshot; its labels are"):
        Experiment(QuantizedOptions(**options(folds, events=["gunshot"])))


def test_clips_of_several_labels_and_a_folder_of_other_options_are_refused(folds):
    Experiment(QuantizedOptions(**options(folds)))
    Experiment(QuantizedOptions(**options(folds, seeds=1, only=[1])))
    with pytest.raises(UserError, match=r"has runs with other options \(joint_lr\): give another --output"):
        Experiment(QuantizedOptions(**options(folds, joint_lr=0.1)))
    table = pd.read_csv(folds, sep="\t")
    table.loc[0, "labels"] += ";rain"
    table.to_csv(folds, sep="\t", index=False)
    with pytest.raises(UserError, match=r"has clips of several labels, such as .*;rain'"):
        Experiment(QuantizedOptions(**options(folds, events=[table["labels"][1]])))


def test_a_published_teacher_needs_a_class_for_each_event(folds, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(folds), "--events", "a,b"])
    assert "--audioset has 3 classes for 2 events" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_are_packed_codes_a_scale_for_each_row_and_the_rest_in_full(bits, tmp_path):
    plain = create_model("lstm_small", num_classes=4)
    save_checkpoint(tmp_path / "plain.pt", plain)
    network = {name: value for name, value in plain.state_dict().items() if not name.startswith("front_end")}
    assert measure_size(plain) == sum(value.nbytes for value in network.values())
    weights = [value for name, value in network.items() if "weight" in name and value.ndim == 2]
    saved = sum(value.numel() * (32 - bits) // 8 - 2 * len(value) for value in weights)
    quantized = load_model(tmp_path / "plain.pt", quantize={"weights": bits})
    assert measure_size(quantized) == measure_size(plain) - saved


@pytest.mark.long
def test_every_system_is_run_once_and_compared(folds, tmp_path, capsys):
    short = {"epochs": 2, "batch_size": 8, "warmup_epochs": 1, "num_workers": 0, "loss": "BCEWithLogitsLoss"}
    files = {
        "teacher": {"train_data": "x", "model": "resnet10_small", "pretrained": False} | short,
        "targets": {"train_data": "x", "model": "x", "epochs": 1, "batch_size": 8, "num_workers": 0, "topk": 3},
        "student": {"train_data": "x", "model": "lstm_small", "pretrained": False, "objective": "cmkd"} | short,
    }
    files["targets"] |= {"spectransforms": [], "mask_fill": "mean"}
    for name, settings in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    given = options(folds, seeds=1, bits=[2], joint_epochs=1)
    arguments = ["--events", ",".join(given.pop("events")), "--published", "null", "--bits", "2"]
    arguments += [word for name in files for word in (f"--{name}", str(tmp_path / f"{name}.yaml"))]
    arguments += ["--data", given["data"], "--output", given["output"], "--seeds", "1", "--joint_epochs", "1"]
    main(arguments)
    text = capsys.readouterr().out
    for system in ("baseline", "teacher", "alone", "distilled", "continued", "joint2", "after2"):
        assert f"| {system} " in text
    folder = tmp_path / "out"
    with open(folder / "quantized.csv") as file:
        compared = {(row["system"], row["compared_with"]) for row in csv.DictReader(file)}
    assert ("joint2", "after2") in compared
    assert (folder / "quantized.png").stat().st_size > 5000
    record = folder / "scores" / "joint2" / "fold1_seed1.json"
    assert (
        json.loads(record.read_text())["bytes"]
        < 0.15 * json.loads((folder / "scores" / "alone" / "fold1_seed1.json").read_text())["bytes"]
    )
    written = record.stat().st_mtime_ns
    main(arguments)  # nothing is run again
    assert record.stat().st_mtime_ns == written
    assert capsys.readouterr().out == text
