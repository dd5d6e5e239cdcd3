"""MAE, MATPAC and MATPAC++ through the ordinary command: learning, stopping, several processes, and what follows."""

import numpy as np
import pytest
import soundfile
import torch
import yaml

from common.errors import UserError
from models import create_model, load_model, load_weights, save_checkpoint
from scripts import wavlist_to_hdf5
from tests.conftest import run_command, torchrun
from tests.training.test_methods import SETTINGS, config, train  # noqa: F401 - a fixture
from tests.training.test_report import Page
from tests.training.test_resume import assert_same, lines_of, the_run, weights_of
from training.figures import curves_figure
from training.prepare import prepare_run
from training.student import starts_without_classes

NAMES = ("mae", "matpac", "matpac++")
CHANGES = {"ema": None, "select_by": None, "model_args": {"depth": 2}}


def curves_text(folder):
    """The labels of the lines of a run's curves."""
    figure = curves_figure(lines_of(folder))
    return [text.get_text() for axis in figure.axes if (legend := axis.get_legend()) for text in legend.get_texts()]


@pytest.mark.parametrize("name", ["mae", pytest.param("matpac", marks=pytest.mark.long), "matpac++"])
def test_the_loss_falls_and_the_run_gives_a_start_to_a_student_with_classes(config, tone_pack, tmp_path, name):  # noqa: F811
    path = config(name, num_workers=0, train_data=str(tone_pack), epochs=12, **CHANGES)  # its labels are ignored
    folder = train(path, tmp_path / "runs")
    epochs = [line for line in lines_of(folder) if line["kind"] == "epoch"]
    key = "loss" if name == "mae" else "loss_prediction"
    assert epochs[-1][key] < 0.9 * epochs[0][key]
    assert 0.001 < epochs[-1]["token_variance"] <= 1
    values = f"loss {epochs[-1]['loss']:.4g}, ", f"token_variance {epochs[-1]['token_variance']:.3g}"
    assert all(f"{value}" in (folder / "train.log").read_text() for value in values)
    assert f"token_variance {epochs[-1]['token_variance']:.4g}" in Page((folder / "report.html").read_text()).text
    assert starts_without_classes("audiotransformer_pico", str(folder))
    weights = weights_of(folder)
    assert not any(part.startswith(("decoder", "teacher", "predictor", "head")) for part in weights)
    assert load_model(folder).num_classes == 0
    start = SETTINGS | {
        "train_data": str(tone_pack),
        "pretrained": str(folder),
        "epochs": 1,
        "loss": "CrossEntropyLoss",
    }
    start |= {"model_args": {"depth": 2, "pooling": "logit"}, "optimizer_args": {"lr": 0.0}, "ema": None}
    finetune = tmp_path / "finetune.yaml"
    finetune.write_text(yaml.safe_dump(start | {"init_from_data": False, "select_by": None, "num_workers": 0}))
    tuned = weights_of(train(finetune, tmp_path / "tuned"))
    for part, value in weights.items():
        if not part.startswith(("init_bn", "outputlayer")):
            assert torch.equal(tuned[part], value), part
    assert tuned["outputlayer.1.weight"].shape == (7, 64)
    assert not starts_without_classes("audiotransformer_pico", str(the_run(tmp_path / "tuned")))


@pytest.mark.parametrize("name", [*(pytest.param(each, marks=pytest.mark.long) for each in NAMES[:2]), NAMES[2]])
def test_killed_it_goes_on_to_the_same_bits(config, tmp_path, name):  # noqa: F811
    words = ["tests/training/killing.py", config(name, **CHANGES), tmp_path / "runs", "2", "3", "0", "2"]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr + (tmp_path / "log.txt").read_text()
    assert_same(the_run(tmp_path / "runs_whole"), the_run(tmp_path / "runs"))


@pytest.mark.parametrize("name", [NAMES[0], NAMES[1], pytest.param(NAMES[2], marks=pytest.mark.long)][1:])
def test_two_processes_learn_as_one(config, tmp_path, name):  # noqa: F811
    path = config(name, num_workers=0, epochs=2, **CHANGES)
    alone = train(path, tmp_path / "one")
    result = run_command(*torchrun(), "run.py", "--seed", "1", "train", path, "--outputpath", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    one, two = ([line for line in lines_of(f) if line["kind"] == "step"] for f in (alone, the_run(tmp_path / "two")))
    for key in ("loss", "loss_prediction", "loss_classes", "token_variance", "class_entropy"):
        np.testing.assert_allclose([line[key] for line in one], [line[key] for line in two], rtol=5e-4, err_msg=key)


def test_two_processes_start_a_run_whose_budget_is_timed_by_one_of_them(config, tmp_path):  # noqa: F811
    path = config(
        "mae", num_workers=0, epochs="auto", budget="1s", **CHANGES | {"warmup_epochs": None, "rank_timeout": 60}
    )
    words = (*torchrun(), "run.py", "--seed", "1", "train", path, "--outputpath", tmp_path / "two")
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    assert lines_of(the_run(tmp_path / "two"))


def test_a_collapsed_run_says_so_in_log_journal_curves_and_report(config, tmp_path):  # noqa: F811
    """A large weight decay makes all weights 0, so that the output does not depend on the input."""
    decay = {"optimizer_args": {"lr": 0.02, "weight_decay": 49.0}, "schedule": "constant", "warmup_epochs": None}
    path = config("matpac", num_workers=0, **CHANGES | decay)
    folder = train(path, tmp_path / "runs")
    log = (folder / "train.log").read_text()
    assert "COLLAPSED after epoch" in log
    assert "THE RUN HAS COLLAPSED: " in log
    last = [line for line in lines_of(folder) if line["kind"] == "epoch"][-1]
    assert last["learns"] is False
    page = Page((folder / "report.html").read_text())
    assert "THE RUN HAS COLLAPSED" in page.text
    assert {"token variance", "class entropy", "class uncertainty"} <= set(curves_text(folder))


def test_silence_and_few_sounds_are_reported(config, tmp_path):  # noqa: F811
    for name, wave in (("a", np.zeros(8000)), ("b", np.zeros(400))):
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    (tmp_path / "silence.tsv").write_text("filename\na.wav\nb.wav\n")
    wavlist_to_hdf5.main([str(tmp_path / "silence.tsv"), str(tmp_path / "pack")])
    path = config("mae", num_workers=0, train_data=str(tmp_path / "pack/labels/silence.tsv"), **CHANGES)
    log = (train(path, tmp_path / "runs") / "train.log").read_text()
    assert "the 2 clips that were checked are silent; check how they were packed" in log
    assert "few sounds: 2 chunks" in log


def test_a_student_that_cannot_be_masked_is_refused_before_anything_is_written(config, tmp_path):  # noqa: F811
    path = config("mae", model="resnet10_small", model_args={}, num_workers=0)
    with pytest.raises(UserError, match="resnet10_small has no tokens to mask"):
        prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 1)
    assert not (tmp_path / "runs").exists()


def test_the_embeddings_of_masked_pre_training_can_start_a_published_configuration(config, tmp_path):  # noqa: F811
    """The eight CED files start from a run of `mae` where the published initialisation cannot be had."""
    torch.manual_seed(0)
    checkpoint = tmp_path / "start.pt"
    save_checkpoint(checkpoint, create_model("audiotransformer_tiny", num_classes=0))
    student = create_model("audiotransformer_tiny", pooling="logit")
    load_weights(student, checkpoint, pre_training=True)
    assert torch.equal(student.patch_embed.proj.weight, load_model(checkpoint).patch_embed.proj.weight)
