"""A run that is stopped finishes its step, saves a state and ends; resumed, it ends as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
import yaml

from common import interrupts
from models.base import AudioTagger
from run import Runner
from tests.conftest import ROOT
from tests.processes import find_children, start_ranks, wait_until
from tests.training.test_resume import LABELS_ONLY, SETTINGS, assert_same, lines_of, the_run, weights_of
from training.trainer import Trainer

SMALL = {"model_args": {"pooling": "logit", "depth": 1, "time_patch_out": 1}, "epochs": 3, "num_workers": 0}


@pytest.fixture(scope="module")
def config(tone_pack, tmp_path_factory):
    path = tmp_path_factory.mktemp("stop") / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | LABELS_ONLY | SMALL | {"train_data": str(tone_pack)}))
    return path


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that nothing stops."""
    Runner(7).train(str(config), outputpath=str(config.parent / "whole"))
    return the_run(config.parent / "whole")


def signal_at(monkeypatch, place, method, call, number):
    """Send a signal to this process at a call of a method."""
    calls, original = [], getattr(place, method)

    def patched(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(place, method, patched)


@pytest.mark.parametrize(
    ("place", "method", "call", "number", "step"),
    [
        # neither at the end of an epoch nor after a regular state
        pytest.param(Trainer, "step", 5, signal.SIGTERM, 5, marks=pytest.mark.long),
        # the last step of an epoch, which is validated when resumed
        pytest.param(Trainer, "step", 4, signal.SIGINT, 4, marks=pytest.mark.long),
        (AudioTagger, "predict", 3, signal.SIGHUP, 8),  # in the second epoch
    ],
    ids=["within an epoch", "at its end", "while it is validated"],
)
def test_a_signal_saves_the_step_and_the_resumed_run_is_the_same(
    config, whole, tmp_path, monkeypatch, capsys, place, method, call, number, step
):
    with monkeypatch.context() as patch:
        signal_at(patch, place, method, call, number)
        with pytest.raises(SystemExit) as stopped:
            Runner(7).train(str(config), outputpath=str(tmp_path / "runs"))
    assert stopped.value.code == 128 + number
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/*/*/run.json"))
    message = f"stopped: the state after step {step} of 12 is in {folder}, and the same command resumes from it\n"
    assert capsys.readouterr().err.endswith(message)
    assert not list(folder.rglob("*.partial*"))
    Runner(7).train(str(config), outputpath=str(tmp_path / "runs"))
    assert f"RESUMING after step {step} of 12" in (folder / "train.log").read_text()
    assert_same(whole, the_run(tmp_path / "runs"))


def test_without_checkpoint_on_stop_the_run_ends_within_the_step(config, tmp_path, monkeypatch, capsys):
    signal_at(monkeypatch, Trainer, "step", 5, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        Runner(7).train(str(config), outputpath=str(tmp_path / "runs"), checkpoint_on_stop=False)
    assert stopped.value.code == 143
    assert "stopped: the state after step 3 of 12 is in" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("step=*.pt")) == ["step=000000000.pt", "step=000000003.pt"]


def test_a_stopped_run_is_not_resumed_over_other_sounds_under_the_same_names(tone_pack, tmp_path, monkeypatch, capsys):
    shutil.copytree(tone_pack.parent.parent, tmp_path / "pack")
    pack = tmp_path / "pack" / "labels" / tone_pack.name
    pack.write_text(pack.read_text().replace(str(tone_pack.parent.parent), str(tmp_path / "pack")))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | LABELS_ONLY | SMALL | {"train_data": str(pack)}))
    signal_at(monkeypatch, Trainer, "step", 1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(tmp_path / "runs"))
    (shard,) = (tmp_path / "pack").rglob("*.h5")
    with h5py.File(shard, "r+") as file:
        file["samples"][4000] += 1
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/*/*/run.json"))
    with pytest.raises(SystemExit):
        Runner(7).train(str(path), outputpath=str(tmp_path / "runs"), resume=str(folder))
    assert "that run has another train_sounds_sha256" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("signalled", ["one rank", "all ranks", "the process group"])
def test_two_ranks_stop_after_the_same_step_and_resume_exactly(tone_pack, tmp_path, signalled):
    path = tmp_path / "config.yaml"
    settings = SMALL | {"train_data": str(tone_pack), "epochs": 60, "num_workers": 1, "checkpoint_every": 100}
    path.write_text(yaml.safe_dump(SETTINGS | LABELS_ONLY | settings | {"batch_size": 8, "valid_every": 60}))

    def start(output):
        return start_ranks("run.py", "train", path, "--outputpath", tmp_path / output)

    with start("whole") as launcher:
        output = launcher.communicate()[0]
        assert launcher.returncode == 0, output
    with start("runs") as launcher:
        wait_until(lambda: any(p.stat().st_size > 500 for p in tmp_path.glob("runs/*/*/*/metrics.jsonl")))
        pids = find_children(launcher.pid)
        if signalled == "the process group":  # with the launcher and the loader processes, as a scheduler does
            os.killpg(launcher.pid, signal.SIGTERM)
        for pid in {"one rank": pids[1:], "all ranks": pids}.get(signalled, []):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.05)
        output = launcher.communicate()[0]
    (folder,) = (p.parent for p in tmp_path.glob("runs/*/*/*/run.json"))
    (newest,) = [p for p in (folder / "states").glob("step=*.pt") if p.name != "step=000000000.pt"]
    step = int(newest.stem.split("=")[1])
    assert f"stopped: the state after step {step} of" in output
    assert "Error" not in output.split("stopped: ")[0]
    with start("runs") as launcher:
        output = launcher.communicate()[0]
    assert f"RESUMING after step {step} of" in (folder / "train.log").read_text(), output
    one, other = the_run(tmp_path / "whole"), the_run(tmp_path / "runs")
    assert lines_of(one) == lines_of(other)
    a, b = weights_of(one), weights_of(other)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_repeated_signal_is_the_same_stop_and_a_later_one_ends_at_once():
    code = (
        "import os, signal, sys, time\n"
        "from common import interrupts\n"
        "interrupts.REPEAT_SECONDS = float(sys.argv[1])\n"
        "with interrupts.respond_to_signals(lambda number: print('saving', flush=True)):\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.05)\n"
        "print('saved')\n"
    )
    for seconds, status, output in (("5", 0, "saving\nsaved\n"), ("0", 143, "saving\n")):
        result = subprocess.run([sys.executable, "-c", code, seconds], cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (status, output)
        assert result.stderr == ("\nstopped at once\n" if status else "")
    assert interrupts.REPEAT_SECONDS >= 1  # a launcher needs a moment to pass a signal on
