"""Rounding of tensors with the gradients of training: straight-through estimators.

Letters: G groups, n weights of a group, L levels.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn


def group(tensor: Tensor, n: int) -> Tensor:
    """(...) -> (G,n); a last group that is shorter is filled up with the last value."""
    flat = tensor.flatten()
    if rest := -len(flat) % n:
        flat = torch.cat([flat, flat[-1:].expand(rest)])
    return flat.view(-1, n)


def ungroup(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Invert `group`: (G,n) -> a tensor of this shape."""
    return groups.flatten()[: math.prod(shape)].view(shape)


def find_nearest(groups: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of ascending levels (G,L) for each of (G,n)."""
    codes = torch.zeros_like(groups, dtype=torch.uint8)
    for middle in ((levels[:, 1:] + levels[:, :-1]) / 2).unbind(1):
        codes += groups > middle[:, None]  # 25 times as fast as torch.searchsorted for 16 levels of each row
    return codes.long()


class StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        """Return the quantized tensor."""
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient unchanged."""
        return gradients[0], None


class LearnedScale(torch.autograd.Function):
    """Round to a grid whose scale is trained, by its logarithm to base 2; gradients as in LSQ.

    Clipped weights get no gradient. The gradient of the scale is divided by sqrt(n (2^(k-1) - 1)).
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_scale: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
    ) -> Tensor:
        """Return the rounded weight; scale and zero point are (G,)."""
        zero, top = zero[:, None], 2**bits - 1
        codes = (group(weight, group_size) / scale[:, None]).add_(zero)  # before rounding
        inside = (codes.clamp(0, top) == codes).float()  # products with bool are slow
        rounded = codes.round().clamp_(0, top)
        # By the scale, a weight changes by the multiple that it is rounded to, minus its ratio to the scale unless it
        # is clipped.
        ctx.save_for_backward(inside, (rounded - zero).sub_(codes.sub_(zero).mul_(inside)), scale)
        ctx.bits, ctx.group_size = bits, group_size
        return ungroup(rounded.sub_(zero).mul_(scale[:, None]), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients of the weight and of what is trained of its grid."""
        (gradient,) = gradients
        inside, by_scale, scale = ctx.saved_tensors
        groups = _group_gradient(gradient, ctx.group_size)
        normaliser = math.sqrt(ctx.group_size * max(1, 2 ** (ctx.bits - 1) - 1))
        of_log = torch.linalg.vecdot(groups, by_scale) * scale * (math.log(2) / normaliser)
        return ungroup(groups * inside, gradient.shape), of_log, None, None, None, None


def _group_gradient(gradient: Tensor, n: int) -> Tensor:
    """(...) -> (G,n), with zeros for what fills up the last group."""
    groups = group(gradient, n)
    if rest := groups.numel() - gradient.numel():
        groups = groups.clone()
        groups.view(-1)[-rest:] = 0
    return groups


class TrainedLevels(torch.autograd.Function):
    """The nearest of the levels (G,L); their gradients are sums over the weights that each of them represents."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, group_size: int) -> Tensor:
        """Return the rounded weight."""
        codes = find_nearest(group(weight, group_size), levels)
        ctx.save_for_backward(codes)
        ctx.n_levels, ctx.group_size = levels.shape[1], group_size
        return ungroup(levels.gather(1, codes), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients of the weight and of what is trained of its grid."""
        (gradient,) = gradients
        (codes,) = ctx.saved_tensors
        groups = _group_gradient(gradient, ctx.group_size)
        of_levels = groups.new_zeros(len(groups), ctx.n_levels).scatter_add_(1, codes, groups)
        return gradient, of_levels, None


class ActivationQuantizer(nn.Module):
    """Rounds the input of a layer to 8 bits, symmetric, with a scale for each clip and time step.

    Args:
        start: see `Quantization`.
        time_last: the last axis is time, as for convolutions; otherwise it is the channels.
    """

    def __init__(self, start: float, time_last: bool) -> None:
        super().__init__()
        self.start, self.time_last, self.active = start, time_last, start == 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded input, of the same shape."""
        if self.training and not self.active:
            return x
        with torch.no_grad():
            axes = tuple(range(1, x.ndim - 1)) if self.time_last else (x.ndim - 1,)
            values = x.float()  # float16 has no number as small as the least scale
            scale = values.abs().amax(axes, keepdim=True).clamp_min(1e-30) / 127
            rounded = ((values / scale).round() * scale).to(x.dtype)
        return cast(Tensor, StraightThrough.apply(x, rounded)) if x.requires_grad else rounded
