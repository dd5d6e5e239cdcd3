"""A gradient that is not finite changes nothing, and stops the run with the names of its clips."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import yaml

from common.errors import UserError
from distill.objectives import plan_objective
from distill.replay import Replay
from models import create_model
from tests.batches import make_batch
from tests.conftest import run_command, torchrun
from tests.training import methods  # noqa: F401  (it registers its objectives)
from tests.training.test_loop import settings
from training.averaging import MovingAverage
from training.guarded_step import GuardedStep, find_updated_buffers
from training.loss_module import LossModule
from training.optim import create_optimizer, parameter_groups
from training.precision import Precision
from training.prepare import prepare_run
from training.trainer import Trainer

CPU = torch.device("cpu")
OPTIMISERS = {
    "Adam": ("Adam", {"lr": 0.01}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "SGD": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "foreach": ("Adam", {"lr": 0.01, "foreach": True}),
}


def build(optimiser="AdamW", grad_clip=None, model_name="resnet10_small"):
    torch.manual_seed(0)
    model = create_model(model_name, num_classes=3)
    plan = plan_objective("bad_gradient", item=9, epoch=1)
    losses = LossModule(model, plan.build(model), plan.needs, Replay(), None)
    name, arguments = OPTIMISERS[optimiser]
    optimizer = create_optimizer(name, parameter_groups(model, losses.objective), dict(arguments), CPU)
    average = MovingAverage(model, 0.9)
    trainer = Trainer(losses, optimizer, None, Precision("fp32", CPU), 1, 9, grad_clip=grad_clip, average=average)
    trainer.train_mode()
    return trainer


def parts(*, bad, seed=0):
    """A batch in two parts, the second of which holds item 9 where it is bad."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for items in ([1, 2], [3, 9 if bad else 4]):
        wave = torch.randn(2, 8000, generator=generator) * 0.1
        target = torch.rand(2, 3, generator=generator)
        made.append(make_batch(item=torch.tensor(items), waveforms={16000: wave}, target=target))
    return made


def states_of(trainer):
    return copy.deepcopy((trainer.loss_module.model.state_dict(), trainer.optimizer.state_dict()["state"]))


@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_bad_step_leaves_weights_statistics_and_averages(optimiser, grad_clip, good_steps):
    trainer = build(optimiser, grad_clip)
    for step in range(good_steps):
        trainer.step(parts(bad=False, seed=step), [0.5, 0.5], step)
    (model, moments), average = states_of(trainer), copy.deepcopy(trainer.average.average)
    losses = trainer.step(parts(bad=True, seed=7), [0.5, 0.5], good_steps)
    assert math.isfinite(losses["loss"])
    assert not math.isfinite(losses["grad_norm"])
    after, moments_after = states_of(trainer)
    buffers = {name for name, _ in trainer.loss_module.model.named_buffers()}
    assert any("running_mean" in name for name in buffers)
    fused = optimiser != "foreach"
    for name, value in model.items():
        if name in buffers or fused or not good_steps:
            assert torch.equal(after[name], value), name  # a momentum of an unfused optimiser moves weights on
        assert after[name].isfinite().all()
    if fused:
        for number, entries in moments.items():
            assert all(
                torch.equal(torch.as_tensor(entries[k]), torch.as_tensor(moments_after[number][k])) for k in entries
            )
    if fused and not good_steps:  # an average of equal weights is these weights
        assert all(torch.equal(trainer.average.average[name], value) for name, value in average.items())
    assert all(value.isfinite().all() for value in trainer.average.average.values())
    losses = trainer.step(parts(bad=False, seed=8), [0.5, 0.5], good_steps + 1)  # and it can go on
    assert math.isfinite(losses["grad_norm"])
    later, _ = states_of(trainer)
    assert all(value.isfinite().all() for value in later.values())
    assert any(not torch.equal(later[name], value) for name, value in after.items())


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_good_step_is_the_plain_one_to_the_bit(optimiser):
    trainer, plain = build(optimiser, 0.05), build(optimiser)
    model, optimizer = plain.loss_module.model, plain.optimizer
    for step in range(3):
        losses = trainer.step(parts(bad=False, seed=step), [0.5, 0.5], step)
        plain._seed_step(step)
        for part in parts(bad=False, seed=step):
            (plain.loss_module(part)["loss"] * 0.5).backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        norm = torch.nn.utils.clip_grad_norm_(plain.guard.parameters, 0.05)
        assert torch.equal(losses["grad_norm"], norm)  # before it is clipped
        assert norm > 0.05
        assert norm.item() == pytest.approx(whole.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in model.state_dict().items():
            assert torch.equal(trainer.loss_module.model.state_dict()[name], value), name


def test_running_means_of_an_objective_leave_out_a_bad_step():
    """The tokens themselves are finite in a step whose gradient is not."""
    torch.manual_seed(0)
    model = create_model("matpac_pico", num_classes=0, depth=1)
    plan = plan_objective("matpac", classes=8)
    losses = LossModule(model, plan.build(model), plan.needs, Replay(), None)
    optimizer = create_optimizer("AdamW", parameter_groups(model, losses.objective), {"lr": 0.01}, CPU)
    trainer = Trainer(losses, optimizer, None, Precision("fp32", CPU), 1, 9)
    trainer.train_mode()
    kept = {}
    for step, scale in enumerate((1.0, math.inf, 1.0)):
        hook = model.norm.bias.register_hook(lambda gradient, scale=scale: gradient * scale)
        trainer.step(parts(bad=False, seed=step), [0.5, 0.5], step)
        hook.remove()
        means = {name: value for name, value in losses.objective.state_dict().items() if name.endswith("mean")}
        changed = {name for name, value in means.items() if name in kept and not torch.equal(value, kept[name])}
        assert bool(changed) == (step == 2), changed
        kept = copy.deepcopy(means)
    assert {"centre.mean", "class_mean.mean", "variance.running.mean"} <= kept.keys()


def test_only_what_a_step_changes_is_kept():
    model = create_model("audiotransformer_pico", num_classes=2)
    objective = plan_objective("masked_reconstruction").build(model)
    assert len(find_updated_buffers(model, objective)) == 3  # of init_bn; those of the frozen average stay
    model.init_bn.requires_grad_(False)
    assert not find_updated_buffers(model, objective)
    guard = GuardedStep(torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False), [], None)
    guard.keep_buffers()


