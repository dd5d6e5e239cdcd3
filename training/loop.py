"""The training loop: steps, evaluation, checkpoints, and states to resume from."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from audio.dataset import ClipLoader
from common.interrupts import StopSignal
from distill.batch import Batch
from distill.dataset import EpochBatches, ReplayDataset, collate
from distill.objectives import Needs, Objective
from distill.objectives.collapse import WATCHED
from distill.random_streams import Stream, derive_seed
from models import AudioTagger, Ensemble
from training.averaging import MovingAverage
from training.chance import compute_chance_bounds
from training.checkpoints import BestCheckpoints
from training.config import TrainConfig
from training.data import TrainingData
from training.evaluate import predict_pack
from training.finish import finish_run
from training.finite_check import FiniteCheck
from training.journal import Journal
from training.labelled import LabelledPack
from training.learning_causes import find_likely_causes
from training.learning_check import LearningCheck
from training.loss_module import LossModule, add_teacher_output
from training.metrics import Metrics, evaluate_scores
from training.optim import count_warmup, create_optimizer, create_schedule, freeze, parameter_groups
from training.parallel import Ranks, split_mirrored
from training.precision import Precision
from training.report import draw_curves
from training.run_state import initialise_from_data, load_state, save_state
from training.states import States
from training.stopping import StopRequest
from training.student import check_lengths
from training.tally import Tally, TargetTally
from training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """What a run is built from, besides its configuration and folder.

    Attributes:
        data: training, validation and evaluation data.
        model: the student, on `device`.
        objective: computes the losses, on `device`.
        needs: requirements of the objective.
        device: device of the training.
        seed: of everything random.
        teacher: the online teacher, on `device`; None if `data` has the targets, or there are none.
    """

    data: TrainingData
    model: AudioTagger
    objective: Objective
    needs: Needs
    device: torch.device
    seed: int
    teacher: Ensemble | None = None


class Run:
    """One training run in one folder; `fit` runs it from the first step to the report.

    Args:
        config: configuration of the run.
        parts: data, student, objective and teacher.
        folder: for states, checkpoints, `metrics.jsonl`, curves, results and the report.
        ranks: the processes of the run.
    """

    def __init__(self, config: TrainConfig, parts: RunParts, folder: Path, ranks: Ranks | None = None) -> None:
        data, model, objective, needs = parts.data, parts.model, parts.objective, parts.needs
        device, seed, teacher = parts.device, parts.seed, parts.teacher
        self.config, self.folder, self.ranks = config, folder, ranks or Ranks()
        self.data, self.model, self.objective, self.needs = data, model, objective, needs
        self.device, self.seed, self.teacher = device, seed, teacher
        self.precision = Precision(config.mode, device)
        self.dataset = ReplayDataset(
            data.pack,
            data.source,
            sorted({model.sample_rate, *needs.sample_rates, *(teacher.sample_rates if teacher else ())}),
            labels=data.item_labels,
            clusters=data.clusters,
            consistent=not config.disable_consistency,
            mixup=config.mixup,
            seed=seed,
            fill_seconds=data.chunk_seconds if config.fill_chunks else None,
            fill_by="repeat" if config.fill_chunks == "repeat" else "silence",
        )
        if not config.fill_chunks:
            check_lengths(model, data.source.n_reference[data.items], self.ranks.world_size)
        self.n_parts = self.ranks.world_size * config.accumulate
        self.batches = EpochBatches(
            data.items,
            config.batch_size,
            derive_seed(seed, Stream.ORDER),
            weights=data.balance,
            cut_passes=config.epoch_length is None,
            split=self._split_for_rank,
        )
        self.epoch_steps = config.epoch_length or self.batches.batches_per_pass
        self.total_steps = self.epoch_steps * config.epochs
        self.warmup = count_warmup(config, self.epoch_steps, self.total_steps)
        frozen = list(config.freeze)
        if needs.output is None:  # the last layers get no gradient
            frozen.append(f"{model.last_layer.split('.')[0]}.*")
        self.frozen_modules = freeze(model, frozen) if frozen else []
        model.generator = torch.Generator(device)  # for patch-out and random mel bands
        self.states = States(folder / "states")
        self.best = BestCheckpoints(folder, config.n_saved, config.select_by, writes=self.ranks.is_main)
        self.window, self.epoch_tally, self.targets = Tally(), Tally(), TargetTally(objective)
        causes = partial(find_likely_causes, self)
        self.learning = LearningCheck(
            self.targets,
            self.total_steps,
            config.epochs,
            causes,
            self.ranks,
            objective.describe_collapse,
            enabled=not config.smoke,
        )
        self.step, self.validations_without_improvement, self.seconds = 0, 0, 0.0
        self.epoch_is_open = False  # the last step ended an epoch, which is not validated yet
        self.saved_step = 0
        if self.ranks.heartbeat is not None:
            self.ranks.heartbeat.timeout = config.rank_timeout
            self.ranks.heartbeat.hint = f"the same command resumes from the last state in {folder}"
        self.stop = StopRequest(self.ranks, enabled=config.checkpoint_on_stop)
        self.journal: Journal | None = None
        self._next_drawing = 0.0
        self.finite_check = FiniteCheck(
            self.dataset.name, self.ranks, check_norms=not self.precision.scaler.is_enabled()
        )

    def fit(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train to the end; return the metrics of the final model and the path of its weights.

        Args:
            state: a state of `training.states` to resume from, on rank 0; None to start at step 0.
        """
        config, state = self.config, self.ranks.broadcast(state)
        if state is None and config.init_from_data:
            initialise_from_data(self)
        if state is None:
            self.objective.start(self.model)
        self.trainer = self.create_trainer()
        if state is not None:
            load_state(self, state)
        self.journal = Journal(self.folder, state["journal"] if state else 0) if self.ranks.is_main else None
        if state is None:
            save_state(self)
        try:
            with self.stop.listen():
                self._train()
            result = finish_run(self)
        except BaseException as error:  # of a stop, a full disk, a loader process that has died
            error.add_note(
                f"the state after step {self.saved_step} of {self.total_steps} is in {self.folder}, and the same "
                "command resumes from it"
            )
            raise
        if self.journal is not None:
            self.journal.close()
        return result

    def _train(self) -> None:
        """Make all remaining steps."""
        config = self.config
        self.batches.start = self.step
        # One endless iterator: an index holds its epoch, so workers prefetch across epochs.
        stream = iter(self.loader(self.batches))
        self.trainer.train_mode()
        self.start_timer()
        if self.epoch_is_open:
            self._close_epoch()
        with tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="batch",
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
            mininterval=0.1 if sys.stderr.isatty() else 30,
        ) as progress:
            while not self.is_over:
                self.train_step(stream)
                if not self.trainer.guard.has_stepped:  # the first gradient of this process is not finite: stop now
                    self.finite_check.raise_if_not_finite(self.step)
                progress.update()
                self.epoch_is_open = self.step % self.epoch_steps == 0
                if self.step % config.log_every == 0 or self.epoch_is_open:
                    progress.set_postfix(self._log_step(), refresh=False)
                if number := self.stop.find():
                    self._save_and_stop(number)
                if self.epoch_is_open:
                    self._close_epoch()
                elif config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    save_state(self)
        if self.validations_without_improvement >= config.early_stop:
            n = self.validations_without_improvement
            logger.info("early stop: %d validations without a better %s", n, self.best.metric)
        del stream  # stops the workers, whose sampler is endless
        if number := self.stop.find_now():
            self._save_and_stop(number)

    def _close_epoch(self) -> None:
        """Validate and save; a run that is stopped meanwhile validates when it is resumed."""
        try:
            self._end_epoch()
        except StopSignal as stop:
            if not self.stop.enabled:
                raise
            self._save_and_stop(stop.number)
        self.epoch_is_open = False
        self.trainer.train_mode()
        self.start_timer()
        if self.step % (self.config.checkpoint_every or self.epoch_steps) == 0 or self.is_over:
            save_state(self)

    def _save_and_stop(self, number: int) -> None:
        """Save a state and raise `StopSignal`, on all ranks."""
        if self.saved_step != self.step:
            save_state(self)
        self.ranks.wait()
        raise StopSignal(number)

    def create_trainer(self) -> Trainer:
        """Return the trainer: losses, optimiser, schedule and moving average."""
        config, mixup_on = self.config, self.config.mixup_on if self.config.mixup is not None else None
        losses = LossModule(
            self.model,
            self.objective,
            self.needs,
            self.data.source.replay,
            mixup_on,
            compiled=config.compile,
            add_teacher=None if self.teacher is None else partial(add_teacher_output, self.teacher, self.needs),
            targets=self.targets,
        )
        groups = parameter_groups(self.model, self.objective, config.optimizer_args.get("lr"), config.layer_decay)
        optimizer = create_optimizer(config.optimizer, groups, config.optimizer_args, self.device)
        schedule = None
        if config.use_scheduler:
            schedule = create_schedule(optimizer, config.schedule, self.warmup, self.total_steps, config.decay_frac)
        return Trainer(
            losses,
            optimizer,
            schedule,
            self.precision,
            self.seed,
            self.total_steps,
            grad_clip=config.grad_clip,
            average=MovingAverage(self.model, config.ema) if config.ema else None,
            ranks=self.ranks,
            frozen_modules=self.frozen_modules,
        )

    @property
    def is_over(self) -> bool:
        """Whether all steps have been made, or the run stops early."""
        is_stopped = self.validations_without_improvement >= self.config.early_stop
        return self.step >= self.total_steps or is_stopped

    def _split_for_rank(self, n: int) -> Any:
        """Return the positions of a batch of `n` that this rank computes, one array an accumulated part."""
        first = self.ranks.rank * self.config.accumulate
        return split_mirrored(n, self.n_parts)[first : first + self.config.accumulate]

    def train_step(self, stream: Iterator[Batch]) -> None:
        """Make one step, without waiting for the device."""
        n = self.batches.size(self.step)
        sizes = [len(share) for share in split_mirrored(n, self.n_parts)]
        weights = [len(share) / sum(sizes) for share in self._split_for_rank(n)]
        request_time = time.perf_counter()
        parts = [next(stream).to(self.device) for _ in weights]
        self.wait_seconds += time.perf_counter() - request_time
        losses = self.trainer.step(parts, weights, self.step)
        self.step += 1
        self.clips += n
        self.finite_check.add(torch.cat([part.item for part in parts]), losses["loss"], losses["grad_norm"])
        self.window.add(losses)
        self.epoch_tally.add(losses)

    def loader(self, batches: Any) -> ClipLoader:
        """Return a loader that yields a `distill.batch.Batch` for each batch of (epoch, item)."""
        return ClipLoader(
            self.dataset,
            self.config.num_workers,
            batch_sampler=batches,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def start_timer(self) -> None:
        """Start to measure the speed: clips, and seconds of waiting for data."""
        self.clips, self.wait_seconds, self.start_time = 0, 0.0, time.perf_counter()

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return math.ceil(self.step / self.epoch_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the topmost layers."""
        return max(group["lr"] for group in self.trainer.optimizer.param_groups)

    def _log_step(self) -> dict[str, str]:
        """Read and record the losses, which waits for the device; return the values for the progress bar."""
        self.finite_check.raise_if_not_finite(self.step)
        losses = self.window.means(self.ranks)
        self.best.check_logged(losses)
        self._record({"kind": "step", "step": self.step, "epoch": self.epoch, **losses, "lr": self.learning_rate})
        self.learning.add_loss(losses["loss"])
        self.window.reset()
        seconds = time.perf_counter() - self.start_time
        return {
            "epoch": str(self.epoch),
            "loss": f"{losses['loss']:.4g}",  # a mean over the width of an embedding is far below 1
            "lr": f"{self.learning_rate:.1e}",
            "clips_s": f"{self.clips / seconds:.0f}",
            "wait": f"{100 * self.wait_seconds / seconds:.0f}%",
            **self.learning.postfix,
        }

    def _end_epoch(self) -> None:
        """Validate, update the best checkpoints, and record the epoch."""
        seconds = time.perf_counter() - self.start_time
        self.seconds += seconds
        entry: dict[str, Any] = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self.epoch,
            **self.epoch_tally.means(self.ranks),
            "lr": self.learning_rate,
            "clips_per_second": self.clips / seconds,
            "wait_share": self.wait_seconds / seconds,
        }
        is_due = self.epoch % self.config.valid_every == 0 or self.step == self.total_steps
        metrics = chance = None
        if is_due and (self.data.valid or self.config.select_by):
            with self.averaged():
                if self.data.valid:
                    scores, targets = self.predict(self.data.valid), self.data.valid.multi_hot()
                    chance_seed = derive_seed(self.seed, Stream.CHANCE, self.epoch)
                    chance = compute_chance_bounds(scores, targets, chance_seed)
                    metrics = evaluate_scores(scores, targets, self.model.labels)
                    entry["valid_mAP"] = metrics.mAP
                entry["best"] = self.best.update(self.model, entry, self.epoch)
            is_best = entry["best"]
            self.validations_without_improvement = 0 if is_best else self.validations_without_improvement + 1
            logger.info(
                "epoch %d: loss %.4g%s%s",
                self.epoch,
                entry["loss"],
                f", mAP {metrics.mAP:.4f}" if metrics else "",
                " (best)" if is_best else "",
            )
        elif watched := [f"{name} {entry[name]:.3g}" for name in WATCHED if name in entry]:
            logger.info("epoch %d: loss %.4g, %s", self.epoch, entry["loss"], ", ".join(watched))
        self._record(entry | self.learning.end_epoch(entry, metrics, chance, last=self.is_over))
        self.epoch_tally.reset()
        if metrics and self.journal is not None and time.perf_counter() >= self._next_drawing:
            drawing_start = time.perf_counter()
            draw_curves(self.folder, self.journal.entries())
            # With frequent validations, drawing takes at most a twentieth of the time.
            self._next_drawing = drawing_start + 20 * (time.perf_counter() - drawing_start)

    def averaged(self) -> Any:
        """Return a context in which the model has the weights of the moving average, if there is one."""
        return self.trainer.average.applied() if self.trainer.average else nullcontext()

    def evaluate(self, data: LabelledPack) -> Metrics:
        """Return the metrics of the model with its current weights on a labelled pack."""
        return evaluate_scores(self.predict(data), data.multi_hot(), self.model.labels)

    def predict(self, data: LabelledPack) -> np.ndarray:
        """Return the probabilities (N, C) of every clip, the same on all ranks."""
        return predict_pack(
            self.model,
            data.pack,
            batch_size=self.config.eval_batch_size or self.config.batch_size,
            num_workers=self.config.num_workers,
            precision=self.precision,
            ranks=self.ranks,
            stop=self.stop,
        )

    def _record(self, entry: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.record(entry)
