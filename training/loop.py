"""The one loop: batch after batch, evaluation, checkpoints, and a state to go on from wherever it is stopped."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from audio.dataset import loader_workers
from common.errors import UserError, some
from distill.batch import Batch
from distill.dataset import EpochBatches, ReplayDataset, collate
from distill.objectives import Objective
from distill.random_streams import Stream, stream_seed
from models import AudioTagger
from training.averaging import MovingAverage
from training.chance import Chance, chance_bounds
from training.checkpoints import BestCheckpoints
from training.config import TrainConfig
from training.data import TrainingData
from training.evaluate import predict_pack
from training.finish import finish_run
from training.journal import Journal
from training.labelled import LabelledPack
from training.learning_causes import likely_causes
from training.learning_check import LearningCheck
from training.metrics import Metrics, evaluate_scores
from training.optim import create_optimizer, create_schedule, freeze, parameter_groups
from training.parallel import Ranks, mirrored_shares
from training.precision import Precision
from training.report import draw_curves
from training.states import States
from training.student import check_lengths, start_from_data
from training.tally import Tally
from training.teacher import Teacher
from training.trainer import Learner, Trainer

logger = logging.getLogger(__name__)

START_BATCHES = 16  # looked at by init_from_data


class Run:
    """One training run in one folder.

    Args:
        config: of the run.
        data: what it learns from.
        model: the student.
        objective: what it is trained towards.
        folder: gets states, checkpoints, `metrics.jsonl`, curves, results and the report.
        device: to train on.
        seed: of everything random.
        ranks: the processes that train together.
        teacher: is asked for the targets, on its device; None where `data` brings them.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        model: AudioTagger,
        objective: Objective,
        folder: Path,
        device: torch.device,
        seed: int,
        ranks: Ranks | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.data, self.model, self.folder, self.device = config, data, model, folder, device
        self.seed, self.ranks, self.teacher = seed, ranks or Ranks(), teacher
        self.precision = Precision(config.mode, device)
        self.embeds = getattr(objective, "needs_embedding", False)
        self.dataset = ReplayDataset(
            data.pack,
            data.source,
            sorted({model.sample_rate, *objective.sample_rates, *(teacher.sample_rates if teacher else ())}),
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
            stream_seed(seed, Stream.ORDER),
            weights=data.balance,
            cut_passes=config.epoch_length is None,
            split=self._my_shares,
        )
        self.epoch_steps = config.epoch_length or self.batches.batches_a_pass
        self.total_steps = self.epoch_steps * config.epochs
        frozen = list(config.freeze)
        if self.embeds and objective.wants is None:  # nothing is asked of its last layers
            frozen.append(f"{model.last_layer.split('.')[0]}.*")
        self.resting = freeze(model, frozen) if frozen else []
        groups = parameter_groups(model, objective, config.optimizer_args.get("lr"), config.layer_decay)
        optimizer = create_optimizer(config.optimizer, groups, config.optimizer_args, device)
        self.warmup = 0  # steps
        schedule = self._schedule(optimizer) if config.use_scheduler else None
        mixup_on = config.mixup_on if config.mixup is not None else None
        learner = Learner(model, objective, data.source.replay, mixup_on, config.compile, teacher)
        self._make_trainer = partial(Trainer, learner, optimizer, schedule, self.precision, seed)
        if hasattr(model, "generator"):  # patch-out draws from here
            setattr(model, "generator", torch.Generator(device))  # noqa: B010
        self.states = States(folder / "states")
        self.best = BestCheckpoints(folder, config.n_saved, writes=self.ranks.is_main)
        self.window, self.epoch_tally = Tally(), Tally()
        causes = partial(likely_causes, self)
        learns = (learner.targets, self.total_steps, config.epochs, causes, self.ranks, not config.smoke)
        self.learning = LearningCheck(*learns)
        self.step, self.stale, self.seconds = 0, 0, 0.0
        self._next_drawing = 0.0
        self._unread: list[tuple[Tensor, Tensor]] = []  # items and loss of each step since the last look

    def _my_shares(self, n: int) -> Any:
        first = self.ranks.rank * self.config.accumulate
        return mirrored_shares(n, self.n_parts)[first : first + self.config.accumulate]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        config, total = self.config, self.total_steps
        warmup = config.warmup_iters or 0 if config.warmup_epochs is None else config.warmup_epochs * self.epoch_steps
        if warmup >= total:
            logger.warning("warm-up of %d iterations in a run of %d: shortened to %d", warmup, total, total // 10)
            warmup = total // 10
        self.warmup = warmup
        return create_schedule(optimizer, config.schedule, warmup, total, config.decay_frac)

    def loader(self, batches: Any) -> Iterable[Batch]:
        """Return a loader of batches of (epoch, item)."""
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=loader_workers(self.config.num_workers),
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def fit(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train, validate, average; return the figures of the final model and the path of its weights.

        Args:
            state: of `training.states` to go on from, on rank 0; None to begin at the beginning.
        """
        state = self.ranks.from_main(state)
        if state is None and self.config.init_from_data:
            first = [self.batches.batch(i) for i in range(min(START_BATCHES, self.epoch_steps))]
            classes = "target" if not self.embeds else "labels" if self.data.item_labels is not None else None
            start_from_data(self.model, (self._with_target(batch) for batch in self.loader(first)), classes)
        self.trainer = self._make_trainer(
            grad_clip=self.config.grad_clip,
            average=MovingAverage(self.model, self.config.ema) if self.config.ema else None,
            ranks=self.ranks,
            resting=self.resting,
        )
        if state is not None:
            self._load(state)
        self.journal = Journal(self.folder, state["journal"] if state else 0) if self.ranks.is_main else None
        if state is None:
            self._save()
        self.batches.start = self.step
        # One endless stream: workers read ahead into the next epoch, since each index says its epoch.
        stream = iter(self.loader(self.batches))
        self._train(stream)
        del stream  # ends the workers, which would read ahead for ever
        result = finish_run(self)
        if self.journal is not None:
            self.journal.close()
        return result

    def time_steps(self, most: int, most_seconds: float) -> float:
        """Return the seconds a step takes, data included, without the first two; the model is trained meanwhile.

        Args:
            most: steps to time.
            most_seconds: to spend on them, once one has been timed.
        """
        self.trainer = self._make_trainer(grad_clip=self.config.grad_clip, ranks=self.ranks, resting=self.resting)
        self.trainer.train_mode()
        stream, taken = iter(self.loader(self.batches)), []
        self._began()
        for step in range(2 + most):
            began = time.perf_counter()
            self._advance(stream)
            float(self._unread.pop()[1])  # waits for the device; what it is does not matter here
            taken += [time.perf_counter() - began] if step > 1 else []
            if sum(taken) > most_seconds:
                break
        return sum(taken) / len(taken)

    def _with_target(self, batch: Batch) -> Batch:
        """Move a batch to the device, and ask the teacher, where there is one, for the targets of its clips."""
        batch = batch.to(self.device)
        if self.teacher is None or self.embeds:
            return batch
        return replace(batch, target=self.teacher.probabilities(batch, self.data.source.replay.spectrogram))

    def _train(self, stream: Iterator[Batch]) -> None:
        self.trainer.train_mode()
        self._began()
        with tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="batch",
            dynamic_ncols=True,
            disable=not self.ranks.is_main,
            mininterval=0.1 if sys.stderr.isatty() else 30,
        ) as progress:
            while self.step < self.total_steps and self.stale < self.config.early_stop:
                self._advance(stream)
                progress.update()
                ends = self.step % self.epoch_steps == 0
                if self.step % self.config.log_every == 0 or ends:
                    progress.set_postfix(self._look(), refresh=False)
                if ends:
                    self._end_epoch()
                    self.trainer.train_mode()
                    self._began()
                every = self.config.checkpoint_every or self.epoch_steps
                if self.step % every == 0 or self.step == self.total_steps or self.stale >= self.config.early_stop:
                    self._save()
        if self.stale >= self.config.early_stop:
            logger.info("early stop: %d validations without a better mAP", self.stale)

    def _began(self) -> None:
        self.clips, self.waited, self.began = 0, 0.0, time.perf_counter()

    def _advance(self, stream: Iterator[Batch]) -> None:
        n = self.batches.size(self.step)
        sizes = [len(share) for share in mirrored_shares(n, self.n_parts)]
        weights = [len(share) / sum(sizes) for share in self._my_shares(n)]
        asked = time.perf_counter()
        parts = [next(stream).to(self.device) for _ in weights]
        self.waited += time.perf_counter() - asked
        losses = self.trainer.step(parts, weights, self.step)
        self.step += 1
        self.clips += n
        self._unread.append((torch.cat([part.item for part in parts]), losses["loss"]))
        self.window.add(losses)
        self.epoch_tally.add(losses)

    @property
    def epoch(self) -> int:
        """The epoch of the step made last, from 1."""
        return math.ceil(self.step / self.epoch_steps)

    @property
    def learning_rate(self) -> float:
        """That of the topmost layers."""
        return max(group["lr"] for group in self.trainer.optimizer.param_groups)

    def _look(self) -> dict[str, str]:
        """Read the losses, which waits for the device; return what the progress bar shows."""
        self._stop_if_not_finite()
        losses = self.window.means(self.ranks)
        place = {"kind": "step", "step": self.step, "epoch": self.epoch}
        self._record(place | losses | {"lr": self.learning_rate})
        self.learning.add_loss(losses["loss"])
        self.window.reset()
        seconds = time.perf_counter() - self.began
        return {
            "epoch": str(self.epoch),
            "loss": f"{losses['loss']:.4g}",  # one averaged over an embedding's width is far below 1
            "lr": f"{self.learning_rate:.1e}",
            "clips_s": f"{self.clips / seconds:.0f}",
            "wait": f"{100 * self.waited / seconds:.0f}%",
            **self.learning.postfix,
        }

    def _stop_if_not_finite(self) -> None:
        losses = torch.stack([loss for _, loss in self._unread]) if self._unread else torch.zeros(1)
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        found = [entry for entry in self.ranks.of_all((bad[0], losses[bad[0]].item()) if bad else None) if entry]
        if found:
            first, loss = min(found)
            held = self.ranks.of_all([self.dataset.name(int(item)) for item in self._unread[first][0]])
            names = [name for names in held for name in names]
            raise UserError(
                f"the loss is {loss}; training stops here. That batch held {some(names, 64)}. Look at those clips, or "
                "lower the learning rate or set grad_clip, which begins a new run"
            )
        self._unread = []

    def _end_epoch(self) -> None:
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        entry: dict[str, Any] = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self.epoch,
            **self.epoch_tally.means(self.ranks),
            "lr": self.learning_rate,
            "clips_per_second": self.clips / seconds,
            "wait_share": self.waited / seconds,
        }
        self.epoch_tally.reset()
        judged = self.data.valid and (self.epoch % self.config.valid_every == 0 or self.step == self.total_steps)
        metrics = chance = None
        if judged:
            with self.averaged():
                metrics, chance = self._validate()
                better = self.best.offer(self.model, metrics.mAP, self.epoch)
            self.stale = 0 if better else self.stale + 1
            entry |= {"valid_mAP": metrics.mAP, "best": better}
            logger.info(
                "epoch %d: loss %.4g, mAP %.4f%s", self.epoch, entry["loss"], metrics.mAP, " (best)" if better else ""
            )
        ends = self.step == self.total_steps or self.stale >= self.config.early_stop
        self._record(entry | self.learning.end_epoch(entry, metrics, chance, last=ends))
        if judged and self.journal is not None and time.perf_counter() >= self._next_drawing:
            began = time.perf_counter()
            draw_curves(self.folder, self.journal.entries())
            # Where evaluations follow each other fast, drawing takes no more than a twentieth of the time.
            self._next_drawing = began + 20 * (time.perf_counter() - began)

    def averaged(self) -> Any:
        """Let the model hold the moving average inside a `with` block, where there is one."""
        return self.trainer.average.applied() if self.trainer.average else nullcontext()

    def evaluate(self, which: str) -> Metrics:
        """Judge the model as it is on the `valid` or `evaluation` pack."""
        return self.evaluate_on(getattr(self.data, which))

    def evaluate_on(self, data: LabelledPack) -> Metrics:
        """Judge the model as it is on a labelled pack."""
        return evaluate_scores(self._scores_on(data), data.multi_hot(), self.model.labels)

    def _validate(self) -> tuple[Metrics, Chance]:
        """Judge the model on the validation pack, and return what chance would give there as well."""
        assert self.data.valid is not None
        scores, targets = self._scores_on(self.data.valid), self.data.valid.multi_hot()
        chance = chance_bounds(scores, targets, stream_seed(self.seed, Stream.CHANCE, self.epoch))
        return evaluate_scores(scores, targets, self.model.labels), chance

    def _scores_on(self, data: LabelledPack) -> np.ndarray:
        """Return the probabilities (N, C) of every clip, the same on all ranks."""
        return predict_pack(
            self.model,
            data.pack,
            batch_size=self.config.eval_batch_size or self.config.batch_size,
            num_workers=self.config.num_workers,
            precision=self.precision,
            ranks=self.ranks,
        )

    def _record(self, entry: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.record(entry)

    def _save(self) -> None:
        """Write a state that this run, killed at any moment from now on, goes on from."""
        # A state that holds nonsense would be no help; a finite loss may have had a gradient that was not.
        self._stop_if_not_finite()
        weights = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not all(bool(value.isfinite().all()) for value in weights):
            raise UserError(
                f"the weights are not finite after step {self.step}; training stops here, and the last checkpoint is "
                "from before. Lower the learning rate or set grad_clip, which begins a new run"
            )
        tallies = [tally.state_dict(self.ranks) for tally in (self.window, self.epoch_tally)]
        learning = self.learning.state_dict()
        if self.journal is not None:
            state = {
                "step": self.step,
                "trainer": self.trainer.state_dict(),
                "tallies": tallies,
                "best": [list(entry) for entry in self.best.saved],
                "stale": self.stale,
                "learning": learning,
                "seconds": self.seconds,
                "journal": self.journal.position(),
            }
            self.states.save(self.step, state)
        self.best.prune()

    def _load(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        for tally, kept in zip((self.window, self.epoch_tally), state["tallies"], strict=True):
            tally.load_state_dict(kept, self.ranks, self.device)
        self.best.saved = [(score, name) for score, name in state["best"]]
        self.best.needed = {path.name for path in self.folder.glob("best_epoch=*.pt")}
        self.learning.load_state_dict(state.get("learning"), self.device)
        self.step, self.stale, self.seconds = state["step"], state["stale"], state["seconds"]
        logger.info("GOING ON after step %d of %d, in %s", self.step, self.total_steps, self.folder)
