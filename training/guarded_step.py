"""An optimiser step that is skipped if the gradient is not finite, without waiting for the device.

The total norm of the gradient, after the all-reduce over processes, decides. Fused optimisers of PyTorch skip a step if
`found_inf` is set, as the gradient scaler of float16 does; the others get a gradient of zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.objectives.collapse import RunningMean


class GuardedStep:
    """Steps an optimiser, and restores the buffers that a step with a bad gradient has changed.

    Args:
        optimizer: the optimiser.
        scaler: the gradient scaler of float16, disabled for other precisions. Under float16 overflows are normal: the
            scaler skips the step and reduces the scale.
        buffers: the buffers that the forward pass of a step changes.
        grad_clip: largest norm of the gradient, or None.

    Attributes:
        has_stepped: whether this process has had a finite gradient.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        buffers: Sequence[Tensor],
        grad_clip: float | None,
    ) -> None:
        self.optimizer, self.scaler, self.grad_clip = optimizer, scaler, grad_clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kinds = {buffer.dtype for buffer in buffers}
        self.buffers = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self.backup: list[Tensor] = []
        self.skips = bool(optimizer.defaults.get("fused"))
        self.has_stepped = False

    def keep_buffers(self) -> None:
        """Copy the buffers before the forward pass of a step."""
        # Concatenated by type: a network has hundreds of buffers, and one kernel for each would be slow.
        self.backup = [torch.cat([buffer.flatten() for buffer in group]) for group in self.buffers]

    def _restore_buffers(self, is_bad: Tensor) -> None:
        for group, backup in zip(self.buffers, self.backup, strict=True):
            current = torch.cat([buffer.flatten() for buffer in group])
            chosen = torch.where(is_bad, backup, current).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])

    def step(self) -> Tensor:
        """Step if the gradient is finite; return its total norm, on the device.

        Under float16 the norm of a step that the scaler skips is 0.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.grad_clip is None:
            norm = nn.utils.get_total_norm(gradients, foreach=True)
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        is_bad = ~norm.isfinite()
        self._restore_buffers(is_bad)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.has_stepped = True
            return norm.masked_fill(is_bad, 0)  # skipped steps must not make the mean norm infinite
        # The only wait for the device: if the first step were skipped, a fused SGD would keep the momentum that it has
        # allocated without initialising it.
        if self.has_stepped or not bool(is_bad):
            self._step_unless(is_bad, gradients)
            self.has_stepped = True
        return norm

    def _step_unless(self, is_bad: Tensor, gradients: Iterable[Tensor]) -> None:
        if not self.skips:  # momentum is updated as with a gradient of zero
            for gradient in gradients:
                gradient.masked_fill_(is_bad, 0)
            self.optimizer.step()
            return
        optimizer = cast(Any, self.optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
        optimizer.step()
        optimizer.found_inf = None


def find_updated_buffers(model: nn.Module, objective: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass of training changes.

    Args:
        model: the student; running statistics of its batch norms, except frozen ones.
        objective: its direct buffers, and running statistics of batch norms in its modules; of running means the sums,
            from which `after_step` updates the rest.
    """
    buffers = list(objective.buffers(recurse=False))
    for module in (*model.modules(), *objective.modules()):
        parameters = list(module.parameters(recurse=False))
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if isinstance(module, _BatchNorm) and not is_frozen:
            buffers += module.buffers(recurse=False)
        elif isinstance(module, RunningMean):
            buffers.append(module.total)
    return buffers
