"""A small residual network for spectrograms: what learns from few clips, from random weights, on a CPU.

ResNet-10 (He et al., "Deep residual learning for image recognition", CVPR 2016: four stages of one basic block) on
log-mel decibels that are normalised band by band, as CED does, so that the level of a recording matters little. Widths
are this project's own choice. Padding is masked before every convolution and left out of every statistic, so that clips
of all lengths are trained on in one batch.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark what is left after
striding.
"""

import inspect
from functools import partial

import torch
from torch import Tensor, nn

from models.base import AudioTagger
from models.ced_mel import CedMel
from models.registry import register_model

STRIDE = 16  # frames and bands to a position of the last maps
_STAGES = (1, 2, 4, 8)  # channels of each, in units of the width


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


class ResNet10(AudioTagger):
    """Residual network on CED's log-mels; gives logits.

    Args:
        num_classes: C.
        width: channels of the first stage; the last has, and embeddings are, eight times as many.
        dropout: before the last layer.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz, None for half the sample rate.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
    """

    masks_padding = True
    last_layer = "classifier.1"

    def __init__(
        self,
        *,
        num_classes: int = 527,
        width: int = 16,
        dropout: float = 0.2,
        sample_rate: int = 16000,
        n_mels: int = 64,
        f_min: float = 0.0,
        f_max: float | None = None,
        n_fft: int = 512,
        win_size: int = 400,
        hop_size: int = 160,
    ) -> None:
        front_end = CedMel(
            sample_rate=sample_rate,
            n_mels=n_mels,
            n_fft=n_fft,
            win_size=win_size,
            hop_size=hop_size,
            f_min=f_min,
            f_max=f_max,
        )
        super().__init__(front_end, num_classes=num_classes, embed_dim=width * _STAGES[-1])
        self.bands = nn.BatchNorm2d(n_mels, momentum=0.01)
        self.stem = ConvNorm(1, width, 3, 2)
        n_in, blocks = width, []
        for number, factor in enumerate(_STAGES):
            blocks.append(BasicBlock(n_in, width * factor, 1 if number == 0 else 2))
            n_in = width * factor
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.embed_dim, num_classes))

    def _maps(self, mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B,F,T), own frames (B,) or None -> (B,D,F',T'), columns of each clip."""
        x = normalise(self.bands, mel.unsqueeze(2), n_frames).transpose(1, 2)  # (B,1,F,T)
        x, n_columns = self.stem(x, n_frames)
        x = x.relu()
        for block in self.blocks:
            x, n_columns = block(x, n_columns)
        return x, n_columns

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute the maps below the pooling: (B,F,T) -> (B,D,F',T'), both axes strided by 16."""
        return self._maps(mel, None)[0]

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), own frames (B,) or None -> logits (B,C)."""
        return self.tag_and_embed(mel, n_frames)[0]

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms: (B,F,T), own frames (B,) or None -> pooled maps (B,E) and their columns (B,T',E)."""
        maps, n_columns = self._maps(mel, n_frames)
        columns = maps.mean(2).transpose(1, 2)  # (B,T',E)
        if n_columns is None:
            return columns.mean(1), columns
        columns = columns * _valid(maps, n_columns)[..., None]
        return columns.sum(1) / n_columns[:, None], columns

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tag and embed in one pass: (B,F,T), own frames (B,) or None -> logits (B,C), pooled maps (B,E)."""
        clip = self.embed_spectrogram(mel, n_frames)[0]
        return self.classifier(clip), clip

    def n_steps(self, n_samples: int) -> int:
        """Columns of the last maps: every 16th frame, rounded up."""
        return -(-self.front_end.n_frames(n_samples) // STRIDE)

    def probabilities_of(self, mel: Tensor) -> Tensor:
        """Probabilities (B,C) of spectrograms (B,F,T) of one length."""
        return self.probabilities(self.forward_spectrogram(mel))


# with their defaults, all that make a network but the number of its classes
ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ResNet10).parameters.items()
    if name != "num_classes"
}

SIZES = {"resnet10_small": 8, "resnet10": 16, "resnet10_wide": 32}  # width of each
for _name, _width in SIZES.items():
    register_model(_name)(partial(ResNet10, width=_width))
