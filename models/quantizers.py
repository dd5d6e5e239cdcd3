"""Grids of quantized weights: fitting, rounding with straight-through gradients, and codes.

Grids:
    symmetric: scale * (-2^(k-1) .. 2^(k-1) - 1).
    minmax: scale * (0 .. 2^k - 1, minus an integer zero point), so that zero is exact, as ONNX has it; Polino et al.
        (ICLR 2018) have a float offset.
    levels: 2^k values that are trained ("differentiable quantization" of Polino et al.; theirs start from quantiles,
        these from k-means).
Ranges (`clip`) of the first two:
    absmax: no weight is clipped.
    mse: least squared error, found by a search, then followed by alternating least-squares steps while training.
    learned: trained (LSQ, Esser et al., ICLR 2020), as a logarithm (Jain et al., MLSys 2020), since Adam ignores the
        scaling of gradients on which LSQ relies.

Scales are rounded to bfloat16, so that a file needs two bytes for each.

Letters: G groups, n weights of a group, L = 2^k levels.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.quantization_recipe import Quantization

_SHRINKS = (1.0, 0.9, 0.8, 0.72, 0.64, 0.57, 0.5, 0.44, 0.38, 0.33, 0.28, 0.24, 0.2, 0.16, 0.12, 0.08)  # of the range
_SMALLEST = 2.0**-126  # positive normal number of bfloat16 and float32
_SAMPLE = 256  # weights of a group on which ranges are compared
_REFINE_EVERY = 4  # training steps: weights move little in between
_BLOCK = 1 << 19  # weights that a search works on at a time, so that they stay in the cache


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: codes of k bits and the grid of each group of consecutive weights.

    Attributes:
        codes: uint8 of the tensor's shape, 0 to 2^k - 1.
        bits: k.
        group_size: n; the last group may be shorter.
        scale: (G,) float32, values of bfloat16.
        zero_point: (G,) uint8, the code of zero.
        levels: (G,L) float32, values of bfloat16, ascending; None where scale and zero point are the grid.
    """

    codes: Tensor
    bits: int
    group_size: int
    scale: Tensor
    zero_point: Tensor
    levels: Tensor | None = None

    def decode(self) -> Tensor:
        """Return the weights, float32 of the tensor's shape."""
        codes = _group(self.codes, self.group_size)
        if self.levels is not None:
            values = self.levels.gather(1, codes.long())
        else:
            values = (codes.float() - self.zero_point.float()[:, None]) * self.scale[:, None]
        return _ungroup(values, self.codes.shape)


def _group(tensor: Tensor, n: int) -> Tensor:
    """(...) -> (G,n); a last group that is shorter is filled up with the last value."""
    flat = tensor.flatten()
    if rest := -len(flat) % n:
        flat = torch.cat([flat, flat[-1:].expand(rest)])
    return flat.view(-1, n)


