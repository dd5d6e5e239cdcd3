"""The commands of the pipeline as a user types them, on a set of seven classes recorded at 8 kHz."""

import json
import os
import sys
from pathlib import Path

import h5py
import matplotlib.image
import pandas as pd
import pytest
import torch
import yaml

from distill.targets import SoftTargetStore
from models import load_model
from run import Runner
from tests.conftest import run_command, torchrun

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--epochs", "3", "--num_workers", "1", "--valid_every", "3"]


def succeed(*words, **options):
    result = run_command(*words, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def tones_alone(pack, runs):
    """Words that train and evaluate on one pack, and write below `runs`."""
    held_out = ("--valid_data", "null", "--select_on", "null")
    return ["--train_data", pack, "--eval_data", pack, *held_out, "--outputpath", runs]


@pytest.fixture(scope="module")
def teacher(tone_pack, tmp_path_factory):
    """The folder of a teacher trained on the labels."""
    runs = tmp_path_factory.mktemp("runs")
    data = tones_alone(tone_pack, runs)
    changes = ["--epochs", "20", "--num_workers", "1", "--optimizer_args.lr", "3e-3", "--batch_size", "8"]
    changes += ["--model", "audiotransformer_nano", "--model_args", "{pooling: logit}", "--mixup", "null"]
    succeed("run.py", "train", "trainconfig/own_teacher.yaml", *data, *changes)
    return runs / "own_teacher" / "audiotransformer_nano" / "latest"


@pytest.fixture(scope="module")
def store(tone_pack, teacher, tmp_path_factory):
    """The folder of its soft targets, made by two processes under torchrun."""
    logits = tmp_path_factory.mktemp("logits")
    result = succeed(
        *torchrun(),
        *("save_logits.py", "logitconfig/own_teacher.yaml"),
        *("--train_data", tone_pack, "-m", teacher, "--outputpath", logits, "--epochs", "2", "--num_workers", "1"),
    )
    folder = logits / "own_teacher" / "tones" / "chunk_10"
    assert f"soft targets: {folder}" in result.stdout
    return folder


@pytest.fixture(scope="module")
def student(tone_pack, store, tmp_path_factory):
    runs = tmp_path_factory.mktemp("student")
    data = tones_alone(tone_pack, runs)
    data += ["--logitspath", store]
    data += ["--model", "audiotransformer_pico", "--model_args", "{pooling: logit}"]
    result = succeed("run.py", "train", "trainconfig/own_student.yaml", *data, *SHORT)
    folder = runs / "own_student" / "audiotransformer_pico" / "latest"
    assert str(folder.resolve()) in result.stdout
    return folder


def test_the_teacher_learned_and_its_folder_describes_it(teacher):
    results = json.loads((teacher / "results.json").read_text())
    assert results["mAP"] > 3 * results["chance_mAP"]
    assert yaml.safe_load((teacher / "config.yaml").read_text())["optimizer_args"]["lr"] == 3e-3
    assert (teacher / "class_labels_indices.csv").read_text().splitlines()[1] == '0,"","tone 0"'
    log = (teacher / "train.log").read_text()
    assert "command: run.py train trainconfig/own_teacher.yaml" in log
    assert "checkpoints are chosen on" in log
    assert load_model(teacher).labels == [f"tone {i}" for i in range(7)]


def test_torchrun_splits_the_work_and_every_clip_is_there_once(store, tone_pack):
    assert sorted(p.name for p in store.glob("logits_ep*.h5")) == [
        f"logits_ep{e}_{r}.h5" for e in (1, 2) for r in (0, 1)
    ]
    rows = SoftTargetStore(store).read_rows(1)
    assert sorted(rows["filename"]) == sorted(pd.read_csv(tone_pack, sep="\t")["filename"])
    with h5py.File(store / "logits_ep1_0.h5") as file:
        assert file["topk_values"].shape == (14, 7)


def test_the_student_has_the_teachers_classes_without_labels(student):
    model = load_model(student)
    assert model.labels == [f"tone {i}" for i in range(7)]
    assert (model.name, model.sample_rate) == ("audiotransformer_pico", 16000)


def test_evaluate_prints_every_figure_and_writes_per_class_results(student, tone_pack):
    out = succeed("run.py", "evaluate", student, "--test_data", tone_pack).stdout
    for figure in (
        "mAP",
        "mAUC",
        "mEER",
        "threshold",
        "d prime",
        "lwlrap",
        "top1",
        "clips used: 28, missing from the pack: 0",
    ):
        assert figure in out
    table = pd.read_csv(student / "evaluation_tones_per_class.csv")
    assert table["label"].tolist() == [f"tone {i}" for i in range(7)]
    assert table["n_positive"].tolist() == [4] * 7
    picture = matplotlib.image.imread(student / "evaluation_tones_roc_det.png")
    assert picture.shape[1] > 1000
    again = json.loads((student / "evaluation_tones.json").read_text())
    for name in ("EER", "EER_threshold"):
        assert [row[name] for row in again["per_class"]] == pytest.approx(table[name].tolist())
        assert name.split("_")[-1] in out
    assert again["mAP"] == pytest.approx(json.loads((student / "results.json").read_text())["mAP"], abs=1e-6)


def test_a_published_checkpoint_that_does_not_say_what_it_is_takes_a_name(student, tone_pack, tmp_path):
    state = load_model(student).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    refused = run_command("run.py", "evaluate", tmp_path / "bare.pt", "--test_data", tone_pack)
    assert refused.returncode == 1
    assert "-m NAME --weights" in refused.stderr
    assert "Traceback" not in refused.stderr
    tags = tmp_path / "tags.csv"
    sounds = Path(tone_pack).parents[2] / "sounds"
    succeed("inference.py", sounds, "-m", "audiotransformer_pico", "--weights", tmp_path / "bare.pt", "--output", tags)
    assert set(pd.read_csv(tags)["label"].astype(str)) <= {str(i) for i in range(7)}


def test_a_misspelt_option_of_evaluate_is_reported_before_the_work(student, tone_pack):
    result = run_command("run.py", "evaluate", student, "--test_data", tone_pack, "--batchsize", "3")
    assert result.returncode == 1
    assert "unknown option --batchsize (did you mean 'batch_size'?)" in result.stderr


def test_tagging_prints_the_teachers_class_names(student, tone_pack):
    out = succeed(
        "inference.py", Path(tone_pack).parents[2] / "sounds" / "tone_003.wav", "-m", student, "-k", "2"
    ).stdout
    assert "tone_003.wav" in out
    assert out.count("tone ") == 2


def test_every_fault_is_reported_before_training_starts(tone_pack, store, tmp_path):
    lines = Path(tone_pack).read_text().splitlines()
    header = lines[0].split("\t")
    column = header.index("labels")
    unlabelled = tmp_path / "unlabelled.tsv"
    unlabelled.write_text("\n".join("\t".join(c for i, c in enumerate(r.split("\t")) if i != column) for r in lines))
    astray = tmp_path / "astray.tsv"
    astray.write_text("\n".join(line.replace("tones_0.h5", "gone_0.h5") for line in lines) + "\n")
    config = tmp_path / "faulty.yaml"
    settings = {"train_data": str(astray), "eval_data": str(unlabelled), "logitspath": str(tmp_path / "none"),
                "model": "audiotransformer_pcio", "epoch": 3, "loss": "BCEWithLogitsLoss"}  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    result = run_command("run.py", "train", config, "--outputpath", tmp_path / "runs")
    assert result.returncode == 1
    text = result.stderr
    assert "has 5 faults" in text
    for part in ("did you mean 'epochs'", "gone_0.h5", "missing 'labels'", "save_logits.py", "'audiotransformer_pico'"):
        assert part in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_a_store_of_another_pack_and_of_other_classes_is_refused(tone_pack, store, tmp_path):
    settings = {"train_data": str(tone_pack), "logitspath": str(store), "model": "audiotransformer_pico",
                "num_classes": 527, "model_args": {"pooling": "logit"}, "loss": "BCEWithLogitsLoss"}  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    result = run_command("run.py", "train", config)
    assert "has 7 classes, the configuration 527" in result.stderr
    result = run_command("run.py", "train", config, "--num_classes", "null", "--loss", "BCELoss")
    assert "loss BCELoss expects probabilities" in result.stderr


def test_a_published_run_without_its_initialisation_logs_a_warning(tone_pack, store, tmp_path, capsys, monkeypatch):
    def offline(url, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr("models.downloads.transfer", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    options = {"train_data": str(tone_pack), "eval_data": None, "select_on": None, "logitspath": str(store)}
    options |= {"outputpath": str(tmp_path), "epochs": 1, "epoch_length": 1, "batch_size": 2, "num_workers": 0}
    config = str(ROOT / "trainconfig" / "balanced_mixup_tiny_T_ensemble5014_chunk10.yaml")
    Runner(seed=1).train(config, **options)
    assert "STARTS FROM RANDOM WEIGHTS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        Runner(seed=1).train(config, pretrained=True, **options)
    assert "audiotransformer_tiny_mae_as_10s.pt" in capsys.readouterr().err


def test_a_student_can_start_from_another_runs_weights_with_another_head(tone_pack, student, tmp_path):
    data = [
        "--train_data",
        tone_pack,
        "--outputpath",
        tmp_path,
        "--eval_data",
        "null",
        "--valid_data",
        "null",
        "--select_on",
        "null",
    ]
    data += ["--loss", "CrossEntropyLoss"]
    result = succeed(
        *("run.py", "train", "trainconfig/own_teacher.yaml", *data, "--model", "audiotransformer_pico"),
        *("--pretrained", student.resolve(), "--epochs", "1", "--num_workers", "0"),
    )
    assert "audiotransformer_pico starts from" in result.stderr


@pytest.mark.long
def test_the_demo_reaches_its_figures(tmp_path):
    """The whole demo: the student clearly beats chance and comes close to its teacher."""
    environment = {"OMP_NUM_THREADS": str(os.cpu_count())}
    result = run_command("scripts/demo.py", "--workdir", tmp_path / "demo", "--output", tmp_path, env=environment)
    print(result.stdout[-3000:], file=sys.stderr)
    assert result.returncode == 0
    teacher = json.loads(next(tmp_path.glob("experiments/demo_teacher/latest/results.json")).read_text())
    student = json.loads(next(tmp_path.glob("experiments/demo_student/latest/results.json")).read_text())
    baseline = json.loads((tmp_path / "experiments/demo_teacher/latest/baseline.json").read_text())["value"]
    assert teacher["mAP"] > baseline > 0.8
    assert student["mAP"] > baseline
    assert student["mAP"] > teacher["mAP"] - 0.03


def test_the_demo_runs_from_start_to_end(tmp_path):
    result = run_command("scripts/demo.py", "--quick", "--workdir", tmp_path / "demo", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("chance", "simple features", "teacher (labels)", "student (distilled)", "soft targets", "tags.csv"):
        assert part in result.stdout
    assert (tmp_path / "demo" / "tags.csv").is_file()
    (tmp_path / "demo" / "tags.csv").unlink()
    again = run_command("scripts/demo.py", "--quick", "--workdir", tmp_path / "demo", "--output", tmp_path / "out")
    assert again.stdout.count("done before") == 8
    assert (tmp_path / "demo" / "tags.csv").is_file()
