"""The number of epochs that fit into a time budget: `epochs: auto` with `budget` minutes on this machine."""

import copy
import math
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.temporary import temporary_folder
from training.automatic import Choice
from training.config import TrainConfig
from training.labelled import LabelledPack
from training.loop import Run, RunParts
from training.student import starts_without_classes

DEFAULT_MINUTES = 10.0
TIMED_STEPS, TIMED_SECONDS = 12, 15.0  # at most, after two warm-up steps
TIMED_VALID_CLIPS = 64
RESERVE = 0.85  # share of the budget that is planned: other programs run too, and checkpoints are written
MAX_VALIDATIONS = 20
# After so many clips, within these numbers of passes, small networks stopped improving on sets of 50 to 3,000 clips.
ENOUGH_CLIPS, MIN_PASSES, MAX_PASSES = 60_000, 20, 200
FINE_TUNING = 0.2  # factor of that for runs that start from trained weights
WARMUP = 0.05  # share of a run
# A run of fewer passes is cut into so many shorter epochs: the warm-up, of one epoch at least, would be half of two.
SHORTEST_RUN = 10


@dataclass(frozen=True)
class Timing:
    """Durations of the parts of a run on this machine.

    Attributes:
        step_seconds: of one optimiser step, loading its data included.
        valid_seconds: of one validation; 0 without validation data.
    """

    step_seconds: float
    valid_seconds: float


def time_run(config: TrainConfig, parts: RunParts, world_size: int = 1) -> Timing:
    """Time a few steps and a validation on copies; changes neither the arguments nor the global random state.

    Args:
        config: configuration of the run, with any number of epochs.
        parts: data, student, objective and teacher.
        world_size: number of processes of the run; one is timed, with its share of a batch.
    """
    update = {"use_scheduler": False, "compile": False, "accumulate": 1, "init_from_data": False}
    size = max(1, config.batch_size // world_size)
    single_config = config.model_copy(update=update | {"batch_size": size, "epochs": 1_000_000})
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), temporary_folder() as folder:
        copies = replace(parts, model=copy.deepcopy(parts.model), objective=copy.deepcopy(parts.objective))
        run = Run(single_config, copies, folder)
        valid = parts.data.valid
        return Timing(_time_steps(run), 0.0 if valid is None else _time_validation(run, valid))


def _time_steps(run: Run) -> float:
    """Return the mean seconds of a step, loading its data included."""
    run.trainer = run.create_trainer()
    run.trainer.train_mode()
    stream, step_seconds = iter(run.loader(run.batches)), []
    run.start_timer()
    for step in range(2 + TIMED_STEPS):
        start_time = time.perf_counter()
        run.train_step(stream)
        float(run.finite_check.steps.pop()[1])  # reading the loss waits for the device
        step_seconds += [time.perf_counter() - start_time] if step > 1 else []
        if sum(step_seconds) > TIMED_SECONDS:
            break
    return sum(step_seconds) / len(step_seconds)


def _time_validation(run: Run, valid: LabelledPack) -> float:
    """Return the seconds of a validation, extrapolated from some of its clips."""
    rows = np.unique(np.linspace(0, len(valid.pack) - 1, min(TIMED_VALID_CLIPS, len(valid.pack))).round().astype(int))
    part = LabelledPack(valid.pack.subset(rows), [valid.labels[row] for row in rows], valid.num_classes)
    start_time = time.perf_counter()
    run.evaluate(part)
    return (time.perf_counter() - start_time) * len(valid.pack) / len(rows)


def choose_epochs(config: TrainConfig, n_items: int, timing: Timing, *, saturates: bool = True) -> dict[str, Choice]:
    """Choose the number of epochs, the interval of validations, and the warm-up.

    Args:
        config: configuration of the run, with any number of epochs.
        n_items: number of training chunks.
        timing: see `time_run`.
        saturates: whether more than `ENOUGH_CLIPS` gain little, which is so with labels or a teacher.

    Returns:
        `epochs`, `valid_every` and `warmup_epochs`, and `epoch_length` if the budget is less than a few passes.
    """
    step_seconds, valid_seconds = timing.step_seconds, timing.valid_seconds
    minutes = config.budget or DEFAULT_MINUTES
    seconds = RESERVE * 60 * minutes
    pass_steps = config.epoch_length or math.ceil(n_items / config.batch_size)
    scale = 1.0 if starts_without_classes(config.model, config.pretrained) else FINE_TUNING
    passes = np.clip(ENOUGH_CLIPS / (pass_steps * config.batch_size), MIN_PASSES, MAX_PASSES)
    enough = math.ceil(scale * passes)
    n_validations = min(MAX_VALIDATIONS, max(3, int(0.2 * seconds / max(valid_seconds, 1e-3))))
    training_seconds = max(seconds - n_validations * valid_seconds, 0.5 * seconds)
    if not saturates:
        enough = sys.maxsize
    affordable = training_seconds / (pass_steps * step_seconds)
    measured = f"{minutes:g} minutes at {step_seconds:.3g} s a step"
    chosen: dict[str, Choice] = {}
    if affordable < min(enough, SHORTEST_RUN) and config.epoch_length is None:
        length = max(1, int(training_seconds / step_seconds / SHORTEST_RUN))
        share = SHORTEST_RUN * length / pass_steps
        chosen["epoch_length"] = Choice(length, f"{measured} are {share:.2g} passes over the data")
        epochs, reason = SHORTEST_RUN, f"of {length} steps each, which fill the budget"
    elif affordable < enough:
        epochs, reason = max(1, int(affordable)), f"{measured}, {pass_steps} steps a pass"
    else:
        estimate = enough * pass_steps * step_seconds / 60
        reason = f"more passes over these clips gain little; about {estimate:.1f} of {minutes:g} minutes"
        epochs = enough
    chosen["epochs"] = Choice(epochs, reason)
    return chosen | choose_pace(epochs, n_validations)


def choose_pace(epochs: int, n_validations: int = MAX_VALIDATIONS) -> dict[str, Choice]:
    """Return `valid_every` and `warmup_epochs` for a number of epochs."""
    every = max(1, math.ceil(epochs / n_validations))
    return {
        "valid_every": Choice(every, f"{math.ceil(epochs / every)} validations"),
        "warmup_epochs": Choice(max(1, round(WARMUP * epochs)), f"{WARMUP:.0%} of the run"),
    }
