"""EfficientAT's MobileNetV3 on mel spectrograms.

Method: Schmid, Koutini, Widmer, "Efficient large-scale audio tagging via transformer-to-CNN knowledge distillation",
ICASSP 2023, on Howard et al., "Searching for MobileNetV3", ICCV 2019. Names in the state dict are those of the
published checkpoints. Squeeze and excitation acts on channels.

Letters: B batch, F mel bands, T frames, C classes, D channels; primes mark what is left after striding.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.base import Encoded
from models.efficientat_mel import EfficientAtMel
from models.pooled_cnn import Backbone, PooledCNN, run_stages
from models.registry import register_model
from models.settings import Factor, HertzRange, Rate


class Stage(NamedTuple):
    """One inverted residual block: what MobileNetV3-Large has at width 1."""

    kernel: int
    expanded: int
    out: int
    excite: bool
    hard_swish: bool
    stride: int


STAGES = (
    Stage(3, 16, 16, False, False, 1),
    Stage(3, 64, 24, False, False, 2),
    Stage(3, 72, 24, False, False, 1),
    Stage(5, 72, 40, True, False, 2),
    Stage(5, 120, 40, True, False, 1),
    Stage(5, 120, 40, True, False, 1),
    Stage(3, 240, 80, False, True, 2),
    Stage(3, 200, 80, False, True, 1),
    Stage(3, 184, 80, False, True, 1),
    Stage(3, 184, 80, False, True, 1),
    Stage(3, 480, 112, True, True, 1),
    Stage(3, 672, 112, True, True, 1),
    Stage(5, 672, 160, True, True, 2),
    Stage(5, 960, 160, True, True, 1),
    Stage(5, 960, 160, True, True, 1),
)
N_MAPS = len(STAGES) + 2  # of a convolution before them and one after them, too
LAST_HIDDEN = 1280
STRIDE = 32  # frames and bands to a position of the last map


def make_divisible(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but never more than 10 % below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def n_features(width: float) -> int:
    """Channels of the last map."""
    return 6 * make_divisible(STAGES[-1].out * width)


def initialise(module: nn.Module) -> None:
    """Give a convolution or linear layer the published start; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def conv_norm(
    n_in: int, n_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None
) -> nn.Sequential:
    """Convolution, batch norm and activation, padded so that only the stride shrinks the map."""
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class SqueezeExcitation(nn.Module):
    """Scale every channel by a function of the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,F',T') -> (B,D,F',T')."""
        scale = self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()
        return x * scale[:, :, None, None]


