"""Several processes train as one: the same gradients, every clip once, the same figures, one writer."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.errors import Faults
from distill.dataset import EpochBatches
from models import load_model
from run import Runner
from tests.conftest import ROOT, run_command, torchrun
from tests.processes import find_children, find_processes, start_ranks, wait_until
from tests.training.test_resume import LABELS_ONLY, SETTINGS, lines_of, the_run, weights_of
from training.evaluate import evaluate
from training.labelled import open_labelled
from training.parallel import split_mirrored
from training.precision import Precision


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 31, 32])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_shares_hold_every_position_once_together_with_its_mirror(n, parts):
    shares = split_mirrored(n, parts)
    assert len(shares) == parts
    if (n + 1) // 2 < parts:
        assert all(share.tolist() == list(range(n)) for share in shares)
        return
    assert sorted(np.concatenate(shares).tolist()) == list(range(n))
    for share in shares:
        assert (n - 1 - share[::-1]).tolist() == share.tolist()


def test_the_batches_of_two_ranks_are_those_of_one(tmp_path):
    def first(split, n):
        stream = iter(EpochBatches(np.arange(10, 31), 6, seed=3, split=split))
        return [next(stream) for _ in range(n)]

    whole = first(None, 8)
    halves = [first(lambda n, rank=rank: [split_mirrored(n, 2)[rank]], 8) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    assert sorted(item for batch in whole[:4] for _, item in batch) == list(range(10, 31))


def configure(tmp_path: Path, tone_pack: Path, **changes) -> Path:
    path = tmp_path / "config.yaml"
    data = {"train_data": str(tone_pack), "eval_data": str(tone_pack), "log_every": 1, "num_workers": 0}
    # no dropout: which values it drops cannot be the same in another process
    arguments = {"model_args": {"pooling": "logit", "depth": 2, "time_patch_out": 1}}
    path.write_text(yaml.safe_dump(SETTINGS | LABELS_ONLY | data | arguments | changes))
    return path


def train(path: Path, output: Path, *words: str | Path, launcher: tuple[str, ...] = ()) -> Path:
    result = run_command(*launcher, "run.py", "train", path, "--outputpath", output, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    return the_run(output)


def train_here(path: Path, output: Path, **overrides) -> Path:
    """As `train`, in this process."""
    Runner().train(str(path), outputpath=str(output), **overrides)
    return the_run(output)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 8, "epochs": 17},
        # batches of five, the last of a pass being one clip, which both ranks see at half its weight
        pytest.param(
            {"batch_size": 5, "epochs": 10, "grad_clip": 1.0, "mixup_on": "waveform", "ema": None},
            marks=pytest.mark.long,
        ),
    ],
    ids=["plain", "uneven"],
)
def test_two_ranks_follow_the_curve_of_one_process_and_evaluate_alike(tone_pack, tmp_path, changes):
    path = configure(tmp_path, tone_pack, valid_every=5, **changes)
    alone = train_here(path, tmp_path / "one")
    together = train(path, tmp_path / "two", launcher=torchrun())
    for figure in ("loss", "grad_norm"):
        one, two = ([line[figure] for line in lines_of(f) if line["kind"] == "step"] for f in (alone, together))
        assert len(one) >= 50
        np.testing.assert_allclose(two, one, rtol=1e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (alone, together)]
    thresholds = [[row.pop("EER_threshold") for row in result["per_class"]] for result in results]
    np.testing.assert_allclose(*thresholds, rtol=1e-3)  # scores, which differ by rounding
    assert results[0] == results[1]
    valid = [[line["valid_mAP"] for line in lines_of(f) if "valid_mAP" in line] for f in (alone, together)]
    assert valid[0] == valid[1]
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())


def test_gradients_in_parts_are_those_of_the_whole(tone_pack, tmp_path):
    """Without batch norm, whose statistics are those of a part."""
    arguments = {"pooling": "logit", "depth": 2, "init_bn": False}
    path = configure(tmp_path, tone_pack, model_args=arguments, batch_size=7, epochs=6, optimizer_args={"lr": 0.001})
    whole = train_here(path, tmp_path / "whole")
    parts = train_here(path, tmp_path / "parts", accumulate=3)
    for figure in ("loss", "grad_norm"):
        one, other = ([line[figure] for line in lines_of(f) if line["kind"] == "step"] for f in (whole, parts))
        np.testing.assert_allclose(one, other, rtol=1e-5)


RESTARTED = """
import os, sys, time
from training.parallel import process_group

