"""EfficientNet on mel spectrograms: the CNN of PSLA and CMKD, and a smaller one.

Method: Tan, Le, "EfficientNet: Rethinking model scaling for convolutional neural networks", ICML 2019, as timm builds
it; Gong, Chung, Glass, "PSLA: Improving audio tagging with pretraining, sampling, labeling, and aggregation",
IEEE/ACM TASLP 2021, for the front-end and the attention pooling; Gong, Khurana, Rouditchenko, Glass, "CMKD:
CNN/transformer-based cross-model knowledge distillation for audio classification", arXiv 2203.06760, for mean pooling.
Names below `body.` in the state dict are timm's.

Letters: B batch, F mel bands, T frames, C classes, D channels, H heads; primes mark what is left after striding.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some
from models.base import Encoded
from models.kaldi_mel import KaldiMel
from models.pooled_cnn import PooledCNN
from models.registry import register_model
from models.settings import Number, Positive, Rate
from models.weight_adaptation import adapt_image_cnn_weights

Pooling = Literal["mean", "attention"]


class AttentionPooling(nn.Module):
    """PSLA's classifier: every head classifies every column of a map and weights the columns for each class.

    The weights of the heads are a softmax, so that probabilities stay such, and heads share the bias of a class, so
    that it can be set to what is known of the classes; both are each head's own in PSLA.

    Args:
        width: D.
        num_classes: C.
        num_heads: H.
    """

    def __init__(self, width: int, num_classes: int, num_heads: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_heads, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.attention_weight = nn.Parameter(torch.empty(num_classes, num_heads, width))
        self.attention_bias = nn.Parameter(torch.zeros(num_classes, num_heads))
        self.head_score = nn.Parameter(torch.zeros(num_heads))
        for weight in (self.weight, self.attention_weight):
            nn.init.uniform_(weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits and weights of each class and column: (B,T',D) -> (B,T',C,H), (B,T',C,H).

        Weights sum to one over columns and heads.
        """
        shape = self.attention_bias.shape
        logits = F.linear(x, self.weight.flatten(0, 1)).unflatten(2, shape) + self.bias[:, None]
        attention = F.linear(x, self.attention_weight.flatten(0, 1), self.attention_bias.flatten()).unflatten(2, shape)
        # The sigmoid over its sum, which cannot be 0 this way, nor in a graph: those have no logarithm of a sigmoid.
        return logits, (-F.softplus(-attention)).softmax(1) * self.head_score.softmax(0)


class EfficientNet(PooledCNN):
    """EfficientNet.

    With mean pooling it gives logits, with attention pooling probabilities.

    Args:
        variant: timm's name of the network.
        num_classes: C.
        pooling: "mean" over both axes of the last map and a linear layer, or "attention", see `AttentionPooling`.
        dropout: before the last layer.
        drop_path_rate: stochastic depth of the last block, by default PSLA's; earlier blocks have less.
        mean: of the spectrogram's logarithms over a data set, by default AudioSet's as PSLA has it.
        std: their standard deviation. They are divided by it as in PSLA, not by twice of it as in AST.
        **settings: those of `MelSettings` (`models.settings`), by default `shared_settings`.

    Raises:
        UserError: a pooling that there is not.
    """

    last_layer = "classifier"
    stride = 32
    shared_settings = (KaldiMel.defaults,)

    def __init__(
        self,
        variant: str,
        /,
        *,
        num_classes: int = 527,
        pooling: Pooling = "mean",
        dropout: Rate = 0.0,
        drop_path_rate: Rate = 0.2,
        mean: Number = -4.6476,
        std: Positive = 4.5699,
        **settings: Any,
    ) -> None:
        from timm.models import create_model  # takes seconds, which starts of other models need not wait for

        if pooling not in get_args(Pooling):
            raise UserError(f"pooling must be one of {some(get_args(Pooling))}, not {pooling!r}")
        front_end = KaldiMel(mean=mean, std=std / 2, **settings)  # which divides by twice its std
        body = create_model(variant, in_chans=1, num_classes=0, global_pool="", drop_path_rate=drop_path_rate)
        width = cast(int, body.num_features)
        outputs: Literal["logits", "probabilities"] = "logits" if pooling == "mean" else "probabilities"
        super().__init__(front_end, num_classes=num_classes, embed_dim=width, outputs=outputs)
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.classifier: nn.Module
        if pooling == "mean":
            self.classifier = nn.Linear(width, num_classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        else:
            self.classifier = AttentionPooling(width, num_classes)

    @property
    def n_layers(self) -> int:
        """Number of stages: timm's, and two convolutions."""
        return len(cast(Any, self.body).blocks) + 2

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of the first convolution, of each of timm's stages and of the last convolution."""
        body = cast(Any, self.body)
        x = body.bn1(body.conv_stem(mel[:, None]))
        yield x
        for stage in body.blocks:
            x = stage(x)
            yield x
        yield body.bn2(body.conv_head(x))

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Pooled maps (B,D), or with attention pooling their columns -> (B,C), see `outputs`."""
        if self.outputs == "logits":
            return self.classifier(self.dropout(clip))
        logits, weights = self.classifier(self.dropout(self.frames(encoded)))
        if self.activation == "sigmoid":
            return (logits.sigmoid() * weights).sum((1, 3)).clamp(max=1)  # weights sum to 1 but for rounding
        tagged = (logits.softmax(2) * weights).sum((1, 3))
        return tagged / tagged.sum(1, keepdim=True)  # each class has weights of its own

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take timm's ImageNet weights, too, see `adapt_image_cnn_weights`."""
        return adapt_image_cnn_weights(state, "conv_stem", "classifier")


for _name in ("efficientnet_b0", "efficientnet_b2"):
    register_model(_name, initialisation=f"timm:{_name}")(partial(EfficientNet, _name))
