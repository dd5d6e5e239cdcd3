"""ERes2Net, a network for speakers that is the backbone of S-SONDO's smallest student, and its pooling.

Method: Chen et al., "An enhanced Res2Net with local and global feature fusion for speaker verification", Interspeech
2023; S-SONDO adds a fifth stage. Names in the state dict are those of the published checkpoints.

Letters: B batch, F mel bands, T frames, D channels, E embedding width; primes mark what is left after striding.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.pooled_cnn import Backbone

N_PARTS = 2  # of a block's channels, filtered one after the other
EXPANSION = 2  # channels that a block gives, as a multiple of those it filters
_FUSING_FROM = 3  # stages from this one on, counted from 1, weigh the parts that they add
_SQUEEZE = 4
_CEILING = 20.0
_TINY = 1e-8

_conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
_conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


def _clip(x: Tensor) -> Tensor:
    return x.clamp(0.0, _CEILING)


class Fusion(nn.Module):
    """Add two maps, each position and channel with weights computed from both; the weights sum to 2.

    Args:
        channels: D of each.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = channels // _SQUEEZE
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, squeezed, 1),
            nn.BatchNorm2d(squeezed),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,D,F',T') twice -> (B,D,F',T')."""
        weight = 1 + self.local_att(torch.cat([x, y], 1)).tanh()
        return x * weight + y * (2 - weight)


class Res2Block(nn.Module):
    """A residual block whose second half of channels also gets the output of the first.

    Args:
        n_in: channels of the input.
        planes: channels that are filtered; twice as many are given.
        stride: along both axes.
        fuses: the halves are joined by a `Fusion`, else by their sum.
    """

    def __init__(self, n_in: int, planes: int, stride: int, fuses: bool) -> None:
        super().__init__()
        width, n_out = planes // N_PARTS, planes * EXPANSION
        self.conv1 = _conv1x1(n_in, planes, stride=stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.convs = nn.ModuleList(_conv3x3(width, width) for _ in range(N_PARTS))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(N_PARTS))
        if fuses:
            self.fuse_models = nn.ModuleList(Fusion(width) for _ in range(N_PARTS - 1))
        self.fuses = fuses
        self.conv3 = _conv1x1(planes, n_out)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(_conv1x1(n_in, n_out, stride=stride), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,F',T') -> (B,D',F'',T'')."""
        parts = list(_clip(self.bn1(self.conv1(x))).chunk(N_PARTS, 1))
        for i, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=True)):
            if i > 0:
                before, own = parts[i - 1], parts[i]
                parts[i] = self.fuse_models[i - 1](before, own) if self.fuses else before + own
            parts[i] = _clip(norm(conv(parts[i])))
        return _clip(self.bn3(self.conv3(torch.cat(parts, 1))) + self.shortcut(x))


class ERes2NetMaps(Backbone):
    """The network below the pooling: (B,F,T) -> (B,D,F',T'), both axes halved by every stage but the first.

    Args:
        m_channels: channels of the first stage; later ones have 2, 4 and 8 times as many, a fifth 2 times.
        num_blocks: blocks of each stage, of which there are four or five.

    Raises:
        ValueError: another number of stages, or channels that cannot be split.
    """

    def __init__(self, m_channels: int, num_blocks: Sequence[int]) -> None:
        super().__init__()
        planes = [m_channels * factor for factor in (1, 2, 4, 8, 2)[: len(num_blocks)]]
        if len(num_blocks) not in (4, 5) or min(num_blocks) < 1 or m_channels < 4 or m_channels % 4:
            raise ValueError(
                f"m_channels {m_channels} and num_blocks {list(num_blocks)}: expected a multiple of 4, and four or "
                "five numbers of at least 1"
            )
        self.n_stages, self.channels, self.stride = len(planes), EXPANSION * planes[-1], 2 ** (len(planes) - 1)
        self.conv1 = _conv3x3(1, m_channels)
        self.bn1 = nn.BatchNorm2d(m_channels)
        given = [m_channels, *(EXPANSION * width for width in planes)]
        for stage, (n_in, width, n_blocks) in enumerate(zip(given[:-1], planes, num_blocks, strict=True), 1):
            blocks = [
                Res2Block(
                    n_in if i == 0 else given[stage],
                    width,
                    stride=2 if i == 0 and stage > 1 else 1,
                    fuses=stage >= _FUSING_FROM,
                )
                for i in range(n_blocks)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for stage in range(1, self.n_stages):
            self.add_module(f"layer{stage}_downsample", _conv3x3(given[stage], given[stage + 1], stride=2))
        for stage in range(2, self.n_stages + 1):
            self.add_module(self._fusion(stage), Fusion(given[stage]))

    @staticmethod
    def _fusion(stage: int) -> str:
        return "fuse_mode" + "12345"[:stage]

    def stages(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage, fused with those below."""
        x = fused = self.get_submodule("layer1")(self.bn1(self.conv1(mel[:, None])).relu())
        yield fused
        for stage in range(2, self.n_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
            below = self.get_submodule(f"layer{stage - 1}_downsample")(fused)
            fused = self.get_submodule(self._fusion(stage))(x, below)
            yield fused


def pool_statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Pool over time: maps (B,D,F',T') -> means and deviations of each channel and band, (B, D F') each.

    Deviations are those of a sample (T' - 1 in the denominator); one column alone has almost none, never NaN.
    """
    maps = maps.float().flatten(1, 2)
    mean = maps.mean(2, keepdim=True)
    others = (maps.new_ones(maps.shape[2]).sum() - 1).clamp(min=1)  # a tensor, as graphs divide by no length
    variance = (maps - mean).square().sum(2) / others
    return mean[..., 0], (variance + _TINY).sqrt()
