"""Killed at any moment, a run ends as if nobody had touched it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from models import create_model, save_checkpoint
from run import Runner
from tests.conftest import ROOT, run_command
from training.run_folder import RunFolder, choose_folder
from training.states import States
from training.trainer import Trainer

SETTINGS = {
    "valid_fraction": 0.25,
    "model": "audiotransformer_pico",
    "model_args": {"pooling": "logit", "depth": 2, "time_patch_out": 1, "drop_rate": 0.1, "drop_path_rate": 0.1},
    "pretrained": False,
    "loss": "BCEWithLogitsLoss",
    "init_from_data": True,
    "mixup": 0.5,
    "batch_size": 6,
    "epochs": 5,
    "warmup_epochs": 1,
    "optimizer": "AdamW",
    "optimizer_args": {"lr": 0.003},
    "num_workers": 1,
    "checkpoint_every": 3,
    "log_every": 2,
    "ema": 0.9,
    "n_saved": 2,
    "device": "cpu",
}
LABELS_ONLY = {
    "wavtransforms": {"Shift": {"min_shift": -0.5, "max_shift": 0.5}},
    "spectransforms": [{"TimeMasking": {"time_mask_param": 48}}],
}


@pytest.fixture(scope="module")
def store(tone_pack, tmp_path_factory):
    """Soft targets of an untrained teacher for the tones, three epochs."""
    folder = tmp_path_factory.mktemp("soft")
    torch.manual_seed(0)
    save_checkpoint(
        folder / "teacher.pt",
        create_model("audiotransformer_pico", num_classes=7, labels=[f"tone {i}" for i in range(7)]),
    )
    settings = {"train_data": str(tone_pack), "model": str(folder / "teacher.pt"), "epochs": 3, "topk": 5}
    settings |= {"outputpath": str(folder / "logits"), "name": "teacher", "num_workers": 0, "device": "cpu"}
    settings |= {"spectransforms": [{"TimeMasking": {"max_share": 0.2}}, {"FrequencyMasking": {}}]}
    (folder / "soft.yaml").write_text(yaml.safe_dump(settings))
    result = run_command("save_logits.py", folder / "soft.yaml")
    assert result.returncode == 0, result.stderr
    return folder / "logits" / "teacher" / "tones" / "chunk_10"


@pytest.fixture(params=[pytest.param("supervised", marks=pytest.mark.long), "distilled"])
def config(request, tone_pack, tmp_path):
    """A configuration file."""
    data = {"train_data": str(tone_pack), "eval_data": str(tone_pack)}
    if request.param == "distilled":
        more = {"logitspath": str(request.getfixturevalue("store")), "sampler": "balanced"}
    else:
        more = LABELS_ONLY
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | data | more))
    return path


def the_run(output: Path) -> Path:
    """The only run's folder under an output path."""
    (folder,) = (p.parent for p in output.glob("*/*/*/finished.json") if not p.parent.is_symlink())
    return folder


def final_weights(folder: Path) -> Path:
    """The file of the weights that a finished run kept: averaged.pt or best.pt."""
    path = folder / Path(json.loads((folder / "finished.json").read_text())["weights"]).name
    assert [p.name for p in folder.glob("*.pt") if not p.name.startswith("best_epoch")] == [path.name]
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(final_weights(folder), weights_only=True)["model"]


def lines_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("clips_per_second", "wait_share")} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines_of(one) == lines_of(other)


def test_killed_at_ten_random_moments_a_run_ends_with_the_same_weights(config, tmp_path):
    words = ["tests/training/killing.py", config, tmp_path / "runs", "10", "3", "0", "2"]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr + (tmp_path / "log.txt").read_text()
    assert json.loads(result.stdout)["killed"] == 10
    whole, mended = the_run(tmp_path / "runs_whole"), the_run(tmp_path / "runs")
    assert_same(whole, mended)
    steps = [line["step"] for line in lines_of(mended) if line["kind"] == "step"]
    assert steps == sorted(set(steps))
    assert [line["epoch"] for line in lines_of(mended) if line["kind"] == "epoch"] == [1, 2, 3, 4, 5]
    assert "RESUMING after step" in (tmp_path / "log.txt").read_text()
    assert sorted(p.name for p in mended.iterdir()) == sorted(p.name for p in whole.iterdir())


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, step: int):
    """Let training end with an exception after a step, as a crash would."""
    from training.loop import Run

    train_step = Run.train_step

    def patched(self, stream):
        if self.step == step:
            raise StoppedError
        train_step(self, stream)

    monkeypatch.setattr(Run, "train_step", patched)


