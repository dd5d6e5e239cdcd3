"""EfficientAT's DyMN: MobileNetV3 whose kernels, activations and attention follow from each clip's own context.

Method: Schmid, Koutini, Widmer, "Dynamic convolutional neural networks as efficient pre-trained audio models", TASLP
2024; dynamic convolution after Chen et al., CVPR 2020, dynamic ReLU after Chen et al., ECCV 2020, coordinate attention
after Hou et al., CVPR 2021. Names in the state dict are those of the published checkpoints.

Letters: B batch, F mel bands, T frames, C classes, D channels, H context width, K kernels; primes mark what is left
after striding.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.mobilenetv3 import (
    N_MAPS,
    RELEASE,
    STAGES,
    STRIDE,
    EfficientAtTagger,
    Stage,
    conv_norm,
    make_divisible,
    n_features,
)
from models.pooled_cnn import Backbone, run_stages
from models.registry import register_model

N_KERNELS = 4


class Context(NamedTuple):
    """Context of a clip for a block: a vector (B,H), logits of attention to bands (B,D,F',1) and columns (B,D,1,T')."""

    vector: Tensor
    bands: Tensor
    columns: Tensor


class ContextGenerator(nn.Module):
    """Look at a block's input along both axes.

    Args:
        n_in: channels of the input.
        width: H.
        n_expanded: channels that attention is paid to.
        stride: of the block, which its attention has to follow.
    """

    def __init__(self, n_in: int, width: int, n_expanded: int, stride: int) -> None:
        super().__init__()
        self.joint_conv = nn.Conv2d(n_in, width, 1, bias=False)
        self.joint_norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        self.conv_f = nn.Conv2d(width, n_expanded, 1)
        self.conv_t = nn.Conv2d(width, n_expanded, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Context:
        """(B,D,F',T') -> the context of each clip."""
        means = torch.cat([x.mean(3), x.mean(2)], 2)  # (B, D, F' + T'): of each band, then of each column
        joint = F.hardswish(self.joint_norm(self.joint_conv(means[..., None])))[..., 0]  # (B, H, F' + T')
        bands, columns = joint.split([x.shape[2], x.shape[3]], 2)
        if self.stride > 1:
            bands, columns = (F.avg_pool1d(axis, 3, self.stride, padding=1) for axis in (bands, columns))
        return Context(joint.mean(2), self.conv_f(bands[..., None]), self.conv_t(columns[:, :, None]))


class DynamicConv(nn.Module):
    """A convolution whose kernel is each clip's own mixture of K kernels.

    Args:
        n_in: channels in.
        n_out: channels out.
        context_width: H.
        kernel: its size along both axes, 1 unless it filters each channel alone.
        stride: along both axes.
        groups: 1, or `n_in` to filter each channel alone.
        temperature: what the logits of the mixture are divided by; a high one mixes evenly.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        context_width: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.residuals = nn.Sequential(nn.Linear(context_width, N_KERNELS))
        self.shape = (n_out, n_in // groups, kernel, kernel)
        kernels = torch.empty(N_KERNELS, *self.shape)
        for each in kernels:
            nn.init.kaiming_normal_(each, mode="fan_out")
        self.weight = nn.Parameter(kernels.view(1, 1, N_KERNELS, -1))
        self.kernel, self.stride, self.groups, self.temperature = kernel, stride, groups, temperature

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Maps (B,D,F',T'), context (B,H) -> (B,D',F'',T'')."""
        share = (self.residuals(vector) / self.temperature).softmax(1)  # (B,K)
        kernels = self.weight[0, 0]  # (K,n)
        if self.kernel == 1:
            mixed = (share @ kernels).view(-1, *self.shape[:2])  # (B,D',D)
            return (mixed @ x.flatten(2)).unflatten(2, x.shape[2:])
        convolve = partial(F.conv2d, stride=self.stride, padding=self.kernel // 2)
        if torch.compiler.is_exporting():  # graphs have no number of groups that depends on the batch
            each = [convolve(x, kernel.view(self.shape), groups=self.groups) for kernel in kernels]
            return sum(part[:, None, None, None] * y for part, y in zip(share.unbind(1), each, strict=True))
        mixed = (share @ kernels).view(-1, *self.shape[1:])  # (B D', D/groups, k, k)
        y = convolve(x.flatten(0, 1)[None], mixed, groups=self.groups * len(x))
        return y.view(len(x), self.shape[0], *y.shape[2:])


class DynamicReLU(nn.Module):
    """The larger of two lines, which each clip sets for every channel.

    Args:
        channels: D.
        context_width: H.
    """

    lambdas: Tensor
    init_v: Tensor

    def __init__(self, channels: int, context_width: int) -> None:
        super().__init__()
        self.coef_net = nn.Sequential(nn.Linear(context_width, 4 * channels))
        self.register_buffer("lambdas", torch.tensor([1.0, 1.0, 0.5, 0.5]))  # how far two slopes, two offsets may go
        self.register_buffer("init_v", torch.tensor([1.0, 0.0, 0.0, 0.0]))  # from where: the ordinary ReLU

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Maps (B,D,F',T'), context (B,H) -> (B,D,F',T')."""
        theta = 2 * self.coef_net(vector).sigmoid() - 1
        lines = theta.view(-1, x.shape[1], 1, 1, 4) * self.lambdas + self.init_v
        slope, other_slope, offset, other_offset = lines.unbind(4)  # (B,D,1,1) each
        return torch.maximum(x * slope + offset, x * other_slope + other_offset)


class DynamicBlock(nn.Module):
    """An inverted residual block that follows each clip's context; see `Stage` and `DyMNMaps`."""

    def __init__(
        self, stage: Stage, n_in: int, n_expanded: int, n_out: int, context_width: int, temperature: float
    ) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        conv = partial(DynamicConv, context_width=context_width, temperature=temperature)
        self.expands = n_expanded != n_in
        if self.expands:
            self.exp_conv = conv(n_in, n_expanded)
            self.exp_norm = norm(n_expanded)
            self.exp_act = nn.Hardswish() if stage.hard_swish else nn.ReLU()
        self.depth_conv = conv(n_expanded, n_expanded, kernel=stage.kernel, stride=stage.stride, groups=n_expanded)
        self.depth_norm = norm(n_expanded)
        self.depth_act = DynamicReLU(n_expanded, context_width)
        self.proj_conv = conv(n_expanded, n_out)
        self.proj_norm = norm(n_out)
        self.context_gen = ContextGenerator(n_in, context_width, n_expanded, stage.stride)
        self.has_shortcut = stage.stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,F',T') -> (B,D',F'',T'')."""
        vector, bands, columns = self.context_gen(x)
        y = self.exp_act(self.exp_norm(self.exp_conv(x, vector))) if self.expands else x
        y = self.depth_act(self.depth_norm(self.depth_conv(y, vector)), vector)
        y = y * bands.sigmoid() * columns.sigmoid()
        y = self.proj_norm(self.proj_conv(y, vector))
        return x + y if self.has_shortcut else y


class DyMNMaps(Backbone):
    """The network below the pooling: (B,F,T) -> (B,D,F',T'), to be started by `initialise`.

    Args:
        width: factor on the numbers of channels.
        temperature: of the mixtures of kernels. Published training went from 30 down to 1 by epoch e of AudioSet,
            max(30 - e, 1 + 0.02 (29 - e), 1); networks for pictures, and the students of S-SONDO, stayed at 30.
    """

    stride = STRIDE
    n_stages = N_MAPS

    def __init__(self, width: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        channels = make_divisible(STAGES[0].out * width)
        self.in_c = conv_norm(1, channels, 3, 2, act=nn.Hardswish)
        self.layers = nn.ModuleList()
        narrowest, widest = make_divisible(32 * width), make_divisible(128 * width)
        for stage in STAGES:
            expanded, out = make_divisible(stage.expanded * width), make_divisible(stage.out * width)
            context_width = min(max(make_divisible(expanded // 4), narrowest), widest)
            self.layers.append(DynamicBlock(stage, channels, expanded, out, context_width, temperature))
            channels = out
        self.channels = n_features(width)
        self.out_c = conv_norm(channels, self.channels, act=nn.Hardswish)

    def stages(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the output of the first convolution, of each block and of the last convolution."""
        return run_stages(mel[:, None], [self.in_c, *self.layers, self.out_c])


class DyMN(EfficientAtTagger):
    """EfficientAT's dynamic network, its mixtures at temperature 1; see `EfficientAtTagger` for its arguments."""

    def _add_maps(self, width: float) -> None:
        maps = DyMNMaps(width)
        self.in_c, self.layers, self.out_c = maps.in_c, maps.layers, maps.out_c

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of the first convolution, of each block and of the last convolution."""
        return run_stages(mel[:, None], [self.in_c, *self.layers, self.out_c])


# published file and width
_PUBLISHED = {
    "dymn04_as": ("dymn04_as.pt", 0.4),
    "dymn10_as": ("dymn10_as.pt", 1.0),
    "dymn20_as": ("dymn20_as_mAP_493.pt", 2.0),
}
for _name, (_file, _width) in _PUBLISHED.items():
    register_model(_name, weights=f"{RELEASE}/{_file}")(partial(DyMN, width=_width))
