"""What all exported taggers have in common in Hugging Face's transformers: inputs, masks, outputs, loss.

Padding after a clip's end is ignored, so that a clip's result depends neither on its batch
mates nor on padding.

Letters: B batch, F mel bands, T frames, T' time steps, D width, C classes.
"""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from models.base import AudioTagger
from models.ced_mel import CedMel
from models.headed import Head
from models.other_heads import create_head
from scripts.hf.configuration_base import TaggerConfig


class TaggerPreTrainedModel(PreTrainedModel):
    """A network on CED's log-mels in `encoder`, its inputs, its embeddings; a subclass sets the network."""

    # No `config_class`: transformers copies it to every subclass, where it would hide that of the network's own class.
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    network_class: ClassVar[type[AudioTagger]]
    encoder: AudioTagger

    def __init__(self, config: TaggerConfig, *, with_head: bool) -> None:
        super().__init__(config)
        # Models are created on the meta device, where the front-end cannot work out its bands.
        with torch.device("cpu"):
            network = self.network_class(num_classes=len(config.labels), **config.network())
        network.activation = "softmax" if config.problem_type == "single_label_classification" else "sigmoid"
        network.labels = config.labels
        own_head = network.last_layer.split(".")[0]
        head: nn.Module = getattr(network, own_head)
        if config.head is not None:
            arguments = {
                name: value for name, value in config.head.items() if name not in ("kind", "embed_dim", "facts")
            }
            arguments |= {"labels": config.labels, "activation": network.activation}
            width = config.head.get("embed_dim", network.embed_dim)
            head = create_head(config.head.get("kind", "mlp"), width, len(config.labels), **arguments)
        delattr(network, own_head)
        delattr(network.front_end, "0")  # the feature extractor has its tensors
        self._rename(network)
        self.encoder = network
        if with_head:
            self.outputlayer = head
        self.post_init()

    def _rename(self, network: AudioTagger) -> None:
        """Give the modules of a network the names that they have in the folder, where these differ."""

    def embed(self, input_values: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            input_values: (B,T,F) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.

        Returns:
            One vector a clip (B,D), and one a time step (B,T',D), zero behind a clip's end.
        """
        return self.encoder.embed_spectrogram(*self._trim_padding(input_values, attention_mask))

    def _trim_padding(self, mel: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spectrograms without the padding that all clips share, and frames (B,) of each, None where they are equal.

        (B,T,F) -> (B,F,T), as the network takes them.
        """
        n_mels = self.encoder.front_end.n_mels
        if mel.ndim != 3 or mel.shape[2] != n_mels:
            raise ValueError(
                f"input_values are {tuple(mel.shape)}; expected spectrograms (batch, frames, {n_mels} mel bands), "
                "as the feature extractor of this model returns them"
            )
        mel = mel.to(next(self.encoder.parameters()).dtype)
        if mask is None:
            return mel.transpose(1, 2), None
        if mask.shape != mel.shape[:2]:
            raise ValueError(f"attention_mask is {tuple(mask.shape)}; expected (batch, frames) of {tuple(mel.shape)}")
        n_frames = mask.long().sum(1)
        shortest, longest = int(n_frames.min()), int(n_frames.max())
        least = cast(CedMel, self.encoder.front_end).min_frames
        if shortest < least:
            raise ValueError(f"a clip has {shortest} frames of its own; expected at least {least}")
        return mel[:, :longest].transpose(1, 2), None if shortest == longest else n_frames


class TaggerModel(TaggerPreTrainedModel):
    """A network without its last layer, for embeddings."""

    _keys_to_ignore_on_load_unexpected = [r"^outputlayer\."]  # noqa: RUF012  (as transformers declares it)

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__(config, with_head=False)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Embed clips.

        Args:
            input_values: (B,T,F) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.
            return_dict: False for a plain tuple.

        Returns:
            `last_hidden_state`: one vector a time step (B,T',D), zero behind a clip's end; `pooler_output`: one vector
            a clip (B,D), their mean.
        """
        clip, steps = self.embed(input_values, attention_mask)
        output = BaseModelOutputWithPooling(last_hidden_state=steps, pooler_output=clip)
        return output.to_tuple() if return_dict is False else output


class TaggerForAudioClassification(TaggerPreTrainedModel):
    """A whole tagger."""

    def __init__(self, config: TaggerConfig) -> None:
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
            input_values: (B,T,F) decibels, from the feature extractor.
            attention_mask: (B,T) 1 for a clip's own frames, 0 behind its end; None where all are its own.
            labels: targets of the loss: (B,C) 0 to 1 for problem type "multi_label_classification" (binary cross
                entropy), class indices (B,) or probabilities (B,C) for "single_label_classification" (cross entropy).
            output_hidden_states: whether to give `hidden_states`; a second pass, see the model without a last layer
                if only embeddings are needed.
            return_dict: False for a plain tuple.

        Returns:
            `loss` where labels are given; `logits` (B,C), whose sigmoid (softmax for "single_label_classification") are
            the probabilities, of clips of any length; `hidden_states`, a tuple of one: the last layer's, a vector a
            time step (B,T',D).
        """
        mel, n_frames = self._trim_padding(input_values, attention_mask)
        logits = self._logits(mel, n_frames)
        hidden = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            hidden = (self.encoder.embed_spectrogram(mel, n_frames)[1],)
        loss = None if labels is None else self._loss(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)
        return output.to_tuple() if return_dict is False else output

    def _logits(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """(B,C) logits of the clips' probabilities; what reads more than embeddings overrides it."""
        head = self.outputlayer
        if not isinstance(head, Head):
            return head(self.encoder.embed_clips(mel, n_frames))
        return head(head.embed_spectrogram(self.encoder, mel, n_frames))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels)
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)}; expected 0 or 1 for each class, {tuple(logits.shape)}. For labels "
                "that are the index of the one class of a clip, load the model with "
                'problem_type="single_label_classification"'
            )
        return F.binary_cross_entropy_with_logits(logits, labels.float())
