"""The one step that trains everything; what differs is the objective and the source of its targets."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.batch import Batch
from distill.objectives import Objective
from distill.random_streams import Stream, stream_seed
from distill.replay import Replay
from models import AudioTagger
from models.frontends import FrontEnd
from training.averaging import MovingAverage
from training.mixup import mix_spectrograms, mix_targets, mix_waveforms
from training.parallel import Ranks, share_batch_norm
from training.precision import Precision
from training.target_tally import TargetTally
from training.teacher import Teacher


def _network(model: AudioTagger, objective: Objective) -> Callable[[Tensor, Tensor | None], tuple[Any, Any]]:
    """Return what computes what an objective looks at: output (B, C) and embedding (B, E), None where not needed."""
    if not getattr(objective, "needs_embedding", False):
        return lambda mel, n_frames: (model.forward_spectrogram(mel, n_frames), None)
    if objective.wants is None:
        return lambda mel, n_frames: (None, model.embed_spectrogram(mel, n_frames)[0])
    return model.tag_and_embed


class Learner(nn.Module):
    """From a batch to its losses: what is heard, what the student says to that, and what the objective says to it.

    Args:
        model: the student.
        objective: output and batch → losses; its own parameters, if it has any, are trained as well.
        replay: the augmentation of the batches' draws.
        mixup_on: `spectrogram`, `waveform`, or None for no mixup.
        compiled: compile the student's network with `torch.compile`.
        teacher: its answer to what the student hears is the target; None where the batch brings targets.
    """

    def __init__(
        self,
        model: AudioTagger,
        objective: Objective,
        replay: Replay,
        mixup_on: str | None,
        compiled: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.replay, self.mixup_on, self.teacher = replay, mixup_on, teacher
        self.taught_to_embed = getattr(objective, "needs_embedding", False)
        network = _network(model, objective)
        self.network = torch.compile(network) if compiled else network
        self.targets = TargetTally(objective)  # of the batches that were learnt from

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, means over the clips of a batch on the learner's device."""
        if self.mixup_on == "waveform":
            batch = mix_waveforms(batch)
        if self.mixup_on is not None:
            batch = mix_targets(batch)
        if self.teacher is not None:
            ask = self.teacher.embeddings if self.taught_to_embed else self.teacher.probabilities
            batch = replace(batch, target=ask(batch, self._hear))
        self.targets.add(batch)
        mel, n_frames = self._hear(self.model.front_end, batch)
        output, embedding = self.network(mel, n_frames)
        return self.objective(output, replace(batch, mel=mel, n_frames=n_frames, embedding=embedding))

    def spectrogram(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the student's input for a batch, augmented and mixed: (B, F, T), frames (B,) or None."""
        return self._hear(self.model.front_end, mix_waveforms(batch) if self.mixup_on == "waveform" else batch)

    def _hear(self, front_end: FrontEnd, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return what a front-end makes of the clips or their mixtures, masked: (B, F, T), frames (B,) or None."""
        mel, n_frames = self.replay.spectrogram(front_end, batch)
        if self.mixup_on == "spectrogram":
            mel, n_frames = mix_spectrograms(mel, n_frames, batch.mixup_weight)
        return mel, n_frames


class Trainer:
    """A learner and how it learns.

    Args:
        learner: on its device.
        optimizer: its parameters are the learner's.
        schedule: stepped once a step, or None.
        precision: the context to compute in.
        seed: of dropout, stochastic depth and patch-out, which are drawn anew for each step as a pure function of it.
        grad_clip: largest norm of the gradient, or None.
        average: updated after each step, or None.
        ranks: the processes that train together.
        resting: modules that stay in evaluation mode, their parameters being frozen.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        precision: Precision,
        seed: int,
        *,
        grad_clip: float | None = None,
        average: MovingAverage | None = None,
        ranks: Ranks | None = None,
        resting: Sequence[nn.Module] = (),
    ) -> None:
        self.learner, self.optimizer, self.schedule, self.precision = learner, optimizer, schedule, precision
        self.seed, self.grad_clip, self.average, self.resting = seed, grad_clip, average, resting
        self.ranks = ranks or Ranks()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.wrapped: nn.Module = learner
        if self.ranks.world_size > 1:
            share_batch_norm(learner.model)
            self.wrapped = DistributedDataParallel(learner, broadcast_buffers=False)

    def train_mode(self) -> None:
        """Make the learner ready to learn, after an evaluation, say."""
        self.learner.train()
        for module in self.resting:
            module.eval()

    def step(self, parts: Sequence[Batch], weights: Sequence[float], number: int) -> dict[str, Tensor]:
        """Learn from one batch.

        Args:
            parts: of the batch, on the device; several where gradients are accumulated, so that one at a time fits.
            weights: the share of each part in the whole batch, over all ranks.
            number: of the step, from 0.

        Returns:
            This rank's share of the batch's mean losses, still on the device.
        """
        self._draw_from(number)
        total: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            with self._gradients_join(last=i == len(parts) - 1):
                with self.precision.context():
                    losses = self.wrapped(part)
                # Ranks are averaged by DistributedDataParallel; the shares of a batch are summed.
                scaled = losses["loss"] * (weight * self.ranks.world_size)
                self.precision.scaler.scale(scaled).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value.detach() * weight
        if self.grad_clip is not None:
            self.precision.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update()
        return total

    def _draw_from(self, number: int) -> None:
        """Set the random state of a step: patch-out is the same on all ranks, dropout is each one's own."""
        torch.manual_seed(stream_seed(self.seed, Stream.DROPOUT, number, self.ranks.rank))
        generator = getattr(self.learner.model, "generator", None)
        if generator is not None:
            generator.manual_seed(stream_seed(self.seed, Stream.PATCH_OUT, number))

    def _gradients_join(self, last: bool) -> Any:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as tensors and plain values."""
        parts: dict[str, Any] = {"model": self.learner.model, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"scaler": self.precision.scaler, "average": self.average, "objective": self._objective()}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.learner.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where float16 was not used
            self.precision.scaler.load_state_dict(state["scaler"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        objective = self._objective()
        if objective is not None:
            objective.load_state_dict(state["objective"])

    def _objective(self) -> nn.Module | None:
        objective = cast(object, self.learner.objective)
        return objective if isinstance(objective, nn.Module) else None
