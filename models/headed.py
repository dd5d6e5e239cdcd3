"""Heads, small networks from clip embeddings to classes, and taggers that consist of a model and a head.

`models.other_heads` has heads of other kinds, and makes those of all kinds.

Letters: B batch, S samples, F mel bands, T frames, C classes, E embedding width, L layers, I input width.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some
from models.base import Activation, AudioTagger, Encoded, Keep
from models.head_inputs import HeadInput
from models.labels import labels_for

SEGMENT_SECONDS = 10.0  # length of the segments of S-SONDO, which its published heads were trained on
HEAD = "+head."  # prefix of a head's tensors in the state dict of a checkpoint


class Head(nn.Module):
    """Classifier of clip embeddings: standardisation, then a linear layer or an MLP with ReLU.

    A head on several layers of a model weighs their standardised embeddings by a softmax that is trained with it (as
    ELMo, Peters et al., NAACL 2018, and SUPERB, Yang et al., Interspeech 2021): layers of the same width are added,
    others concatenated (this project's own choice). It takes the embeddings of all of these layers, concatenated.

    Args:
        embed_dim: E, with `layers` the sum of their widths.
        num_classes: C.
        hidden_sizes: widths of the hidden layers, empty for a linear head.
        labels: names of the classes, by default their numbers.
        activation: "softmax" (exactly one class per clip) or "sigmoid" (any number).
        dropout: after each hidden layer.
        layers: numbers of the layers; none for the model's clip embedding.
        widths: of the clip embeddings of each of `layers`.

    Attributes:
        kind: of the head, a key of `models.other_heads.KINDS`.
        gate: (L,) logits of the weights of layers; None without several.
        facts: plain values that are stored in its file. Read by this project: "name", "model", "weights_sha256" (see
            `models.heads.weights_sha256`), "chunk_length", "metric", "value" and "data".
        padded: whether it was trained on clips that are zero-padded to 10 s.

    Raises:
        UserError: a width below 1, another number of labels, an unknown activation, or widths that do not fit.
    """

    kind: ClassVar[str] = "mlp"
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        hidden_sizes: Sequence[int] = (),
        labels: list[str] | None = None,
        activation: Activation = "softmax",
        dropout: float = 0.0,
        layers: Sequence[int] = (),
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if len(layers) != len(widths) or (widths and sum(widths) != embed_dim):
            raise UserError(
                f"a head on layers {some(map(str, layers))} of widths {some(map(str, widths))}: expected a width for "
                f"each layer, {embed_dim} in all"
            )
        adds = len(set(widths)) == 1
        sizes = [widths[0] if adds else embed_dim, *hidden_sizes, num_classes]
        if any(size < 1 for size in sizes):
            raise UserError(f"a head from {sizes[0]} over {sizes[1:-1]} to {sizes[-1]}: every width must be at least 1")
        if activation not in get_args(Activation):
            raise UserError(f"activation must be one of {some(get_args(Activation))}, not {activation!r}")
        self.embed_dim, self.num_classes, self.hidden_sizes = embed_dim, num_classes, tuple(hidden_sizes)
        self.labels, self.activation, self.dropout = labels_for(num_classes, labels), activation, dropout
        self.read_layers, self.widths, self.adds_layers = tuple(layers), tuple(widths), adds
        self.facts: dict[str, Any] = {}
        self.padded = False
        self.gate = nn.Parameter(torch.zeros(len(layers))) if len(layers) > 1 else None
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim))
        self._add_classifier(sizes)

    def _add_classifier(self, sizes: Sequence[int]) -> None:
        """Make the layers behind standardisation and weights; `sizes` are input, hidden layers and C."""
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes[:-1]):
            modules += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(self.dropout)]
        self.layers = nn.Sequential(*modules, nn.Linear(sizes[-2], sizes[-1]))

    @property
    def input(self) -> HeadInput:
        """What it takes of a model."""
        return HeadInput(self.read_layers)

    @property
    def width(self) -> int:
        """I, of the vectors that `reduce` returns."""
        return self.embed_dim

    @property
    def layer_weights(self) -> dict[int, float]:
        """Weight of each layer; empty for a head on the model's clip embedding."""
        weights = [1.0] * len(self.read_layers) if self.gate is None else self.gate.softmax(0).tolist()
        return dict(zip(self.read_layers, weights, strict=True))

    def reduce(self, chunks: Tensor) -> Tensor:
        """Convert the input of chunks to the vectors whose mean over a clip is classified: (B, input) -> (B,I)."""
        return chunks

    def forward(self, embedding: Tensor) -> Tensor:
        """Means over a clip of what `reduce` returns, for most heads clip embeddings: (B,I) -> logits (B,C)."""
        return self.layers(self.weigh_layers((embedding - self.mean) / self.scale))

    def weigh_layers(self, x: Tensor) -> Tensor:
        """Add or concatenate standardised embeddings of layers by their weights: (B, sum of widths) -> (B,D)."""
        if self.gate is None:
            return x
        parts = zip(self.gate.softmax(0), x.split(self.widths, 1), strict=True)
        weighted = [weight * part for weight, part in parts]
        return torch.stack(weighted).sum(0) if self.adds_layers else torch.cat(weighted, 1) * len(weighted)

    def embed_spectrogram(self, model: AudioTagger, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Return its input of one-chunk clips: spectrograms (B,F,T), frames of each (B,) or None -> (B,I)."""

        def read(encoded: Encoded) -> tuple[Tensor]:
            return (self.reduce(self.input.read(model, encoded)),)

        return model.run_spectrogram(read, mel, n_frames, self.input.layers)[0]

    def embed_waveform(
        self, model: AudioTagger, waveform: Tensor, lengths: Tensor | None, *, as_stored: bool = False
    ) -> Tensor:
        """Return its input of one-chunk clips: waveforms (B,S), samples of each (B,) or None -> (B,I).

        With `as_stored`, what is read of the model is rounded as in a store of embeddings, to half precision.
        """

        def read(encoded: Encoded) -> tuple[Tensor]:
            found = self.input.read(model, encoded)
            if as_stored:
                largest = torch.finfo(torch.float16).max
                found = found.clamp(-largest, largest).half().float()
            return (self.reduce(found),)

        return model.run_waveform(read, waveform, lengths, self.input.layers)[0]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of its kind as plain values."""
        layers = {"layers": list(self.read_layers), "widths": list(self.widths)} if self.read_layers else {}
        return {"hidden_sizes": list(self.hidden_sizes), "dropout": self.dropout, **layers}

    def config(self) -> dict[str, Any]:
        """Return the arguments and attributes as plain values, from which `restore_head` rebuilds the head."""
        return {
            "kind": self.kind,
            "embed_dim": self.embed_dim,
            "num_classes": self.num_classes,
            **self.arguments(),
            "labels": list(self.labels),
            "activation": self.activation,
            "padded": self.padded,
            "facts": self.facts,
        }

    @property
    def chunk_seconds(self) -> float:
        """Length of the chunks over which the training embeddings of a clip were averaged."""
        return float(self.facts.get("chunk_length", SEGMENT_SECONDS))


class HeadedTagger(AudioTagger):
    """A tagger that consists of a model, which embeds, and a head, which classifies the embeddings.

    A clip is embedded in one piece, or in the chunks of the model. For long clips in the chunks of the head, apply the
    head to the mean of the chunks' embeddings, see `Head.chunk_seconds`.

    Args:
        model: computes the embeddings.
        head: classifies them.
    """

    def __init__(self, model: AudioTagger, head: Head) -> None:
        super().__init__(model.front_end, num_classes=head.num_classes, embed_dim=model.embed_dim)
        self.model, self.head = model, head
        self.masks_padding = model.masks_padding  # type: ignore[misc]  # depends on the model
        self.name, self.arguments = model.name, dict(model.arguments)
        self.labels, self.activation = list(head.labels), head.activation
        last = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)][-1:]
        self.last_layer = ".".join(["head", *last])  # type: ignore[misc]  # depends on the head

    @property
    def full_name(self) -> str:
        """The names of model and head, joined by `+`."""
        return f"{self.model.full_name}+{self.head.facts.get('name', 'head')}"

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Encode with the model, see `AudioTagger.encode`."""
        return self.model.encode(mel, n_frames, keep=keep, layers=layers)

    def classify(self, encoded: Encoded) -> Tensor:
        """Return the logits of the head (B,C)."""
        return self.head(self._read(encoded))

    def pool(self, encoded: Encoded) -> Tensor:
        """Return the clip embeddings of the model (B,E)."""
        return self.model.pool(encoded)

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return self.model.n_layers

    def pool_layers(self, encoded: Encoded) -> dict[int, Tensor]:
        """Return the clip embeddings of layers of the model, see `AudioTagger.pool_layers`."""
        return self.model.pool_layers(encoded)

    def frames(self, encoded: Encoded) -> Tensor:
        """Return the time step embeddings of the model (B,T',E)."""
        return self.model.frames(encoded)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tag clips: (B,S), samples of each (B,) or None -> logits (B,C)."""
        return self.head(self.embed_for_head(waveform, lengths))

    def _read(self, encoded: Encoded) -> Tensor:
        return self.head.reduce(self.head.input.read(self.model, encoded))

    @torch.no_grad()
    def tag_embedding(self, embedding: Tensor) -> Tensor:
        """Convert clip embeddings (B,E) to the head's probabilities (B,C), without gradients.

        Raises:
            UserError: an embedding is NaN or infinite.
        """
        if not bool(embedding.isfinite().all()):
            raise UserError(f"the output of {self.name} is NaN: its weights are damaged or its training diverged")
        return self.probabilities(self.head(embedding))

    def embed_for_head(self, waveform: Tensor, lengths: Tensor | None = None, *, as_stored: bool = False) -> Tensor:
        """Return the input of the head for clips, padded as in its training.

        Args:
            waveform: (B,S).
            lengths: (B,) samples of each clip, or None for S.
            as_stored: round what is read of the model as a store of embeddings does, to half precision.

        Returns:
            (B,I), the clip embeddings of most heads.
        """
        if self.head.padded:  # the zeros are valid samples
            n_samples, n_min = waveform.shape[1], round(SEGMENT_SECONDS * self.sample_rate)
            if lengths is not None:
                is_padding = torch.arange(n_samples, device=waveform.device) >= lengths[:, None].to(waveform.device)
                waveform, lengths = waveform.masked_fill(is_padding, 0.0), lengths.clamp(min=n_min)
            waveform = F.pad(waveform, (0, max(n_min - n_samples, 0)))
        return self.head.embed_waveform(self.model, waveform, lengths, as_stored=as_stored)

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), frames of each (B,) or None -> logits (B,C)."""
        if self.head.padded:
            mel, n_frames = self._append_silence(mel, n_frames)
        return self.head(self.head.embed_spectrogram(self.model, mel, n_frames))

    def forward_export(self, mel: Tensor) -> Tensor:
        """Return probabilities (B,C) of spectrograms (B,F,T), traceable; see `AudioTagger.forward_export`."""
        if self.head.input.layers:
            return self.probabilities(
                self.head(torch.cat(self.model.embed_layers_export(mel, self.head.input.layers), 1))
            )
        if self.head.input.stride:
            return self.probabilities(self.forward_spectrogram(mel))
        return self.probabilities(self.head(self.model.embed_export(mel)))

    def embed_export(self, mel: Tensor) -> Tensor:
        """Return clip embeddings (B,E) of spectrograms (B,F,T), traceable; see `AudioTagger.embed_export`."""
        return self.model.embed_export(mel)

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (B,C) and clip embeddings (B,E) of one pass."""

        def read(encoded: Encoded) -> tuple[Tensor, Tensor]:
            return self._read(encoded), self.model.pool(encoded)

        # of all lengths, so that the head runs once
        found, clip = self.model.run_spectrogram(read, mel, n_frames, self.head.input.layers)
        return self.head(found), clip

    def n_steps(self, n_samples: int) -> int:
        """Return the number of time steps of a clip of `n_samples` samples."""
        return self.model.n_steps(n_samples)

    def merge_tokens(self, setting: Any) -> None:
        """Set the token merging of the model."""
        self.model.merge_tokens(setting)
        self.arguments = dict(self.model.arguments)

    def _append_silence(self, mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad spectrograms (B,F,T) to `SEGMENT_SECONDS` with valid frames of silence."""
        n_min = self.front_end.n_frames(round(SEGMENT_SECONDS * self.sample_rate))
        n_total = mel.shape[2]
        silence = self.front_end(mel.new_zeros(1, self.sample_rate))[:, :, -1:]  # (1,F,1)
        if n_frames is not None:
            n_frames = n_frames.to(mel.device)
            is_padding = torch.arange(n_total, device=mel.device) >= n_frames[:, None]  # (B,T)
            mel = torch.where(is_padding[:, None], silence, mel)
            n_frames = n_frames.clamp(min=n_min)
        if n_total < n_min:
            mel = torch.cat([mel, silence.expand(len(mel), -1, n_min - n_total)], 2)
        return mel, n_frames