def _ungroup(groups: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return groups.flatten()[: math.prod(shape)].view(shape)


def _round_up(scale: Tensor) -> Tensor:
    """Return the smallest bfloat16 that is not below each positive value, as float32, so that nothing is clipped."""
    rounded = scale.bfloat16()
    up = (rounded.view(torch.int16) + (rounded.float() < scale).to(torch.int16)).view(torch.bfloat16)
    return up.float()


def _round_scale(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


class FakeQuantize(nn.Module):
    """Rounds a weight to its grid; a parametrization of the weight while training.

    In training it is the identity before `Quantization.start`, which `advance` counts. In evaluation it always rounds.

    Args:
        weight: the initial values, from which the grid is fitted.
        settings: bits, groups and grid.

    Raises:
        UserError: weights that are not finite.
    """

    kept_as: ClassVar[str] = "quantizer"  # beside a plain WEIGHT, the module is WEIGHT_quantizer

    def __init__(self, weight: Tensor, settings: Quantization) -> None:
        super().__init__()
        self.settings, self.bits, self.shape = settings, settings.weights, tuple(weight.shape)
        self.group_size = settings.group_size(weight.shape)
        self.active = settings.start == 0
        ones = torch.ones(-(-weight.numel() // self.group_size), device=weight.device)
        if settings.range == "learned":
            self.log_scale = nn.Parameter(ones)  # base 2
        else:
            self.register_buffer("scale", ones)
        if settings.scheme == "minmax":
            self.register_buffer("zero_point", ones.to(torch.uint8))
        if settings.range == "levels":
            # In units of `scale`, the deviation of the group. Flat, since parameters of two axes get weight decay.
            self.levels = nn.Parameter(ones.repeat_interleave(2**self.bits))
        self.fit(weight)

    @property
    def zero(self) -> Tensor:
        """(G,) float32: the code of zero."""
        if self.settings.scheme == "minmax":
            return cast(Tensor, self.zero_point).float()
        return torch.full((self._n_groups,), 2.0 ** (self.bits - 1), device=self._parameter.device)

    @property
    def _parameter(self) -> Tensor:
        return cast(Tensor, self.log_scale if self.settings.range == "learned" else self.scale)

    @property
    def _n_groups(self) -> int:
        return len(self._parameter)

    def grid_scale(self) -> Tensor:
        """Return the scale of each group, (G,), rounded to bfloat16."""
        scale = self._parameter.exp2() if self.settings.range == "learned" else self._parameter
        return _round_scale(scale).clamp_min(_SMALLEST)

    def grid_levels(self) -> Tensor:
        """Return the levels of each group, (G,L), ascending, rounded to bfloat16; differentiable."""
        levels = (self.levels.view(self._n_groups, -1) * cast(Tensor, self.scale)[:, None]).sort(dim=1).values
        return cast(Tensor, _StraightThrough.apply(levels, _round_scale(levels.detach())))

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Fit the grid to a weight.

        Raises:
            UserError: weights that are not finite.
        """
        if not bool(weight.isfinite().all()):
            raise UserError("quantize: a weight is NaN or infinite; give a checkpoint of a training that converged")
        self._fit(weight)

    def _fit(self, weight: Tensor) -> None:
        groups = _group(weight.detach().float(), self.group_size)
        for start in range(0, len(groups), step := max(1, _BLOCK // self.group_size)):
            self._fit_groups(groups[start : start + step], slice(start, start + step))

    def _fit_groups(self, groups: Tensor, rows: slice) -> None:
        """Fit the grids of some groups (g,n)."""
        if self.settings.range == "levels":
            scale = groups.std(dim=1, unbiased=False).clamp_min(1e-30)
            cast(Tensor, self.scale)[rows] = scale
            self.levels.view(self._n_groups, -1)[rows] = _fit_levels(groups / scale[:, None], self.bits)
            return
        top = 2**self.bits - 1
        low, high = groups.amin(1).clamp_max(0), groups.amax(1).clamp_min(0)
        if self.settings.scheme == "symmetric":
            extent = torch.maximum(-low, high) / (top >> 1)
            low = -extent * ((top >> 1) + 1)
        else:
            extent = (high - low) / top
        extent = _round_up(torch.where(extent > 1e-30, extent, torch.ones_like(extent)))
        zero = (-low / extent).round().clamp(0, top)
        if self.settings.range != "absmax":
            extent, zero = self._search(groups, extent, zero, low)
        if self.settings.range == "learned":
            self.log_scale[rows] = extent.log2()
        else:
            cast(Tensor, self.scale)[rows] = extent
        if self.settings.scheme == "minmax":
            cast(Tensor, self.zero_point)[rows] = zero.to(torch.uint8)

    def _search(self, groups: Tensor, extent: Tensor, zero: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point (g,) of least squared error: of shrunken ranges the best one, then refined.

        Ranges are compared on part of the weights of large groups.
        """
        sample = groups[:, :: max(1, groups.shape[1] // _SAMPLE)]
        best = torch.full_like(extent, math.inf)
        scale, chosen = extent, zero
        for shrink in _SHRINKS:
            tried, point = _round_scale(extent * shrink), zero
            if self.settings.scheme == "minmax":
                point = (-low * shrink / tried).round().clamp(0, 2**self.bits - 1)
            multiples = self._round(sample, tried, point)
            error = multiples.mul_(tried[:, None]).sub_(sample).square_().sum(1)
            better = error < best
            best, scale, chosen = error.where(better, best), tried.where(better, scale), point.where(better, chosen)
        for _ in range(3):
            scale = self._refine(groups, scale, chosen)
        return scale, chosen

    def _round(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the multiples of the scale that groups (g,n) are rounded to."""
        ratio, half = groups / scale[:, None], 2 ** (self.bits - 1)
        if self.settings.scheme == "symmetric":
            return ratio.round_().clamp_(-half, half - 1)  # bounds that are tensors take ten times as long
        zero = zero[:, None]
        return ratio.add_(zero).round_().clamp_(0, 2 * half - 1).sub_(zero)

    def _refine(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the scales (g,) of least squared error for the codes that the present ones give."""
        multiples = self._round(groups, scale, zero)
        power = torch.linalg.vecdot(multiples, multiples)
        found = _round_scale(torch.linalg.vecdot(multiples, groups) / power.clamp_min(1))
        return found.where((power > 0) & (found > 1e-30), scale)

    @torch.no_grad()
    def advance(self, weight: Tensor, step: int, n_steps: int) -> None:
        """Follow the weights, before a training step, numbered from 0."""
        self.active = step >= self.settings.start * n_steps
        if self.settings.range == "absmax":
            self._fit(weight)  # without the check, which would wait for the device
        elif self.settings.range == "mse" and step % _REFINE_EVERY == 0:
            self.scale = self._refine(_group(weight.float(), self.group_size), self.grid_scale(), self.zero)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight."""
        if self.training and not self.active:
            return weight
        quantized = self._quantize(weight)
        return quantized if self.training else quantized + 0.0  # makes 0.0 of -0.0, which codes do not have

    def _quantize(self, weight: Tensor) -> Tensor:
        if self.settings.range == "levels":
            return cast(Tensor, _TrainedLevels.apply(weight, self.grid_levels(), self.group_size))
        if self.settings.range == "learned":
            grid = self.grid_scale(), self.zero, self.bits, self.group_size
            return cast(Tensor, _LearnedScale.apply(weight, self.log_scale, *grid))
        with torch.no_grad():
            scale = self.grid_scale()
            multiples = self._round(_group(weight, self.group_size), scale, self.zero)
            quantized = _ungroup(multiples.mul_(scale[:, None]), self.shape)
        return cast(Tensor, _StraightThrough.apply(weight, quantized))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Fit the grid to a weight that replaces the present one."""
        self.fit(weight)
        return weight

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Codes:
        """Return the codes of a weight, which may be quantized already."""
        groups = _group(weight.float(), self.group_size)
        if self.settings.range == "levels":
            levels = self.grid_levels()
            codes, scale = _nearest(groups, levels), torch.ones_like(self._parameter)
            zero = torch.zeros_like(scale)
        else:
            levels, scale, zero = None, self.grid_scale(), self.zero
            codes = self._round(groups, scale, zero) + zero[:, None]
        codes = _ungroup(codes, self.shape).to(torch.uint8)
        return Codes(codes, self.bits, self.group_size, scale, zero.to(torch.uint8), levels)

    @torch.no_grad()
    def restore(self, codes: Codes) -> None:
        """Set the grid to that of codes; `forward(codes.decode())` is then `codes.decode()`."""
        self.load_state_dict(get_grid_state(codes, self.settings))


def get_grid_state(codes: Codes, settings: Quantization) -> dict[str, Tensor]:
    """Return the state dict of a `FakeQuantize` with the grid of codes."""
    if settings.range == "levels":
        assert codes.levels is not None
        state = {"scale": torch.ones_like(codes.scale), "levels": codes.levels.flatten()}
    elif settings.range == "learned":
        state = {"log_scale": codes.scale.log2()}
    else:
        state = {"scale": codes.scale}
    return state | ({"zero_point": codes.zero_point} if settings.scheme == "minmax" else {})


def _nearest(groups: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of ascending levels (G,L) for each of (G,n)."""
    codes = torch.zeros_like(groups, dtype=torch.uint8)
    for middle in ((levels[:, 1:] + levels[:, :-1]) / 2).unbind(1):
        codes += groups > middle[:, None]  # 25 times as fast as torch.searchsorted for 16 levels of each row
    return codes.long()


def _fit_levels(groups: Tensor, bits: int) -> Tensor:
    """Return the levels (g,L) of least squared error: k-means of (g,n) in one dimension, from quantiles."""
    n, n_levels = groups.shape[1], 2**bits
    ordered = groups.sort(dim=1).values
    shares = (torch.arange(n_levels, device=groups.device) + 0.5) / n_levels
    levels = ordered[:, (shares * n).long().clamp_max(n - 1)]
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    for _ in range(20):
        ends = torch.searchsorted(ordered, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], n)], dim=1)
        counts = ends.diff(dim=1)
        means = (sums.gather(1, ends).diff(dim=1) / counts.clamp_min(1)).float()
        levels = means.where(counts > 0, levels)
    return levels


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _LearnedScale(torch.autograd.Function):
    """Round to a grid whose scale is trained, by its logarithm to base 2; gradients as in LSQ.

    Clipped weights get no gradient. The gradient of the scale is divided by sqrt(n (2^(k-1) - 1)).
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_scale: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
    ) -> Tensor:
        zero, top = zero[:, None], 2**bits - 1
        codes = (_group(weight, group_size) / scale[:, None]).add_(zero)  # before rounding
        inside = (codes.clamp(0, top) == codes).float()  # products with bool are slow
        rounded = codes.round().clamp_(0, top)
        # By the scale, a weight changes by the multiple that it is rounded to, minus its ratio to the scale unless it
        # is clipped.
        ctx.save_for_backward(inside, (rounded - zero).sub_(codes.sub_(zero).mul_(inside)), scale)
        ctx.bits, ctx.group_size = bits, group_size
        return _ungroup(rounded.sub_(zero).mul_(scale[:, None]), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        inside, by_scale, scale = ctx.saved_tensors
        groups = _group_gradient(gradient, ctx.group_size)
        normaliser = math.sqrt(ctx.group_size * max(1, 2 ** (ctx.bits - 1) - 1))
        of_log = torch.linalg.vecdot(groups, by_scale) * scale * (math.log(2) / normaliser)
        return _ungroup(groups * inside, gradient.shape), of_log, None, None, None, None


def _group_gradient(gradient: Tensor, n: int) -> Tensor:
    """(...) -> (G,n), with zeros for what fills up the last group."""
    groups = _group(gradient, n)
    if rest := groups.numel() - gradient.numel():
        groups = groups.clone()
        groups.view(-1)[-rest:] = 0
    return groups


class _TrainedLevels(torch.autograd.Function):
    """The nearest of the levels (G,L); their gradients are sums over the weights that each of them represents."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, group_size: int) -> Tensor:
        codes = _nearest(_group(weight, group_size), levels)
        ctx.save_for_backward(codes)
        ctx.n_levels, ctx.group_size = levels.shape[1], group_size
        return _ungroup(levels.gather(1, codes), weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (codes,) = ctx.saved_tensors
        groups = _group_gradient(gradient, ctx.group_size)
        of_levels = groups.new_zeros(len(groups), ctx.n_levels).scatter_add_(1, codes, groups)
        return gradient, of_levels, None


class InputQuantizer(nn.Module):
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
            scale = x.abs().amax(axes, keepdim=True).clamp_min(1e-30) / 127
            rounded = (x / scale).round() * scale
        return cast(Tensor, _StraightThrough.apply(x, rounded)) if x.requires_grad else rounded
