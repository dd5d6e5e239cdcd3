"""The one step and the one loop that train everything; what differs is the objective and the source of its targets."""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from audio.dataset import loader_workers
from common.errors import UserError, some
from distill.dataset import EpochBatches, ReplayDataset, collate, prepare_batch
from distill.objectives import Objective
from distill.replay import Replay
from models import AudioTagger
from training.checkpoints import BestCheckpoints
from training.config import TrainConfig
from training.data import TrainingData
from training.evaluate import evaluate, write_results
from training.metrics import Metrics
from training.mixup import mix_with_flipped
from training.optim import create_optimizer, parameter_groups, warmup_cosine
from training.precision import Precision
from training.student import start_from_data

logger = logging.getLogger(__name__)

ORDER_STREAM, MIXUP_STREAM, DROP_STREAM = 2, 3, 4  # keep the run's random streams apart
START_BATCHES = 16  # looked at by init_from_data
READ_LOSS_EVERY = 10  # iterations; reading a loss waits for the device


def stream_seed(seed: int, stream: int) -> int:
    """Return a seed for one of the random streams of a run."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


class Trainer:
    """A model, what it is trained towards and how.

    Args:
        model: the student.
        objective: output and batch → losses.
        optimizer: its parameters are the model's.
        schedule: stepped once an iteration, or None.
        precision: the context to compute in.
        replay: the augmentation of the batches' draws.
        mixup: alpha of the Beta distribution, or None.
        seed: of mixup.
    """

    def __init__(
        self,
        model: AudioTagger,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        precision: Precision,
        replay: Replay,
        mixup: float | None,
        seed: int,
    ) -> None:
        self.model, self.objective, self.optimizer, self.schedule = model, objective, optimizer, schedule
        self.precision, self.replay, self.mixup = precision, replay, mixup
        self.mixup_stream = np.random.default_rng([seed, MIXUP_STREAM])

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Learn from one batch; return its losses, still on the device."""
        with self.precision.context():
            mel, n_frames = self.replay.spectrogram(self.model.front_end, batch)
            if self.mixup is not None:
                mel, n_frames, batch = mix_with_flipped(mel, n_frames, batch, self.mixup, self.mixup_stream)
            losses = self.objective(self.model.forward_spectrogram(mel, n_frames), batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.precision.scaler.scale(losses["loss"]).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.schedule is not None:
            self.schedule.step()
        return losses


class Run:
    """One training run in one folder.

    Args:
        config: of the run.
        data: what it learns from.
        model: the student.
        objective: what it is trained towards.
        folder: gets checkpoints, `metrics.jsonl` and the results.
        device: to train on.
        seed: of everything random.
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
    ) -> None:
        self.config, self.data, self.model, self.folder, self.device = config, data, model, folder, device
        self.precision = Precision(config.mode, device)
        self.dataset = ReplayDataset(
            data.pack,
            data.source,
            sorted({model.sample_rate, *objective.sample_rates}),
            fresh_masks=config.disable_consistency,
            seed=seed,
        )
        self.batches = EpochBatches(
            len(self.dataset),
            config.batch_size,
            stream_seed(seed, ORDER_STREAM),
            weights=data.balance,
            cut_passes=config.epoch_length is None,
        )
        self.iterations = config.epoch_length or math.ceil(len(self.dataset) / config.batch_size)
        parameters = parameter_groups(model, objective)
        optimizer = create_optimizer(config.optimizer, parameters, config.optimizer_args, device)
        schedule = self._schedule(optimizer) if config.use_scheduler else None
        self.trainer = Trainer(
            model, objective, optimizer, schedule, self.precision, data.source.replay, config.mixup, seed
        )
        self.best = BestCheckpoints(folder, config.n_saved)
        if hasattr(model, "generator"):  # patch-out draws from here
            generator = torch.Generator(device).manual_seed(stream_seed(seed, DROP_STREAM))
            setattr(model, "generator", generator)  # noqa: B010

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        config, total = self.config, self.iterations * self.config.epochs
        warmup = config.warmup_iters if config.warmup_epochs is None else config.warmup_epochs * self.iterations
        if warmup >= total:
            logger.warning("warm-up of %d iterations in a run of %d: shortened to %d", warmup, total, total // 10)
            warmup = total // 10
        return warmup_cosine(optimizer, warmup, total, config.decay_frac)

    def fit(self) -> dict[str, Any]:
        """Train, validate, average; return the figures of the final model and the path of its weights."""
        config = self.config
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=loader_workers(config.num_workers),
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        # One endless stream: workers read ahead into the next epoch, since each index says its epoch.
        stream: Iterator[dict[str, Any]] = iter(loader)
        if config.init_from_data:
            first = list(itertools.islice(stream, min(START_BATCHES, self.iterations)))
            start_from_data(self.model, (prepare_batch(batch, self.device) for batch in first))
            stream = itertools.chain(first, stream)  # they are trained on as well
        stale = 0
        total = self.iterations * config.epochs
        with tqdm(total=total, desc="train", unit="batch", dynamic_ncols=True) as progress:
            for epoch in range(1, config.epochs + 1):
                entry = self._epoch(epoch, stream, progress)
                if self.data.valid and (epoch % config.valid_every == 0 or epoch == config.epochs):
                    metrics = self.evaluate("valid")
                    better = self.best.offer(self.model, metrics.mAP, epoch)
                    stale = 0 if better else stale + 1
                    entry["valid_mAP"] = metrics.mAP
                    logger.info(
                        "epoch %d: loss %.4f, mAP %.4f%s",
                        epoch,
                        entry["loss"],
                        metrics.mAP,
                        " (best)" if better else "",
                    )
                self._record(entry)
                if stale >= config.early_stop:
                    logger.info("early stop: %d validations without a better mAP", stale)
                    break
        del stream, loader  # ends the workers, which would read ahead for ever
        return self._finish()

    def _epoch(self, epoch: int, stream: Iterator[dict[str, Any]], progress: tqdm) -> dict[str, Any]:
        self.model.train()
        totals: dict[str, Tensor] = {}
        clips, began, waited = 0, time.perf_counter(), 0.0
        for iteration in range(1, self.iterations + 1):
            asked = time.perf_counter()
            batch = prepare_batch(next(stream), self.device)
            waited += time.perf_counter() - asked
            losses = {name: value.detach() for name, value in self.trainer.step(batch).items()}
            totals = {name: totals.get(name, 0.0) + value for name, value in losses.items()}
            clips += len(batch["item"])
            progress.update()
            if iteration % READ_LOSS_EVERY == 0 or iteration == self.iterations:
                self._stop_if_not_finite(losses["loss"], batch)
                seconds = time.perf_counter() - began
                progress.set_postfix(
                    epoch=epoch,
                    loss=f"{totals['loss'].item() / iteration:.4f}",
                    lr=f"{self.trainer.optimizer.param_groups[0]['lr']:.1e}",
                    clips_s=f"{clips / seconds:.0f}",
                    wait=f"{100 * waited / seconds:.0f}%",
                )
        return {
            "epoch": epoch,
            **{name: total.item() / self.iterations for name, total in totals.items()},
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "clips_per_second": clips / (time.perf_counter() - began),
        }

    def _stop_if_not_finite(self, loss: Tensor, batch: dict[str, Any]) -> None:
        if not math.isfinite(loss.item()):
            names = some((self.dataset.name(int(item)) for item in batch["item"]), 32)
            raise UserError(
                f"the loss is {loss.item()}; training stops here. The batch read last held {names}. Lower the "
                "learning rate, or look at those clips"
            )

    def evaluate(self, which: str) -> Metrics:
        """Judge the model as it is on the `valid` or `evaluation` pack."""
        data = getattr(self.data, which)
        return evaluate(
            self.model,
            data,
            batch_size=self.config.eval_batch_size or self.config.batch_size,
            num_workers=self.config.num_workers,
            precision=self.precision,
        )

    def _record(self, entry: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _finish(self) -> dict[str, Any]:
        if not self.best.saved:
            self.best.offer(self.model, 0.0, self.config.epochs)
        weights = self.best.average(self.model) if self.config.average else self.best.restore_best(self.model)
        result: dict[str, Any] = {"weights": str(weights)}
        if self.data.evaluation:
            metrics = self.evaluate("evaluation")
            write_results(self.folder, "results", metrics, self.data.evaluation)
            logger.info("%s on %s:\n%s", weights.name, self.config.eval_data, metrics.summary())
            result |= metrics.as_dict()
        return result
