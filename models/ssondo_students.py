"""The students of S-SONDO: three backbones that learn to embed as a large network does, without labels.

Method: El Adlouni et al., "S-SONDO: Self-supervised knowledge distillation for general audio foundation models",
ICASSP 2026. Names in the state dict are those of the published checkpoints, without their `student_model.`. There the
two layers behind the backbone project into the teacher's space; here they tag, or are left out of loaded ones.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark what is left after
striding.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.base import Encoded
from models.dymn import DyMNMaps
from models.eres2net import ERes2NetMaps, pool_statistics
from models.headed import SEGMENT_SECONDS
from models.mobilenetv3 import LAST_HIDDEN, RELEASE, MobileNetV3Maps, initialise, make_divisible
from models.pooled_cnn import Backbone, PooledCNN
from models.registry import register_model
from models.settings import BlocksOfStages, Factor, MelSettings, Number, Rate, Seconds, Width, take_settings
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


@dataclass(frozen=True)
class StudentSettings:
    """Of a student.

    Attributes:
        dropout: before the last layer.
        segment_seconds: length of the segments that clips were cut into in training, and are cut into by
            `models.ssondo.get_ssondo`; the network itself takes any.
    """

    dropout: Rate = 0.2
    segment_seconds: Seconds = SEGMENT_SECONDS


class Student(PooledCNN):
    """A backbone, its pooling and a head; gives logits.

    Args:
        backbone: spectrograms to maps.
        settings: those of `StudentSettings` and `models.settings.MelSettings`, by default `shared_settings`.
        num_classes: C.
        n_hidden: width of the head's first layer.
        embed_dim: E, by default the channels of the maps.
        min_frames: shorter clips are followed by silence.

    Raises:
        UserError: segments of no length.
    """

    last_layer = "classification_head.mlp.3"
    shared_settings: ClassVar[tuple[StudentSettings, MelSettings]] = (StudentSettings(), SlaneyMel.defaults)

    def __init__(
        self,
        backbone: Backbone,
        settings: Mapping[str, Any],
        *,
        num_classes: int,
        n_hidden: int,
        embed_dim: int | None = None,
        min_frames: int = 1,
    ) -> None:
        own, mel = take_settings(self.shared_settings, settings)
        if own.segment_seconds <= 0:
            raise UserError(f"segment_seconds is {own.segment_seconds}; expected a length above 0, in seconds")
        width = backbone.channels if embed_dim is None else embed_dim
        super().__init__(SlaneyMel(**asdict(mel), min_frames=min_frames), num_classes=num_classes, embed_dim=width)
        self.stride, self.segment_seconds = backbone.stride, own.segment_seconds
        self.model = backbone
        self.classification_head = ProjectionHead(width, n_hidden, num_classes, own.dropout)

    @property
    def n_layers(self) -> int:
        """Number of stages of the backbone."""
        return self.model.n_stages

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of each stage of the backbone."""
        return self.model.stages(mel)

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Clip embeddings (B,E) -> logits (B,C)."""
        return self.classification_head(clip)

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
        **settings: see `Student`.
    """

    def __init__(self, *, num_classes: int = 527, width: Factor = 1.0, **settings: Any) -> None:
        maps = MobileNetV3Maps(width).apply(initialise)
        super().__init__(maps, settings, num_classes=num_classes, n_hidden=make_divisible(LAST_HIDDEN * width))


class DyMNStudent(Student):
    """DyMN's maps, their mean, and a head.

    Args:
        num_classes: C.
        width: factor on the numbers of channels.
        temperature: of the mixtures of kernels; the published students and their ImageNet start have 30 throughout.
        **settings: see `Student`.
    """

    def __init__(
        self, *, num_classes: int = 527, width: Factor = 1.0, temperature: Number = 30.0, **settings: Any
    ) -> None:
        maps = DyMNMaps(width, temperature).apply(initialise)
        super().__init__(maps, settings, num_classes=num_classes, n_hidden=make_divisible(LAST_HIDDEN * width))


class ERes2NetStudent(Student):
    """ERes2Net's maps, their means and deviations over time, and a head.

    A clip has at least two columns: shorter ones are followed by silence. The embedding of a column is the column
    itself, with the deviations of the whole clip beside it; their mean is the clip's.

    Args:
        num_classes: C.
        m_channels: channels of the first stage.
        num_blocks: blocks of each stage, of which there are four or five.
        **settings: see `Student`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        m_channels: Width = 16,
        num_blocks: BlocksOfStages = (3, 4, 6, 3, 3),
        **settings: Any,
    ) -> None:
        maps = ERes2NetMaps(m_channels, num_blocks)
        n_mels = take_settings(self.shared_settings, settings)[1].n_mels
        super().__init__(
            maps,
            settings,
            num_classes=num_classes,
            n_hidden=LAST_HIDDEN,
            embed_dim=2 * maps.channels * -(-n_mels // maps.stride),
            min_frames=maps.stride + 1,
        )

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: means and deviations of each channel and band (B,E)."""
        assert encoded.maps is not None
        return torch.cat(pool_statistics(encoded.maps), 1)

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps: a column, and beside it the deviations of the whole clip (B,T',E)."""
        assert encoded.maps is not None
        columns = encoded.maps.flatten(1, 2).transpose(1, 2)  # (B, T', E/2)
        deviation = pool_statistics(encoded.maps)[1]
        beside = deviation[:, None].expand(-1, columns.shape[1], -1)
        return torch.cat([columns, beside.to(columns.dtype)], 2)


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
