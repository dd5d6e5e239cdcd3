"""The students of S-SONDO: three backbones that learn to embed as a large network does, without labels.

Method: El Adlouni et al., "S-SONDO: Self-supervised knowledge distillation for general audio foundation models",
ICASSP 2026. Names in the state dict are those of the published checkpoints, without their `student_model.`. There the
two layers behind the backbone project into the teacher's space; here they tag, or are left out of loaded ones.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark what is left after
striding.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger, run_by_length
from models.dymn import DyMNMaps
from models.eres2net import ERes2NetMaps, mean_and_deviation
from models.headed import SEGMENT_SECONDS
from models.mobilenetv3 import LAST_HIDDEN, RELEASE, STRIDE, MobileNetV3Maps, initialise, n_features, to_eights
from models.registry import register_model
from models.slaney_mel import SlaneyMel

logger = logging.getLogger(__name__)


class ProjectionHead(nn.Module):
    """Two linear layers on a clip's embedding (B,E) -> (B,C)."""

    def __init__(self, embed_dim: int, n_hidden: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, n_hidden), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(n_hidden, num_classes)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """(B,E) -> (B,C)."""
        return self.mlp(embedding)


class Student(AudioTagger):
    """A backbone, its pooling and a head; takes clips of any length in one piece and gives logits.

    Args:
        backbone: spectrograms (B,F,T) to maps (B,D,F',T').
        front_end: waveform to spectrogram.
        stride: frames to a position of the maps.
        embed_dim: E.
        n_hidden: width of the head's first layer.
        num_classes: C.
        dropout: before the last layer.
        segment_seconds: length of the segments that clips were cut into where it learnt, and are cut into by
            `models.ssondo.get_ssondo`; the network itself takes any.

    Raises:
        UserError: segments of no length.
    """

    last_layer = "classification_head.mlp.3"

    def __init__(
        self,
        backbone: nn.Module,
        front_end: SlaneyMel,
        *,
        stride: int,
        embed_dim: int,
        n_hidden: int,
        num_classes: int,
        dropout: float,
        segment_seconds: float = SEGMENT_SECONDS,
    ) -> None:
        super().__init__(front_end, num_classes=num_classes, embed_dim=embed_dim)
        if segment_seconds <= 0:
            raise UserError(f"segment_seconds is {segment_seconds}; wanted a length above 0, in seconds")
        self.stride, self.segment_seconds = stride, segment_seconds
        self.model = backbone
        self.classification_head = ProjectionHead(embed_dim, n_hidden, num_classes, dropout)

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute the maps below the pooling: (B,F,T) -> (B,D,F',T')."""
        return self.model(mel)

    def _pooled(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B,D,F',T') -> one vector a clip (B,E), one a column (B,T',E); their mean is the clip's."""
        return maps.mean((2, 3)), maps.mean(2).transpose(1, 2)

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), own frames (B,) or None -> logits (B,C)."""
        return self.tag_and_embed(mel, n_frames)[0]

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms: (B,F,T), own frames (B,) or None -> clips (B,E) and columns (B,T',E)."""
        if n_frames is None:
            return self._pooled(self.forward_features(mel))
        clip, frames = run_by_length(self.embed_spectrogram, mel, n_frames)
        return clip, frames

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tag and embed in one pass: (B,F,T), own frames (B,) or None -> logits (B,C), clips (B,E)."""
        if n_frames is None:
            clip = self._pooled(self.forward_features(mel))[0]
            return self.classification_head(clip), clip
        output, clip = run_by_length(self.tag_and_embed, mel, n_frames)
        return output, clip

    def n_steps(self, n_samples: int) -> int:
        """Columns of the last map."""
        return -(-self.front_end.n_frames(n_samples) // self.stride)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take EfficientAT's weights for a backbone, its classifier left out with a notice."""
        if any(key.startswith("model.") for key in state) or not any(
            key.startswith(("features.", "layers.")) for key in state
        ):
            return dict(state)
        logger.warning("of a tagger: its backbone is taken, its classifier is left out")
        return {f"model.{key}": value for key, value in state.items() if not key.startswith("classifier.")}