again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if again and os.environ["RANK"] == "0":
    time.sleep(2)  # the other rank asks where this one listens before it listens anywhere
with process_group() as ranks:
    if not again:
        sys.exit(1)
    with open(f"{sys.argv[1]}/{ranks.rank}", "w") as file:  # not printed: two processes may write into one line
        file.write(str(ranks.gather(ranks.rank)))
"""


def test_ranks_started_again_find_each_other_whichever_is_first(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    result = run_command(*torchrun(), "--max-restarts", "1", script, tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["[0, 1]", "[0, 1]"]


@pytest.mark.long
def test_a_rank_that_dies_is_started_again_and_training_goes_on(tone_pack, tmp_path):
    path = configure(tmp_path, tone_pack, epochs=12, num_workers=1)
    whole = train(path, tmp_path / "whole", launcher=torchrun())
    words = ["run.py", "train", str(path), "--outputpath", str(tmp_path / "runs")]
    with start_ranks(*words, options=("--max-restarts", "2")) as launcher:
        wait_until(lambda: list((tmp_path / "runs").glob("*/*/*/states/step=00000001*.json")))
        os.kill(find_children(launcher.pid)[-1], signal.SIGKILL)
        output = launcher.communicate()[0]
    assert launcher.returncode == 0, output
    folder = the_run(tmp_path / "runs")
    assert "RESUMING after step" in (folder / "train.log").read_text()
    assert lines_of(folder) == lines_of(whole)
    a, b = weights_of(folder), weights_of(whole)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 4), (signal.SIGSTOP, 5)], ids=["killed", "frozen"])
def test_a_rank_that_is_killed_or_frozen_is_named_by_the_other_which_ends(tone_pack, tmp_path, rank, number, seconds):
    path = configure(tmp_path, tone_pack, epochs=10000, num_workers=1, rank_timeout=5)
    words = ["run.py", "train", str(path), "--outputpath", str(tmp_path / "runs")]
    with start_ranks(*words) as launcher:
        wait_until(lambda: list((tmp_path / "runs").glob("*/*/*/states/step=00000001*.json")))
        pid = find_children(launcher.pid)[rank]
        os.kill(pid, number)
        output = launcher.communicate(timeout=90)[0]  # torchrun itself waits 30 s for a frozen process
    assert re.search(rf"error: rank {rank} \(process {pid} on \S+\) does not respond for {seconds} s", output), output
    assert "the same command resumes from the last state in" in output
    time.sleep(1)
    assert not find_processes(launcher.pid)


@pytest.mark.long
def test_two_ranks_recompute_batch_norm_alike_and_choose_the_same_weights(tone_pack, tmp_path):
    arguments = {"model": "mn01_as", "model_args": {}, "ema": None, "valid_fraction": None}
    path = configure(tmp_path, tone_pack, valid_data=str(tone_pack), valid_every=1, batch_size=8, epochs=3, **arguments)
    folder = train(path, tmp_path / "two", launcher=torchrun())
    finished = json.loads((folder / "finished.json").read_text())
    figures = [finished[f"valid_mAP_{name}"] for name in ("average", "best", "best_recomputed")]
    model = load_model(folder)
    data = open_labelled(str(tone_pack), model.labels, Faults("the test"))
    precision = Precision("fp32", torch.device("cpu"))
    alone = evaluate(model, data, batch_size=4, num_workers=0, precision=precision).mAP
    assert finished["mAP"] == pytest.approx(max(figures), abs=1e-4)
    assert alone == pytest.approx(max(figures), abs=1e-4)
