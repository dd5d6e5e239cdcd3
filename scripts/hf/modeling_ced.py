"""CED for Hugging Face's transformers: audio tagging and embeddings of sound.

The network is that of the training framework, in the names of CED's published state dicts. Clips longer than
`target_length` frames are cut into chunks and the probabilities of a clip's chunks are averaged.

Letters: B batch, F mel bands, T frames, D width, C classes, R chunks of all clips, t columns of patches.
"""

from typing import cast

import torch
from torch import Tensor, nn

from models.audiotransformer import AudioTransformer, masked_mean
from models.base import AudioTagger, Encoded
from models.chunks import join_logits
from models.layers import LayerScale
from scripts.hf.configuration_ced import CedConfig
from scripts.hf.modeling_base import TaggerForAudioClassification, TaggerModel, TaggerPreTrainedModel


class CedPreTrainedModel(TaggerPreTrainedModel):
    """What both models have in common: CED's network, and how it starts."""

    config_class = CedConfig
    network_class = AudioTransformer
    encoder: AudioTransformer
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers declares it)

    def _rename(self, network: AudioTagger) -> None:
        norm = cast(AudioTransformer, network).init_bn
        if norm is not None:
            network._modules["init_bn"] = norm[1]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioTransformer):
            for name, parameter in module.named_parameters(recurse=False):  # position embeddings and class token
                nn.init.normal_(parameter, std=0.0 if name == "cls_token" else 0.02)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, self.config.init_values)


class CedModel(TaggerModel, CedPreTrainedModel):
    """The network without its last layer, for embeddings."""


class CedForAudioClassification(TaggerForAudioClassification, CedPreTrainedModel):
    """The whole tagger."""

    def _logits(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """(B,C) logits of the clips' probabilities."""
        if self.config.head is not None:
            return super()._logits(mel, n_frames)
        encoded = self.encoder.encode(mel, n_frames)
        logits = self._logits_of_rows(encoded)
        if encoded.clip_of_row is None:
            return logits
        return join_logits(logits, encoded.clip_of_row, len(mel), self.encoder.eval_avg, self.encoder.activation)

    def _logits_of_rows(self, encoded: Encoded) -> Tensor:
        """(R,C)."""
        if encoded.prefix is not None:
            return self.outputlayer(encoded.prefix[:, 0])
        assert encoded.tokens is not None
        columns, valid = encoded.tokens.mean(1), encoded.valid  # (R,t,D)
        if self.encoder.pooling != "dm":
            return self.outputlayer(masked_mean(columns, valid))
        if valid is None:
            valid = torch.ones(columns.shape[:2], dtype=torch.bool, device=columns.device)
        row = valid.nonzero()[:, 0]  # the row of each column that counts
        return join_logits(self.outputlayer(columns[valid]), row, len(columns), "mean", self.encoder.activation)
