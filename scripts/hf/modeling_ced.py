"""CED for Hugging Face's transformers: audio tagging and embeddings of sound.

The network is that of the training framework, in the names of CED's published state dicts. Clips longer than
`target_length` frames are cut into chunks and the probabilities of a clip's chunks are averaged; what lies behind a
clip's end in a padded batch is not heard. So a clip's result depends neither on its batch mates nor on padding.

Letters: B batch, F mel bands, T frames, T' time steps (columns of patches), D width, C classes, R chunks of all clips.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from models.audiotransformer import AudioTransformer, _masked_mean
from models.chunks import join_logits
from models.headed import Head
from models.layers import LayerScale
from models.vit import Tokens
from scripts.hf.configuration_ced import CedConfig


class CedPreTrainedModel(PreTrainedModel):
    """What both models have in common: the network in `encoder`, its inputs, its embeddings."""

    config_class = CedConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers declares it)

    def __init__(self, config: CedConfig, *, with_head: bool) -> None:
        super().__init__(config)
        # Models are created on the meta device, where the front-end cannot work out its bands.
        with torch.device("cpu"):
            network = AudioTransformer(num_classes=len(config.labels), **config.network())
        network.activation = "softmax" if config.problem_type == "single_label_classification" else "sigmoid"
        network.labels = config.labels
        head: nn.Module = network.outputlayer
        if config.head is not None:
            sizes = {name: config.head[name] for name in ("hidden_sizes", "dropout")}
            sizes |= {"labels": config.labels, "activation": network.activation}
            head = Head(network.embed_dim, len(config.labels), **sizes)
        del network.outputlayer
        delattr(network.front_end, "0")  # the feature extractor has its tensors
        if network.init_bn is not None:
            network._modules["init_bn"] = network.init_bn[1]
        self.encoder = network
        if with_head:
            self.outputlayer = head
        self.post_init()

    def embed(self, input_values: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            input_values: (B,F,T) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.

        Returns:
            One vector a clip (B,D), and one a time step (B,T',D), zero behind a clip's end.
        """
        return self.encoder.embed_spectrogram(*self._own_frames(input_values, attention_mask))

    def _own_frames(self, mel: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spectrograms without the padding that all clips share, and frames (B,) of each, None where they are equal."""
        if mel.ndim != 3:
            raise ValueError(
                f"input_values are {tuple(mel.shape)}; wanted spectrograms (batch, mel bands, frames), "
                "as the feature extractor of this model returns them"
            )
        mel = mel.to(self.encoder.time_pos_embed.dtype)
        if mask is None:
            return mel, None
        if mask.shape != (mel.shape[0], mel.shape[2]):
            raise ValueError(f"attention_mask is {tuple(mask.shape)}; wanted (batch, frames) of {tuple(mel.shape)}")
        n_frames = mask.long().sum(1)
        shortest, longest = int(n_frames.min()), int(n_frames.max())
        if shortest < self.encoder.patch_size:
            raise ValueError(f"a clip has {shortest} frames of its own; wanted at least {self.encoder.patch_size}")
        return mel[..., :longest], None if shortest == longest else n_frames

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioTransformer):
            for name, parameter in module.named_parameters(recurse=False):  # position embeddings and class token
                nn.init.normal_(parameter, std=0.0 if name == "cls_token" else 0.02)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, self.config.init_values)


class CedModel(CedPreTrainedModel):
    """The network without its last layer, for embeddings."""

    _keys_to_ignore_on_load_unexpected = [r"^outputlayer\."]  # noqa: RUF012  (as transformers declares it)

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config, with_head=False)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Embed clips.

        Args:
            input_values: (B,F,T) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.
            return_dict: False for a plain tuple.

        Returns:
            `last_hidden_state`: one vector a time step (B,T',D), zero behind a clip's end; `pooler_output`: one vector
            a clip (B,D), their mean.
        """
        clip, steps = self.embed(input_values, attention_mask)
        output = BaseModelOutputWithPooling(last_hidden_state=steps, pooler_output=clip)
        return output.to_tuple() if return_dict is False else output


class CedForAudioClassification(CedPreTrainedModel):
    """The whole tagger."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config, with_head=True)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Tag clips.

        Args:
            input_values: (B,F,T) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.
            labels: targets of the loss: (B,C) 0 to 1 for problem type "multi_label_classification" (binary cross
                entropy), class indices (B,) or probabilities (B,C) for "single_label_classification" (cross entropy).
            output_hidden_states: whether to give `hidden_states`; a second pass, see `CedModel` where only
                embeddings are wanted.
            return_dict: False for a plain tuple.

        Returns:
            `loss` where labels are given; `logits` (B,C), whose sigmoid (softmax for "single_label_classification") are
            the probabilities, also of clips of several chunks; `hidden_states`, a tuple of one: the last layer's, a
            vector a time step (B,T',D).
        """
        mel, n_frames = self._own_frames(input_values, attention_mask)
        logits = self._logits(mel, n_frames)
        hidden = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            hidden = (self.encoder.embed_spectrogram(mel, n_frames)[1],)
        loss = None if labels is None else self._loss(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)
        return output.to_tuple() if return_dict is False else output

    def _logits(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """(B,C) logits of the clips' probabilities."""
        if self.config.head is not None:
            return self.outputlayer(self.encoder.embed_spectrogram(mel, n_frames)[0])
        rows = self.encoder._rows(mel, n_frames)
        logits = self._logits_of_rows(self.encoder._encode(rows.mel, rows.columns))
        if rows.clip is None:
            return logits
        return join_logits(logits, rows.clip, len(mel), self.encoder.eval_avg, self.encoder.activation)

    def _logits_of_rows(self, tokens: Tokens) -> Tensor:
        """(R,C)."""
        if tokens.prefix is not None:
            return self.outputlayer(tokens.prefix[:, 0])
        columns = tokens.grid.mean(1)  # (R,t,D)
        if self.encoder.pooling != "dm":
            return self.outputlayer(_masked_mean(columns, tokens.own))
        own = torch.ones(columns.shape[:2], dtype=torch.bool, device=columns.device)
        own = own if tokens.own is None else tokens.own
        row = own.nonzero()[:, 0]  # the row of each column that counts
        return join_logits(self.outputlayer(columns[own]), row, len(columns), "mean", self.encoder.activation)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels)
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)}; wanted 0 or 1 for each class, {tuple(logits.shape)}. For labels "
                "that are the index of the one class of a clip, load the model with "
                'problem_type="single_label_classification"'
            )
        return F.binary_cross_entropy_with_logits(logits, labels.float())