class MobileNetV3Student(Student):
    """MobileNetV3's maps, their mean, and a head.

    Args:
        num_classes: C.
        width: factor on the numbers of channels.
        dropout: before the last layer.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz.
        segment_seconds: see `Student`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        width: float = 1.0,
        dropout: float = 0.2,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_fft: int = 1024,
        win_size: int = 1024,
        hop_size: int = 512,
        f_min: float = 50.0,
        f_max: float = 16000.0,
        segment_seconds: float = SEGMENT_SECONDS,
    ) -> None:
        super().__init__(
            MobileNetV3Maps(width).apply(initialise),
            SlaneyMel(
                sample_rate=sample_rate,
                n_mels=n_mels,
                n_fft=n_fft,
                win_size=win_size,
                hop_size=hop_size,
                f_min=f_min,
                f_max=f_max,
            ),
            stride=STRIDE,
            embed_dim=n_features(width),
            n_hidden=to_eights(LAST_HIDDEN * width),
            num_classes=num_classes,
            dropout=dropout,
            segment_seconds=segment_seconds,
        )


class DyMNStudent(Student):
    """DyMN's maps, their mean, and a head.

    Args:
        num_classes: C.
        width: factor on the numbers of channels.
        temperature: of the mixtures of kernels; the published students and their ImageNet start have 30 throughout.
        dropout: before the last layer.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz.
        segment_seconds: see `Student`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        width: float = 1.0,
        temperature: float = 30.0,
        dropout: float = 0.2,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_fft: int = 1024,
        win_size: int = 1024,
        hop_size: int = 512,
        f_min: float = 50.0,
        f_max: float = 16000.0,
        segment_seconds: float = SEGMENT_SECONDS,
    ) -> None:
        super().__init__(
            DyMNMaps(width, temperature).apply(initialise),
            SlaneyMel(
                sample_rate=sample_rate,
                n_mels=n_mels,
                n_fft=n_fft,
                win_size=win_size,
                hop_size=hop_size,
                f_min=f_min,
                f_max=f_max,
            ),
            stride=STRIDE,
            embed_dim=n_features(width),
            n_hidden=to_eights(LAST_HIDDEN * width),
            num_classes=num_classes,
            dropout=dropout,
            segment_seconds=segment_seconds,
        )


class ERes2NetStudent(Student):
    """ERes2Net's maps, their means and deviations over time, and a head.

    A clip has at least two columns: shorter ones are followed by silence. The embedding of a column is what it says
    itself, with the deviations of the whole clip beside it.

    Args:
        num_classes: C.
        m_channels: channels of the first stage.
        num_blocks: blocks of each stage, of which there are four or five.
        dropout: before the last layer.
        sample_rate: of the waveform, in hertz.
        n_mels: F.
        n_fft: samples of a Fourier transform.
        win_size: samples of the window.
        hop_size: samples between frames.
        f_min: lower edge of the bands in hertz.
        f_max: upper edge in hertz.
        segment_seconds: see `Student`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        m_channels: int = 16,
        num_blocks: Sequence[int] = (3, 4, 6, 3, 3),
        dropout: float = 0.2,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_fft: int = 1024,
        win_size: int = 1024,
        hop_size: int = 512,
        f_min: float = 50.0,
        f_max: float = 16000.0,
        segment_seconds: float = SEGMENT_SECONDS,
    ) -> None:
        maps = ERes2NetMaps(m_channels, num_blocks)
        super().__init__(
            maps,
            SlaneyMel(
                sample_rate=sample_rate,
                n_mels=n_mels,
                n_fft=n_fft,
                win_size=win_size,
                hop_size=hop_size,
                f_min=f_min,
                f_max=f_max,
                min_frames=maps.stride + 1,
            ),
            stride=maps.stride,
            embed_dim=2 * maps.channels * -(-n_mels // maps.stride),
            n_hidden=LAST_HIDDEN,
            num_classes=num_classes,
            dropout=dropout,
            segment_seconds=segment_seconds,
        )

    def _pooled(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = mean_and_deviation(maps)
        columns = maps.flatten(1, 2).transpose(1, 2)  # (B, T', E/2)
        beside = deviation[:, None].expand(-1, columns.shape[1], -1)
        return torch.cat([mean, deviation], 1), torch.cat([columns, beside.to(columns.dtype)], 2)


_SSONDO = "https://huggingface.co/mohammedali2501/ssondo/resolve/main"
register_model("mobilenetv3", initialisation=f"{RELEASE}/mn10_im.pt")(MobileNetV3Student)
register_model("dymn", initialisation=f"{RELEASE}/dymn10_im.pt")(DyMNStudent)
register_model("eres2net")(ERes2NetStudent)
register_model("eres2net_base")(partial(ERes2NetStudent, m_channels=32, num_blocks=(3, 4, 6, 3), n_mels=80))
for _teacher in ("matpac", "m2d"):
    for _name, _student in (
        ("mobilenetv3", MobileNetV3Student),
        ("dymn", DyMNStudent),
        ("eres2net", ERes2NetStudent),
    ):
        _weights = f"{_SSONDO}/{_teacher}_{_name}.ckpt"
        register_model(f"{_teacher}-{_name}", weights=_weights)(partial(_student))