def train_and_stop(path, folder, n_steps, monkeypatch):
    """Train to the end in `folder`/whole, and until an error after some steps in `folder`/runs."""
    Runner(7).train(str(path), outputpath=str(folder / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, n_steps)
        with pytest.raises(StoppedError):
            Runner(7).train(str(path), outputpath=str(folder / "runs"))


@pytest.fixture
def stopped(tone_pack, tmp_path, monkeypatch):
    """A run that crashed after 14 steps, with states after 9 and 12: configuration, output path, run folder."""
    path = tmp_path / "config.yaml"
    settings = SETTINGS | LABELS_ONLY | {"train_data": str(tone_pack), "eval_data": str(tone_pack), "num_workers": 0}
    path.write_text(yaml.safe_dump(settings))
    train_and_stop(path, tmp_path, 14, monkeypatch)
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/*/*/run.json"))
    assert sorted(p.name for p in (folder / "states").glob("*.pt")) == ["step=000000009.pt", "step=000000012.pt"]
    return path, tmp_path / "runs", folder


def test_random_band_edges_and_positions_are_the_same_ones_after_a_stop(tone_pack, tmp_path, monkeypatch):
    arguments = {"depth": 1, "patch_stride": 16, "time_patch_out": 1, "fmin_aug_range": 10, "fmax_aug_range": 2000}
    settings = SETTINGS | LABELS_ONLY | {"train_data": str(tone_pack), "eval_data": str(tone_pack), "num_workers": 0}
    settings |= {"model": "passt_pico", "model_args": arguments, "epochs": 2, "accumulate": 2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    train_and_stop(path, tmp_path, 5, monkeypatch)
    Runner(7).train(str(path), outputpath=str(tmp_path / "runs"))
    folder = the_run(tmp_path / "runs")
    assert "RESUMING after step 3 of" in (folder / "train.log").read_text()
    assert_same(the_run(tmp_path / "whole"), folder)
    path.write_text(yaml.safe_dump(settings | {"model_args": arguments | {"fmin_aug_range": 1, "fmax_aug_range": 1}}))
    Runner(7).train(str(path), outputpath=str(tmp_path / "fixed"))
    fixed, varied = weights_of(the_run(tmp_path / "fixed")), weights_of(folder)
    assert any(not torch.equal(fixed[key], varied[key]) for key in varied)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif how == "one bit":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:  # killed between the state and its seal
        path.with_suffix(".json").unlink()


@pytest.mark.parametrize("how", ["truncated", "zeroed", "one bit", "half written"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_logs_it(stopped, how, caplog):
    path, output, folder = stopped
    damage(folder / "states" / "step=000000012.pt", how)
    Runner(7).train(str(path), outputpath=str(output))
    log = (folder / "train.log").read_text()
    assert "step=000000012.pt" in caplog.text + log
    assert "RESUMING after step 9 of 20" in log
    assert_same(the_run(output.parent / "whole"), the_run(output))


def test_with_no_whole_checkpoint_left_it_stops_rather_than_start_from_scratch(stopped, capsys):
    path, output, folder = stopped
    for state in (folder / "states").glob("*.pt"):
        damage(state, "zeroed")
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(output))
    assert "none of the checkpoints step=000000012.pt, step=000000009.pt is valid" in capsys.readouterr().err


def test_a_path_goes_on_with_that_run_or_that_state(stopped):
    path, output, folder = stopped
    Runner(7).train(str(path), outputpath=str(output), resume=str(folder / "states" / "step=000000009.pt"))
    assert "RESUMING after step 9 of 20" in (folder / "train.log").read_text()
    assert_same(the_run(output.parent / "whole"), the_run(output))


def test_a_state_without_what_it_learns_is_gone_on_from_as_well(stopped):
    """States that were written before the check of what is learnt have no such part."""
    path, output, folder = stopped
    state = torch.load(folder / "states" / "step=000000012.pt", weights_only=True)
    del state["learning"]
    States(folder / "states").save(12, state)
    Runner(7).train(str(path), outputpath=str(output))
    assert "RESUMING after step 12 of 20" in (folder / "train.log").read_text()
    one, other = weights_of(the_run(output.parent / "whole")), weights_of(the_run(output))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_may_change_changes_nothing_and_what_may_not_is_named(stopped, capsys):
    path, output, folder = stopped
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(output), resume=str(folder), mixup=0.3, batch_size=4)
    assert "another mixup, batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        Runner(8).train(str(path), outputpath=str(output), resume=str(folder))
    assert "another seed" in capsys.readouterr().err
    Runner(7).train(str(path), outputpath=str(output), resume=str(folder), num_workers=2, checkpoint_every=5)
    assert_same(the_run(output.parent / "whole"), the_run(output))


def test_a_new_run_beside_an_unfinished_one_logs_why(stopped, capsys):
    path, output, folder = stopped
    Runner(7).train(str(path), outputpath=str(output), mixup=0.3)
    assert f"{folder} is unfinished and is not resumed: it has another mixup" in capsys.readouterr().err
    assert not RunFolder(folder).finished
    assert len(list(output.glob("*/*/*/finished.json"))) == 2  # the new one, and `latest` that leads to it


def test_a_run_in_use_is_left_alone(stopped, monkeypatch):
    _, _, folder = stopped
    identity = json.loads((folder / "run.json").read_text())["identity"]
    code = f"from training.run_folder import RunFolder; from pathlib import Path; f = RunFolder(Path({str(folder)!r}))"
    code += "; assert f.lock(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr("training.run_folder.LOCK_SECONDS", 0.3)
        with pytest.raises(UserError, match="the same run, and another process is training it"):
            choose_folder(folder.parent, identity, "auto")
        assert not choose_folder(folder.parent, identity, "never")[2]
        with pytest.raises(UserError, match="another process is training it"):
            choose_folder(folder.parent, identity, str(folder))
        holder.kill()
    assert choose_folder(folder.parent, identity, "auto")[2]


def test_going_back_to_an_older_state_and_being_stopped_again_is_no_dead_end(stopped, monkeypatch):
    path, output, folder = stopped
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(StoppedError):
            Runner(7).train(str(path), outputpath=str(output), resume=str(folder / "states" / "step=000000009.pt"))
    Runner(7).train(str(path), outputpath=str(output))
    assert_same(the_run(output.parent / "whole"), the_run(output))


def test_with_the_checkpoints_gone_it_stops_rather_than_start_from_scratch(stopped, capsys):
    path, output, folder = stopped
    written = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "states")
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(output))
    assert "are missing; restore them" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == written


def test_weights_that_are_not_finite_are_never_saved(tone_pack, tmp_path, monkeypatch, capsys):
    """A finite loss may have a gradient that is not."""
    step = Trainer.step

    def poisoned(self, parts, weights, number):
        losses = step(self, parts, weights, number)
        if number == 4:
            with torch.no_grad():
                self.loss_module.model.norm.weight.mul_(torch.nan)
        return losses

    monkeypatch.setattr(Trainer, "step", poisoned)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"train_data": str(tone_pack), "checkpoint_every": 5, "log_every": 100}))
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(tmp_path / "runs"))
    assert "the weights are not finite after step 5" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("step=*.pt")] == ["step=000000000.pt"]


def test_states_keep_two_and_forget_what_is_redone(tmp_path):
    states = States(tmp_path)
    for step in (0, 5, 10):
        states.save(step, {"step": step})
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step=000000005.pt", "step=000000010.pt"]
    states.save(7, {"step": 7})
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step=000000005.pt", "step=000000007.pt"]
    assert states.load() == {"step": 7}
    assert not list(tmp_path.glob(".*"))
    states.clear()
    assert not os.path.exists(tmp_path)
