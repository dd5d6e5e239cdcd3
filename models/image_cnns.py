"""Image CNNs on mel spectrograms: ResNet-50 and DenseNet-121, teachers of small networks.

Methods: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016; Huang, Liu, van der Maaten,
Weinberger, "Densely connected convolutional networks", CVPR 2017, as timm builds them, with one input channel.
Front-end and pooling are this project's own choice. Names below `body.` in the state dict are timm's.

Letters: B batch, F mel bands, T frames, C classes, D channels; primes mark what is left after striding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from models.base import Encoded
from models.kaldi_mel import KaldiMel
from models.pooled_cnn import PooledCNN, run_stages
from models.registry import register_model
from models.settings import Rate
from models.weight_adaptation import adapt_image_cnn_weights


@dataclass(frozen=True)
class _Parts:
    """Names of the modules of a network of timm.

    Attributes:
        stages: modules of each stage, in order.
        stem: first convolution.
        classifier: last layer.
    """

    stages: tuple[tuple[str, ...], ...]
    stem: str
    classifier: str


_PARTS = {
    "resnet50": _Parts(
        (("conv1", "bn1", "act1"), ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",)), "conv1", "fc"
    ),
    "densenet121": _Parts(
        (
            ("features.conv0", "features.norm0"),
            ("features.pool0", "features.denseblock1"),
            ("features.transition1", "features.denseblock2"),
            ("features.transition2", "features.denseblock3"),
            ("features.transition3", "features.denseblock4", "features.norm5"),
        ),
        "features.conv0",
        "classifier",
    ),
}


class ImageCNN(PooledCNN):
    """An image CNN with one input channel; gives logits.

    Args:
        variant: timm's name of the network.
        num_classes: C.
        dropout: before the last layer.
        **settings: those of `MelSettings` (`models.settings`), by default `shared_settings`.
    """

    last_layer = "classifier"
    stride = 32
    shared_settings = (replace(KaldiMel.defaults, n_mels=64),)

    def __init__(self, variant: str, /, *, num_classes: int = 527, dropout: Rate = 0.0, **settings: Any) -> None:
        from timm.models import create_model  # takes seconds, which starts of other models need not wait for

        body = create_model(variant, in_chans=1, num_classes=0, global_pool="")
        width = cast(int, body.num_features)
        (defaults,) = self.shared_settings
        super().__init__(KaldiMel(**{"n_mels": defaults.n_mels, **settings}), num_classes=num_classes, embed_dim=width)
        for module in body.modules():
            if isinstance(module, nn.AvgPool2d):  # else it drops the last column, or fails where there is one
                module.ceil_mode = True
        self.parts = _PARTS[variant]
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def n_layers(self) -> int:
        """Number of stages."""
        return len(self.parts.stages)

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of the first convolution with its norm, and of each of the four groups of blocks."""
        modules = [nn.Sequential(*map(self.body.get_submodule, names)) for names in self.parts.stages]
        return run_stages(mel[:, None], modules)

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Pooled maps (B,D) -> logits (B,C)."""
        return self.classifier(self.dropout(clip))

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take timm's ImageNet weights, too, see `adapt_image_cnn_weights`."""
        return adapt_image_cnn_weights(state, self.parts.stem, self.parts.classifier)


for _variant in _PARTS:
    register_model(f"{_variant}_audio", initialisation=f"timm:{_variant}")(partial(ImageCNN, _variant))
