"""The training step, the same for all objectives and sources of targets."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.batch import Batch
from distill.objectives.collapse import RunningMean
from distill.random_streams import Stream, derive_seed
from models.quantization import QuantizationSchedule
from training.averaging import MovingAverage
from training.guarded_step import GuardedStep, find_updated_buffers
from training.loss_module import LossModule
from training.parallel import Ranks, share_batch_norm
from training.precision import Precision


class Trainer:
    """Trains student and objective, one batch a step.

    Args:
        loss_module: student and objective, on their device.
        optimizer: the optimiser of their parameters.
        schedule: learning-rate schedule, stepped once a step, or None.
        precision: context of the forward pass.
        seed: of dropout, stochastic depth and patch-out: the random state is set from it and the number of each step.
        total_steps: number of steps of the run.
        grad_clip: largest norm of the gradient, or None.
        average: moving average, updated after each step, or None.
        ranks: the processes of the run.
        frozen_modules: modules that stay in evaluation mode.
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
        self.running_means = [module for module in objective.modules() if isinstance(module, RunningMean)]
        self.quantization = QuantizationSchedule(model)
        self.guard = GuardedStep(optimizer, precision.scaler, find_updated_buffers(model, objective), grad_clip)

    def train_mode(self) -> None:
        """Switch to training mode, after an evaluation for example."""
        self.loss_module.train()
        for module in self.frozen_modules:
            module.eval()

    def step(self, parts: Sequence[Batch], weights: Sequence[float], number: int) -> dict[str, Tensor]:
        """Make one optimiser step; the optimiser skips a gradient that is not finite.

        Args:
            parts: parts of the batch, on the device; several if gradients are accumulated.
            weights: share of each part in the whole batch, over all ranks.
            number: number of the step, from 0.

        Returns:
            This rank's share of the mean losses of the batch and of `grad_norm`, the norm of the gradient before
            clipping, on the device.
        """
        self._seed_step(number)
        self.quantization.advance(number, self.total_steps)
        self.guard.keep_buffers()
        total: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            with self._sync_gradients(last=i == len(parts) - 1):
                with self.precision.context():
                    losses = self.wrapped(part)
                # DistributedDataParallel averages over ranks, but the shares of a batch must be summed.
                scaled = losses["loss"] * (weight * self.ranks.world_size)
                self.precision.scaler.scale(scaled).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value.detach() * weight
        total["grad_norm"] = self.guard.step() / self.ranks.world_size  # the same on all ranks, whose shares are summed
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update()
        for running in self.running_means:
            running.total.copy_(self.ranks.sum(running.total))
        self.loss_module.objective.after_step(self.loss_module.model, number + 1, self.total_steps)
        return total

    def _seed_step(self, number: int) -> None:
        """Set the random state of a step: patch-out is the same on all ranks, dropout is different."""
        seed = derive_seed(self.seed, Stream.DROPOUT, number, self.ranks.rank)
        # `torch.manual_seed` would take 0.3 ms: it formats a stack trace for every device that is not initialised.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        if self.loss_module.model.generator is not None:
            self.loss_module.model.generator.manual_seed(derive_seed(self.seed, Stream.PATCH_OUT, number))

    def _sync_gradients(self, last: bool) -> Any:
        """Return a context in which gradients are averaged over ranks only in the last part."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes from step to step, as tensors and plain values."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._parts().items():
            if name == "objective":
                part.load_state_dict(state.get(name, {}))  # earlier versions omitted an empty one
            elif name != "scaler" or state[name]:  # empty without float16
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.loss_module.model, "optimizer": self.optimizer}
        parts |= {"schedule": self.schedule, "scaler": self.precision.scaler, "average": self.average}
        parts["objective"] = self.loss_module.objective
        return {name: part for name, part in parts.items() if part is not None}
