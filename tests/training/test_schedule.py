"""The learning rate at every step: that of CED's published run, and those that end where a run ends."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common.errors import Faults
from tests.training.test_loop import settings, train
from training.automatic import read_train_config
from training.config import TrainConfig
from training.optim import create_schedule
from training.settings import read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "trainconfig").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if "nsemble5014" in path.name]


def published_rates(warmup, total, decay_frac):
    """What ignite's `create_lr_scheduler_with_warmup` makes of a cosine of `total` steps, written out.

    A line of `warmup` steps whose first is 0 and whose last is the peak, 1; then `total` steps of a cosine, of which a
    run of `total` steps makes only the first.
    """
    line = np.linspace(0.0, 1.0, warmup) if warmup > 1 else np.ones(1)
    angle = np.pi * np.arange(1, total + 1) / total
    cosine = decay_frac + (1 - decay_frac) * (1 + np.cos(angle)) / 2
    return np.concatenate([line, cosine])[:total]


def rates_of(shape, warmup, total, decay_frac, peak=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    factor = create_schedule(optimizer, shape, warmup, total, decay_frac).lr_lambdas[0]
    return peak * np.array([factor(step) for step in range(total)])


@pytest.mark.parametrize(
    ("warmup", "total"),
    [(5000, 300 * 688), (62_500, 300 * 6250), (5000, 6000), (5000, 5001), (2, 7), (1, 7), (0, 7)],
    ids=["AS-20K", "AS-2M", "short", "shortest", "two", "one", "none"],
)
def test_the_published_rate_at_every_step(warmup, total):
    found, wanted = rates_of("ced", warmup, total, 0.1), published_rates(warmup, total, 0.1)
    assert np.abs(found - wanted).max() < 1e-12
    assert found[0] == (0.0 if warmup > 1 else 1.0)
    assert np.flatnonzero(found == 1.0)[0] == max(warmup - 1, 0)  # the peak, exactly
    assert found.max() == 1.0


def test_how_far_a_cosine_that_ends_with_the_run_is_from_the_published_one():
    """A tenth of the peak at the end of a short run, where the published run is at nine tenths."""
    long = np.abs(rates_of("cosine", 62_500, 300 * 6250, 0.1) - published_rates(62_500, 300 * 6250, 0.1))
    assert long.max() == pytest.approx(0.028, abs=5e-4)
    assert rates_of("cosine", 5000, 6000, 0.1)[-1] == pytest.approx(0.1, abs=1e-4)
    assert rates_of("ced", 5000, 6000, 0.1)[-1] == pytest.approx(0.94, abs=5e-3)


@pytest.mark.parametrize("shape", ["ced", "cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
@pytest.mark.parametrize("total", [1, 2, 9])
def test_every_shape_is_defined_from_its_first_step_to_its_last(shape, warmup, total):
    rates = rates_of(shape, warmup, total, 0.1)
    assert np.isfinite(rates).all()
    assert ((rates >= 0) & (rates <= 1)).all()
    assert (np.diff(rates[warmup:]) <= 0).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_eight_published_files_alone_have_the_published_rate(path):
    """They do not name it, as published ones cannot; every other file says which one it means."""
    content = yaml.safe_load(path.read_text())
    faults = Faults(path.name)
    config = read_train_config(path, {}, faults)
    faults.raise_if_any()
    if path in PUBLISHED:
        assert "schedule" not in content
        assert (config.schedule, config.decay_frac, config.use_scheduler) == ("ced", 0.1, True)
    else:
        assert content["schedule"] == config.schedule != "ced"


def test_a_run_of_a_configuration_without_a_schedule_has_the_published_rate(tone_pack, tmp_path):
    """On the optimiser of a real run, step by step; its first step has a rate of 0 and changes no weight."""
    changes = {"epochs": 3, "warmup_epochs": None, "warmup_iters": 4, "valid_every": 3, "log_every": 1}
    config = settings(tone_pack, **changes, init_from_data=False, average=False)
    used, weights = [], []

    def watch(optimizer, *_):
        used.append(optimizer.param_groups[0]["lr"])
        weights.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(watch)
    try:
        _, run = train(tmp_path, config)
    finally:
        hook.remove()
    assert len(used) == run.total_steps == 12
    assert np.abs(np.array(used) - 0.003 * published_rates(4, 12, 0.1)).max() < 1e-12
    same = [all(map(torch.equal, weights[step], weights[step + 1])) for step in range(3)]
    assert same == [True, False, False]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["kind"] == "step"][:11] == used[1:]  # of the step that comes next


@pytest.mark.parametrize("given", ["null", 0])
def test_without_warm_up_a_run_starts_at_its_peak(tone_pack, tmp_path, given):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(tone_pack, epochs=1, valid_every=1, warmup_epochs=None).model_dump()))
    faults = Faults("c.yaml")
    config = read_config(TrainConfig, path, {"warmup_iters": given}, faults)
    faults.raise_if_any()
    assert config.warmup_iters == (None if given == "null" else 0)
    _, run = train(tmp_path / "run", config)
    assert run.warmup == 0
    assert run.trainer.schedule.lr_lambdas[0](0) == 1.0


def test_a_warm_up_longer_than_the_run_is_shortened_with_a_warning(tone_pack, tmp_path, caplog):
    """The published code would end such a run on its way up."""
    _, run = train(tmp_path, settings(tone_pack, epochs=5, warmup_epochs=None, init_from_data=False))
    assert "warm-up of 5000 iterations in a run of 20: shortened to 2" in caplog.text
    assert run.warmup == 2


@pytest.mark.parametrize("shape", ["ced", "cosine"])
def test_a_schedule_that_goes_on_from_a_state_has_the_rates_it_would_have_had(shape):
    def steps(schedule, n):
        rates = []
        for _ in range(n):
            rates.append(schedule.optimizer.param_groups[0]["lr"])
            schedule.optimizer.step()
            schedule.step()
        return rates

    def fresh():
        return create_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3), shape, 5, 20, 0.1)

    whole, first, second = steps(fresh(), 20), fresh(), fresh()
    begun = steps(first, 7)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + steps(second, 13) == whole
