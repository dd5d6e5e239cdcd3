"""A method is one file: two that are no part of the project train by the ordinary command, and go on after a kill."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from common.errors import UserError
from distill.objectives import TrainingFacts, list_objectives, plan_objective
from models import create_model, load_model, save_checkpoint
from run import Runner
from tests.conftest import ROOT, run_command, torchrun
from tests.training import methods  # noqa: F401  (it registers its objectives)
from tests.training.test_resume import assert_same, lines_of, the_run, weights_of
from training.prepare import prepare_run

SETTINGS = {
    "model": "audiotransformer_pico",
    "model_args": {"depth": 3, "drop_rate": 0.1},
    "pretrained": False,
    "init_from_data": True,
    "batch_size": 6,
    "epochs": 4,
    "warmup_epochs": 1,
    "optimizer": "AdamW",
    "optimizer_args": {"lr": 0.002},
    "checkpoint_every": 3,
    "log_every": 1,
    "ema": 0.9,
    "n_saved": 2,
    "select_by": "loss",
    "device": "cpu",
}
NAMES = ("masked_reconstruction", "layer_distillation")


@pytest.fixture
def config(tone_pack, tmp_path):
    """Write the configuration of a method on the tones, without their labels."""
    rows = (line.split("\t") for line in tone_pack.read_text().splitlines())
    header, *rows = rows
    used = [place for place, name in enumerate(header) if name != "labels"]
    bare = tmp_path / "bare.tsv"
    bare.write_text("".join("\t".join(row[place] for place in used) + "\n" for row in [header, *rows]))
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "teacher.pt", create_model("audiotransformer_pico", num_classes=3, sample_rate=8000, f_max=4000.0)
    )

    def write(name, **changes):
        teacher = {"teacher": str(tmp_path / "teacher.pt")} if name == "layer_distillation" else {}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | {"train_data": str(bare), "objective": name} | teacher | changes))
        return path

    return write


def train(path, output, **overrides):
    Runner(seed=1).train(str(path), outputpath=str(output), **overrides)
    return the_run(output)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_one_short_file(name):
    lines = (ROOT / "tests" / "training" / "methods" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80
    assert name in list_objectives("none")


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_from_an_unlabelled_pack_and_keeps_what_was_best(config, tmp_path, name):
    folder = train(config(name, epochs=8, num_workers=0), tmp_path / "runs")
    epochs = [line for line in lines_of(folder) if line["kind"] == "epoch"]
    losses = [line["loss"] for line in epochs]
    assert losses[-1] < 0.8 * losses[0]
    assert [line["best"] for line in epochs] == [loss < min([np.inf, *losses[:i]]) for i, loss in enumerate(losses)]
    kept = sorted(path.name for path in folder.glob("best_epoch=*.pt"))
    best = sorted(range(8), key=lambda i: losses[i])[:2]
    assert kept == sorted(f"best_epoch={i + 1:04d}_loss={losses[i]:.6g}.pt" for i in best)
    found = torch.load(
        folder / kept[kept.index(f"best_epoch={best[0] + 1:04d}_loss={losses[best[0]]:.6g}.pt")], weights_only=True
    )
    weights = weights_of(folder)
    assert all(torch.equal(weights[key], value) for key, value in found["model"].items())
    assert json.loads((folder / "finished.json").read_text())["weights"].endswith("best.pt")
    model = load_model(folder)
    assert model.num_classes == 0
    assert not any("average" in key or "projection" in key for key in weights)  # of the method, not of the student
    assert model.embed(torch.randn(2, 16000))[0].shape == (2, 64)


@pytest.mark.long  # tests/training/test_self_supervised.py does this every day
@pytest.mark.parametrize("name", NAMES)
def test_killed_it_goes_on_to_the_same_bits(config, tmp_path, name):
    words = ["tests/training/killing.py", config(name), tmp_path / "runs", "2", "3", "0", "2"]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr + (tmp_path / "log.txt").read_text()
    assert_same(the_run(tmp_path / "runs_whole"), the_run(tmp_path / "runs"))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_as_one(config, tmp_path, name):
    path = config(name, num_workers=0, epochs=2, model_args={"depth": 3})  # no dropout: it is each process's own
    alone = train(path, tmp_path / "one")
    result = run_command(
        *torchrun(), "tests/training/methods/train.py", "--seed", "1", "train", path, "--outputpath", tmp_path / "two"
    )
    assert result.returncode == 0, result.stderr
    one, two = (
        [line["loss"] for line in lines_of(f) if line["kind"] == "step"] for f in (alone, the_run(tmp_path / "two"))
    )
    np.testing.assert_allclose(one, two, rtol=2e-4)


def test_what_is_frozen_stays_in_evaluation_mode_and_out_of_the_optimiser(config):
    run = prepare_run(str(config("masked_reconstruction", num_workers=0)), {}, 1).run
    run.objective.train()
    assert not run.objective.average.training
    assert run.objective.predictor.training
    trainer = run.create_trainer()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in run.objective.average.parameters()}
    assert {id(parameter) for parameter in run.objective.predictor.parameters()} <= trained
    assert not any(parameter.requires_grad for parameter in run.model.outputlayer.parameters())
    assert any(key.startswith("average.") for key in trainer.state_dict()["objective"])


def test_the_choice_of_tokens_depends_on_the_clip_and_its_epoch_alone(config):
    """Not on its neighbours in the batch, nor on the process that holds it."""
    run = prepare_run(str(config("masked_reconstruction", num_workers=0)), {}, 1).run
    whole, part = (next(iter(run.loader([[(2, item) for item in items]]))) for items in (range(6), (3, 4)))
    one, other = run.objective.choose(whole, 40)[3:5], run.objective.choose(part, 40)
    assert torch.equal(one, other)
    later = next(iter(run.loader([[(3, 3), (3, 4)]])))
    assert not torch.equal(run.objective.choose(later, 40), other)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        (
            "layer_distillation",
            {"teacher": None},
            "layer_distillation learns from what a teacher computes; give teacher",
        ),
        (
            "masked_reconstruction",
            {"teacher": "x.pt"},
            "without a teacher; drop teacher",
        ),
        ("masked_reconstruction", {"label_smoothing": 0.1}, "does not use label_smoothing; remove this key"),
        ("masked_reconstruction", {"valid_fraction": 0.2, "select_by": None}, "is for models with classes"),
        ("masked_reconstruction", {"valid_fraction": 0.2}, "select_by and valid_fraction are both given"),
        (
            "masked_reconstruction",
            {"embeddingspath": "x"},
            "embeddingspath is given, but the targets of objective masked_recon",
        ),
        (
            "masked_reconstruction",
            {"objective_args": {"hiden": 0.5}},
            r"no argument 'hiden' \(did you mean 'hidden'\?\)",
        ),
    ],
)
def test_a_configuration_that_does_not_go_with_a_method_is_refused(config, tmp_path, name, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare_run(str(config(name, **changes)), {"outputpath": str(tmp_path / "runs")}, 1)
    assert not (tmp_path / "runs").exists()


def test_a_value_that_is_not_logged_chooses_nothing(config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        Runner().train(
            str(config("masked_reconstruction", num_workers=0, select_by="-los")), outputpath=str(tmp_path / "runs")
        )
    assert re.search(r"select_by is '-los', but this run logs loss, .*target_deviation", capsys.readouterr().err)


def test_the_largest_value_is_best_behind_a_minus(config, tmp_path):
    path = config("masked_reconstruction", num_workers=0, select_by="-target_deviation", epochs=5, n_saved=5)
    folder = train(path, tmp_path / "runs")
    values = [line["target_deviation"] for line in lines_of(folder) if line["kind"] == "epoch"]
    chosen = int(np.argmax(values))
    best = folder / f"best_epoch={chosen + 1:04d}_-target_deviation={-values[chosen]:.6g}.pt"
    assert best.is_file()
    wanted = torch.load(best, weights_only=True)["model"]
    assert all(torch.equal(wanted[key], value) for key, value in weights_of(folder).items())
    (folder / "best.pt").unlink()  # as in a run that was stopped before its end
    assert all(torch.equal(wanted[key], value) for key, value in load_model(folder).state_dict().items())


def test_an_objective_is_built_for_a_student_and_does_not_keep_it():
    student = create_model("audiotransformer_pico", num_classes=0)
    objective = plan_objective("layer_distillation").build(student, TrainingFacts(seed=3))
    own = {id(parameter) for parameter in objective.parameters()}
    assert own
    assert not own & {id(parameter) for parameter in student.parameters()}


def test_the_objective_of_the_plan_trains(tone_pack, tmp_path):
    """The example of ARCHITECTURE.md, as a reader would put it into a file."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "mean_teacher.py", "exec"), {"__name__": "mean_teacher"})
    settings = {key: value for key, value in SETTINGS.items() if key != "select_by"}
    settings |= {"model_args": {"depth": 2, "pooling": "logit"}, "num_workers": 0}
    settings |= {"train_data": str(tone_pack), "objective": "mean_teacher", "epochs": 8, "ema": None}
    settings["objective_args"] = {"decay": 0.9}  # in 40 steps that of long runs has hardly left the start
    path = tmp_path / "mean.yaml"
    path.write_text(yaml.safe_dump(settings))
    torch.manual_seed(1)
    prepared = prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 1)
    prepared.fit()
    lines = [line for line in lines_of(the_run(tmp_path / "runs")) if line["kind"] == "epoch"]
    assert lines[-1]["loss_labels"] < 0.8 * lines[0]["loss_labels"]
    norm = prepared.run.objective.average.init_bn[1]
    assert norm.num_batches_tracked > 0  # an average without statistics would compute something else
    assert norm.running_mean.abs().max() > 1
