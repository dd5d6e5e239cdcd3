"""A small residual network for spectrograms: what learns from few clips, from random weights, on a CPU.

ResNet-10 (He et al., "Deep residual learning for image recognition", CVPR 2016: four stages of one basic block) on
log-mel decibels that are normalised band by band, as CED does, so that the level of a recording matters little. Widths
are this project's own choice. Padding is masked before every convolution and left out of every statistic, so that clips
of all lengths are trained on in one batch.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark what is left after
striding.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Encoded
from models.ced_mel import CedMel
from models.pooled_cnn import PooledCNN
from models.registry import register_model
from models.settings import Rate, Width, find_arguments, take_settings

STRIDE = 16  # frames and bands to a position of the last maps
_STAGES = (1, 2, 4, 8)  # channels of each, in units of the width
_STRIDES = (2, 2, 4, 8, 16)  # frames to a column after the first convolution and each block


class ConvNorm(nn.Module):
    """Convolution, then batch norm, neither of which sees padding."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor, n_columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Filter maps.

        Args:
            x: (B,D,F',T').
            n_columns: (B,) columns of each clip, None where all T' belong to it.

        Returns:
            (B,D',F'',T'') and the columns of each clip in it.
        """
        if n_columns is None:
            return self.norm(self.conv(x)), None
        x = self.conv(x * _valid(x, n_columns)[:, None, None])
        n_columns = (n_columns - 1) // self.conv.stride[1] + 1
        return normalise(self.norm, x, n_columns), n_columns


def _valid(x: Tensor, n_columns: Tensor) -> Tensor:
    """Which columns of (B,D,F',T') belong to their clip, bool (B,T')."""
    return torch.arange(x.shape[3], device=x.device) < n_columns[:, None]


def normalise(norm: nn.Module, x: Tensor, n_columns: Tensor | None) -> Tensor:
    """Batch norm (B,D,F',T') whose statistics, in training, leave out the columns behind each clip's own."""
    if n_columns is None or not norm.training:
        return norm(x)
    valid = _valid(x, n_columns)
    columns = norm(x.permute(0, 3, 1, 2)[valid][..., None])  # (columns of all clips, D, F', 1)
    normalised = x.new_zeros(x.shape[0], x.shape[3], x.shape[1], x.shape[2])
    normalised[valid] = columns[..., 0].to(x.dtype)
    return normalised.permute(0, 2, 3, 1)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(n_in, n_out, 3, stride)
        self.second = ConvNorm(n_out, n_out, 3)
        self.shortcut = ConvNorm(n_in, n_out, 1, stride) if stride > 1 or n_in != n_out else None

    def forward(self, x: Tensor, n_columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B,D,F',T'), columns of each clip (B,) or None -> (B,D',F'',T''), columns."""
        y, n_after = self.first(x, n_columns)
        y, _ = self.second(y.relu(), n_after)
        return (y + (x if self.shortcut is None else self.shortcut(x, n_columns)[0])).relu(), n_after


class ResNet10(PooledCNN):
    """Residual network on CED's log-mels; gives logits.

    Args:
        num_classes: C.
        width: channels of the first stage; the last has, and embeddings are, eight times as many.
        dropout: before the last layer.
        **settings: those of `MelSettings` (`models.settings`), by default `shared_settings`.
    """

    masks_padding = True
    last_layer = "classifier.1"
    stride = STRIDE
    shared_settings = (replace(CedMel.defaults, win_size=400, f_max=None),)

    def __init__(self, *, num_classes: int = 527, width: Width = 16, dropout: Rate = 0.2, **settings: Any) -> None:
        (mel,) = take_settings(self.shared_settings, settings)
        super().__init__(CedMel(**asdict(mel)), num_classes=num_classes, embed_dim=width * _STAGES[-1])
        self.bands = nn.BatchNorm2d(mel.n_mels, momentum=0.01)
        self.stem = ConvNorm(1, width, 3, 2)
        n_in, blocks = width, []
        for number, factor in enumerate(_STAGES):
            blocks.append(BasicBlock(n_in, width * factor, 1 if number == 0 else 2))
            n_in = width * factor
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.embed_dim, num_classes))

    @property
    def n_layers(self) -> int:
        """Number of stages."""
        return len(_STRIDES)

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of the first convolution and of each block."""
        x = normalise(self.bands, mel.unsqueeze(2), n_frames).transpose(1, 2)  # (B,1,F,T)
        x, n_columns = self.stem(x, n_frames)
        x = x.relu()
        yield x
        for block in self.blocks:
            x, n_columns = block(x, n_columns)
            yield x

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Pooled maps (B,E) -> logits (B,C)."""
        return self.classifier(clip)

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: the mean of their own columns (B,E)."""
        columns = self.frames(encoded)
        return columns.mean(1) if encoded.n_steps is None else columns.sum(1) / encoded.n_steps[:, None]

    def _pool_stage(self, encoded: Encoded, layer: int) -> Tensor:
        maps = encoded.layers[layer]
        if encoded.n_frames is None:
            return maps.mean((2, 3))
        n_columns = (encoded.n_frames - 1) // _STRIDES[layer] + 1
        return (maps.mean(2) * _valid(maps, n_columns)[:, None]).sum(2) / n_columns[:, None]

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps: the mean over frequency for every column (B,T',E), zero behind a clip's end."""
        columns = super().frames(encoded)
        if encoded.n_steps is None:
            return columns
        assert encoded.maps is not None
        return columns * _valid(encoded.maps, encoded.n_steps)[..., None]


# in the order that they have in published configurations, behind `width` and `dropout`
MEL_ARGUMENTS = ("sample_rate", "n_mels", "f_min", "f_max", "n_fft", "win_size", "hop_size")
# with their defaults, all that make a network but the number of its classes
ARGUMENTS = {name: find_arguments(ResNet10)[name] for name in ("width", "dropout", *MEL_ARGUMENTS)}

SIZES = {"resnet10_small": 8, "resnet10": 16, "resnet10_wide": 32}  # width of each
for _name, _width in SIZES.items():
    register_model(_name)(partial(ResNet10, width=_width))