@pytest.fixture
def config(tone_pack, tmp_path):
    changes = {
        "objective": "bad_gradient",
        "loss": "BCELoss",
        "init_from_data": False,
        "log_every": 2,
        "epochs": 4,
        "checkpoint_every": 1,
    }
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings(tone_pack, **changes).model_dump(exclude_unset=True)))
    return path


def bad_step(config):
    run = prepare_run(str(config), {"outputpath": str(config.parent / "other")}, 1).run
    return next(step for step in range(100) if (2, 5) in run.batches.batch(step)), run


def test_a_run_stops_with_the_names_and_keeps_the_state_before(config, tmp_path):
    step, run = bad_step(config)
    with pytest.raises(UserError) as error:
        prepare_run(str(config), {"outputpath": str(tmp_path / "runs")}, 1).fit()
    names = {run.dataset.name(item) for _, item in run.batches.batch(step)}
    assert re.search(rf"the norm of the gradient is (inf|nan) in step {step + 1};", str(error.value))
    assert set(re.findall(r"sounds/tone_\d+\.wav", str(error.value))) == names
    (folder,) = (tmp_path / "runs").glob("*/*/*/states")
    newest = max(folder.glob("step=*.pt"))
    assert newest.name == f"step={step:09d}.pt"  # none is written after the bad step
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)


def test_all_processes_skip_the_step_of_one_of_them(config, tmp_path):
    step, run = bad_step(config)
    words = ("--seed", "1", "train", config, "--outputpath", tmp_path / "runs")
    result = run_command(*torchrun(), "tests/training/methods/train.py", *words)
    assert result.returncode != 0
    assert re.search(rf"the norm of the gradient is (inf|nan) in step {step + 1};", result.stderr)
    for _, item in run.batches.batch(step):
        assert run.dataset.name(item) in result.stderr
    (folder,) = (tmp_path / "runs").glob("*/*/*/states")
    assert max(folder.glob("step=*.pt")).name == f"step={step:09d}.pt"


def test_a_bad_first_step_ends_the_run_at_once(tone_pack, tmp_path):
    """Also where losses are read later, and in a run that goes on."""
    changes = {
        "objective": "bad_gradient",
        "loss": "BCELoss",
        "objective_args": {"epoch": 1},
        "init_from_data": False,
        "log_every": 99,
    }
    changes |= {"batch_size": 28, "optimizer": "SGD", "optimizer_args": {"lr": 0.01, "momentum": 0.9}, "epochs": 3}
    path = tmp_path / "first.yaml"
    path.write_text(yaml.safe_dump(settings(tone_pack, **changes).model_dump(exclude_unset=True)))
    for _ in range(2):
        with pytest.raises(UserError, match=r"norm of the gradient is (inf|nan) in step 1; "):
            prepare_run(str(path), {"outputpath": str(tmp_path / "runs")}, 1).fit()
    assert len(list((tmp_path / "runs").glob("*/*/*/run.json"))) == 1


def test_under_float16_a_step_that_overflows_is_skipped_and_nothing_ends():
    """With a scaler whose scale is far too large at first, on tensors of float32: the same code as on a GPU."""
    trainer = build("SGD")
    trainer.guard.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    trainer.precision.scaler = scaler
    before, _ = states_of(trainer)
    large = [replace(part, target=1000 * part.target) for part in parts(bad=False)]
    losses = trainer.step(large, [0.5, 0.5], 0)
    after, _ = states_of(trainer)
    assert losses["grad_norm"] == 0  # no mean is spoilt
    assert all(torch.equal(after[name], value) for name, value in before.items())
    scales = [scaler.get_scale()]
    for step in range(1, 130):
        losses = trainer.step(large, [0.5, 0.5], step)
        scales.append(scaler.get_scale())
        if losses["grad_norm"] > 0:
            break
    assert losses["grad_norm"] > 0
    assert scales == sorted(scales, reverse=True)
    later, _ = states_of(trainer)
    assert any(not torch.equal(later[name], value) for name, value in before.items())


def test_a_state_of_an_earlier_version_proves_nothing_of_an_objective_without_parameters():
    trainer, other = build(), build()
    trainer.step(parts(bad=False), [0.5, 0.5], 0)
    state = copy.deepcopy(trainer.state_dict())
    assert not state.pop("objective")
    other.load_state_dict(state)
    for one in (trainer, other):
        one.step(parts(bad=False, seed=1), [0.5, 0.5], 1)
    (model, moments), (same, same_moments) = states_of(trainer), states_of(other)
    assert all(torch.equal(same[name], value) for name, value in model.items())
    assert moments.keys() == same_moments.keys()
