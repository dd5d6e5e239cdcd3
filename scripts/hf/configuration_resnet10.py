"""Settings of ResNet-10 for Hugging Face's transformers: the arguments of the network."""

from typing import Any, ClassVar

from models.resnet import ARGUMENTS
from scripts.hf.configuration_base import TaggerConfig


class ResNet10Config(TaggerConfig):
    """What a ResNet-10 is made of.

    Args:
        **settings: those of the network (see `ResNet10`: width, dropout, sample_rate, n_mels, ...), and those of every
            tagger (see `TaggerConfig`).
    """

    model_type = "resnet10"
    ARGUMENTS: ClassVar[dict[str, Any]] = ARGUMENTS

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
