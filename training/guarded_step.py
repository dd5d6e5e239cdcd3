"""An optimiser step that a gradient which is not finite does not get through, decided without waiting for the device.

The total norm of the gradient, after processes have joined theirs, tells whether a step is good. Fused optimisers of
PyTorch skip a step where `found_inf` is set, as the gradient scaler of float16 does; the others get a gradient of zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GuardedStep:
    """Steps an optimiser, and undoes what a bad step has done to buffers.

    Args:
        optimizer: steps its parameters.
        scaler: of float16's losses, disabled for other precisions. Under float16 overflows are normal: the scaler skips
            the step, and tries a smaller scale.
        buffers: that the forward pass of a step changes.
        grad_clip: largest norm of the gradient, or None.

    Attributes:
        has_stepped: whether a gradient was finite in this process.
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
        self.kept: list[Tensor] = []
        self.skips = bool(optimizer.defaults.get("fused"))
        self.has_stepped = False

    def keep_buffers(self) -> None:
        """Keep the buffers as they are before the forward pass of a step."""
        # Those of a type end to end: a network has hundreds, and a kernel for each would take time.
        self.kept = [torch.cat([buffer.flatten() for buffer in group]) for group in self.buffers]

    def _restore_buffers(self, is_bad: Tensor) -> None:
        for group, kept in zip(self.buffers, self.kept, strict=True):
            now = torch.cat([buffer.flatten() for buffer in group])
            chosen = torch.where(is_bad, kept, now).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])

    def step(self) -> Tensor:
        """Step after the backward pass, where the gradient is finite; return its total norm, on the device.

        Under float16 the norm of a step that the scaler skips reads 0.
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
            return norm.masked_fill(is_bad, 0)  # a mean over steps leaves out those that were skipped
        # Only here the device is waited for: a skipped first step would leave the momentum of a fused SGD, which it
        # allocates without filling it.
        if self.has_stepped or not bool(is_bad):
            self._step_unless(is_bad, gradients)
            self.has_stepped = True
        return norm

    def _step_unless(self, is_bad: Tensor, gradients: Iterable[Tensor]) -> None:
        if not self.skips:  # momentum moves on as after a gradient of zero
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
        model: the student; its batch norms that learn have running statistics.
        objective: all buffers of its own count; those of modules in it where they are of a batch norm.
    """
    buffers = list(objective.buffers(recurse=False))
    for module in (*model.modules(), *objective.modules()):
        parameters = list(module.parameters(recurse=False))
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if isinstance(module, _BatchNorm) and not is_frozen:
            buffers += module.buffers(recurse=False)
    return buffers
