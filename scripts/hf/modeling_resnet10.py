"""ResNet-10 for Hugging Face's transformers: audio tagging and embeddings of sound.

The network is that of the training framework; its last layer has the name `outputlayer`.
"""

from torch import nn

from models.resnet import ResNet10
from scripts.hf.configuration_resnet10 import ResNet10Config
from scripts.hf.modeling_base import TaggerForAudioClassification, TaggerModel, TaggerPreTrainedModel


class ResNet10PreTrainedModel(TaggerPreTrainedModel):
    """What both models have in common: the network, and how it starts."""

    config_class = ResNet10Config
    network_class = ResNet10
    encoder: ResNet10
    _no_split_modules = ["BasicBlock"]  # noqa: RUF012  (as transformers declares it)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()  # as PyTorch, and so the training framework, starts them
        else:
            super()._init_weights(module)


class ResNet10Model(TaggerModel, ResNet10PreTrainedModel):
    """The network without its last layer, for embeddings."""


class ResNet10ForAudioClassification(TaggerForAudioClassification, ResNet10PreTrainedModel):
    """The whole tagger."""