class ConcurrentExcitation(nn.Module):
    """The place of squeeze and excitation in published checkpoints, which could hold several at once."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([SqueezeExcitation(channels, squeezed)])

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,F',T') -> (B,D,F',T')."""
        return self.conc_se_layers[0](x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, excite, project; with a shortcut where shapes allow."""

    def __init__(self, stage: Stage, n_in: int, n_expanded: int, n_out: int) -> None:
        super().__init__()
        act: type[nn.Module] = nn.Hardswish if stage.hard_swish else nn.ReLU
        layers: list[nn.Module] = [] if n_expanded == n_in else [conv_norm(n_in, n_expanded, act=act)]
        layers.append(conv_norm(n_expanded, n_expanded, stage.kernel, stage.stride, n_expanded, act))
        if stage.excite:
            layers.append(ConcurrentExcitation(n_expanded, make_divisible(n_expanded // 4)))
        layers.append(conv_norm(n_expanded, n_out))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stage.stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,F',T') -> (B,D',F'',T'')."""
        return x + self.block(x) if self.has_shortcut else self.block(x)


class MobileNetV3Maps(Backbone):
    """The network below the pooling: (B,F,T) -> (B,D,F',T'), to be started by `initialise`.

    Args:
        width: factor on the numbers of channels.
    """

    stride = STRIDE
    n_stages = N_MAPS

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = make_divisible(STAGES[0].out * width)
        layers: list[nn.Module] = [conv_norm(1, channels, 3, 2, act=nn.Hardswish)]
        for stage in STAGES:
            expanded, out = make_divisible(stage.expanded * width), make_divisible(stage.out * width)
            layers.append(InvertedResidual(stage, channels, expanded, out))
            channels = out
        self.channels = n_features(width)
        self.features = nn.Sequential(*layers, conv_norm(channels, self.channels, act=nn.Hardswish))

    def stages(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the output of the first convolution, of each block and of the last convolution."""
        return run_stages(mel[:, None], self.features)


class EfficientAtTagger(PooledCNN):
    """What EfficientAT's networks share; it gives logits.

    Args:
        num_classes: C.
        width: factor on the numbers of channels.
        dropout: before the last layer.
        fmin_aug_range: in training, `f_min` is raised by a random whole number below this for each batch: 10 in
            published training, 1 for never.
        fmax_aug_range: in training, `f_max` is moved at random within a range of this many hertz: 2000 in published
            training, 1 for never.
        **settings: those of `MelSettings` (`models.settings`), by default `shared_settings`.
    """

    last_layer = "classifier.5"
    stride = STRIDE
    shared_settings = (EfficientAtMel.defaults,)

    def __init__(
        self,
        *,
        num_classes: int = 527,
        width: Factor = 1.0,
        dropout: Rate = 0.2,
        fmin_aug_range: HertzRange = 1,
        fmax_aug_range: HertzRange = 1,
        **settings: Any,
    ) -> None:
        front_end = EfficientAtMel(**settings)
        front_end.vary_edges(fmin_aug_range, fmax_aug_range)
        super().__init__(front_end, num_classes=num_classes, embed_dim=n_features(width))
        self._add_maps(width)
        n_hidden = make_divisible(LAST_HIDDEN * width)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # this and the next as published; `pool` does it
            nn.Flatten(),
            nn.Linear(self.embed_dim, n_hidden),
            nn.Hardswish(),
            nn.Dropout(dropout),
            nn.Linear(n_hidden, num_classes),
        )
        self.apply(initialise)

    @property
    def n_layers(self) -> int:
        """Number of stages."""
        return N_MAPS

    def _add_maps(self, width: float) -> None:
        """Make the layers of `stages`, under their published names."""
        raise NotImplementedError

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Pooled maps (B,D) -> logits (B,C)."""
        return self.classifier[2:](clip)


class MobileNetV3(EfficientAtTagger):
    """EfficientAT's network of convolutions; see `EfficientAtTagger` for its arguments."""

    def _add_maps(self, width: float) -> None:
        self.features = MobileNetV3Maps(width).features

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of the first convolution, of each block and of the last convolution."""
        return run_stages(mel[:, None], self.features)


RELEASE = "https://github.com/fschmid56/EfficientAT/releases/download/v0.0.1"
# published file -> width and front-end settings; hops are 5, 15, 20 and 25 ms
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "mn01_as": ("mn01_as_mAP_298.pt", {"width": 0.1}),
    "mn02_as": ("mn02_as_mAP_378.pt", {"width": 0.2}),
    "mn04_as": ("mn04_as_mAP_432.pt", {"width": 0.4}),
    "mn05_as": ("mn05_as_mAP_443.pt", {"width": 0.5}),
    "mn10_as": ("mn10_as_mAP_471.pt", {"width": 1.0}),
    "mn20_as": ("mn20_as_mAP_478.pt", {"width": 2.0}),
    "mn30_as": ("mn30_as_mAP_482.pt", {"width": 3.0}),
    "mn40_as": ("mn40_as_mAP_484.pt", {"width": 4.0}),
    "mn40_as_ext": ("mn40_as_ext_mAP_487.pt", {"width": 4.0}),
    "mn40_as_no_im_pre": ("mn40_as_no_im_pre_mAP_483.pt", {"width": 4.0}),
    "mn10_as_hop_5": ("mn10_as_hop_5_mAP_475.pt", {"hop_size": 160}),
    "mn10_as_hop_15": ("mn10_as_hop_15_mAP_463.pt", {"hop_size": 480}),
    "mn10_as_hop_20": ("mn10_as_hop_20_mAP_456.pt", {"hop_size": 640}),
    "mn10_as_hop_25": ("mn10_as_hop_25_mAP_447.pt", {"hop_size": 800}),
    "mn10_as_mels_40": ("mn10_as_mels_40_mAP_453.pt", {"n_mels": 40}),
    "mn10_as_mels_64": ("mn10_as_mels_64_mAP_461.pt", {"n_mels": 64}),
    "mn10_as_mels_256": ("mn10_as_mels_256_mAP_474.pt", {"n_mels": 256}),
}
for _name, (_file, _arguments) in _PUBLISHED.items():
    register_model(_name, weights=f"{RELEASE}/{_file}")(partial(MobileNetV3, **_arguments))
