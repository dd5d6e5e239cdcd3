"""The one step that trains everything; what differs is the objective and the source of its targets."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.batch import Batch
from distill.random_streams import Stream, stream_seed
from training.averaging import MovingAverage
from training.guarded_step import GuardedStep, find_updated_buffers
from training.loss_module import LossModule
from training.parallel import Ranks, share_batch_norm
from training.precision import Precision


class Trainer:
    """Student and objective, and how they learn.

    Args:
        loss_module: on its device.
        optimizer: its parameters are those of student and objective.
        schedule: stepped once a step, or None.
        precision: the context to compute in.
        seed: of dropout, stochastic depth and patch-out, which are drawn anew for each step as a pure function of it.
        total_steps: of the run.
        grad_clip: largest norm of the gradient, or None.
        average: updated after each step, or None.
        ranks: the processes that train together.
        frozen_modules: stay in evaluation mode.
    """

    def __init__(
        self,
        loss_module: LossModule,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        precision: Precision,
        seed: int,
        total_steps: int,
        *,
        grad_clip: float | None = None,
        average: MovingAverage | None = None,
        ranks: Ranks | None = None,
        frozen_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.loss_module, self.optimizer, self.schedule, self.precision = loss_module, optimizer, schedule, precision
        self.seed, self.total_steps, self.average, self.frozen_modules = seed, total_steps, average, frozen_modules
        self.ranks = ranks or Ranks()
        self.wrapped: nn.Module = loss_module
        model, objective = loss_module.model, loss_module.objective
        if self.ranks.world_size > 1:
            share_batch_norm(model)
            unused = not loss_module.needs.whole_student
            self.wrapped = DistributedDataParallel(loss_module, broadcast_buffers=False, find_unused_parameters=unused)
        self.guard = GuardedStep(optimizer, precision.scaler, find_updated_buffers(model, objective), grad_clip)

    def train_mode(self) -> None:
        """Switch to training, after an evaluation, say."""
        self.loss_module.train()
        for module in self.frozen_modules:
            module.eval()

    def step(self, parts: Sequence[Batch], weights: Sequence[float], number: int) -> dict[str, Tensor]:
        """Learn from one batch; a gradient that is not finite changes nothing.

        Args:
            parts: of the batch, on the device; several where gradients are accumulated, so that one at a time fits.
            weights: the share of each part in the whole batch, over all ranks.
            number: of the step, from 0.

        Returns:
            This rank's share of the batch's mean losses and of `grad_norm`, the norm of its gradient before it is
            clipped, still on the device.
        """
        self._draw_from(number)
        self.guard.keep_buffers()
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
        total["grad_norm"] = self.guard.step() / self.ranks.world_size  # all have the same one
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update()
        self.loss_module.objective.after_step(self.loss_module.model, number + 1, self.total_steps)
        return total

    def _draw_from(self, number: int) -> None:
        """Set the random state of a step: patch-out is the same on all ranks, dropout is each one's own."""
        seed = stream_seed(self.seed, Stream.DROPOUT, number, self.ranks.rank)
        # As `torch.manual_seed`, which writes down a stack for every device that is not in use: 0.3 ms a step.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        if self.loss_module.model.generator is not None:
            self.loss_module.model.generator.manual_seed(stream_seed(self.seed, Stream.PATCH_OUT, number))

    def _gradients_join(self, last: bool) -> Any:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, as tensors and plain values."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, part in self._parts().items():
            if name == "objective":
                part.load_state_dict(state.get(name, {}))  # earlier versions left out an empty one
            elif name != "scaler" or state[name]:  # empty where float16 was not used
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.loss_module.model, "optimizer": self.optimizer}
        parts |= {"schedule": self.schedule, "scaler": self.precision.scaler, "average": self.average}
        parts["objective"] = self.loss_module.objective
        return {name: part for name, part in parts.items() if part is not None}
