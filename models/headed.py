"""A head, and a model with one: small networks from clip embeddings to classes behind the face of a tagger.

Letters: B batch, S samples, F mel bands, T frames, C classes, E embedding width.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some
from models.base import Activation, AudioTagger, Encoded, Keep
from models.labels import labels_for

SEGMENT_SECONDS = 10.0  # of what S-SONDO takes at once, and its published heads were trained on
HEAD = "+head."  # before the names of a head's tensors in a state dict that holds those of a model, too


class Head(nn.Module):
    """Classes from a clip's embedding: standardised, then one linear layer or several with ReLU between.

    Args:
        embed_dim: E.
        num_classes: C.
        hidden_sizes: widths of the hidden layers, none for a linear head.
        labels: names of the classes, by default their numbers.
        activation: "softmax" (exactly one class a clip) or "sigmoid" (any number).
        dropout: after each hidden layer.

    Attributes:
        facts: plain values that go into its file. Read by this project: "name", "model", "weights_sha256" (what
            `models.heads.weights_sha256` says of the model), "chunk_length", "metric", "value" and "data".
        padded: it was trained on clips that zeros fill up to 10 s.

    Raises:
        UserError: a width below 1, another number of labels, or no such activation.
    """

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
    ) -> None:
        super().__init__()
        sizes = [embed_dim, *hidden_sizes, num_classes]
        if any(size < 1 for size in sizes):
            raise UserError(f"a head from {sizes[0]} over {sizes[1:-1]} to {sizes[-1]}: every width must be at least 1")
        if activation not in get_args(Activation):
            raise UserError(f"activation must be one of {some(get_args(Activation))}, not {activation!r}")
        self.embed_dim, self.num_classes, self.hidden_sizes = embed_dim, num_classes, tuple(hidden_sizes)
        self.labels, self.activation, self.dropout = labels_for(num_classes, labels), activation, dropout
        self.facts: dict[str, Any] = {}
        self.padded = False
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim))
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], num_classes))

    def forward(self, embedding: Tensor) -> Tensor:
        """Clip embeddings (B,E) -> logits (B,C)."""
        return self.layers((embedding - self.mean) / self.scale)

    def config(self) -> dict[str, Any]:
        """Return what it is, as plain values, of which `restore_head` makes it again."""
        return {
            "embed_dim": self.embed_dim,
            "num_classes": self.num_classes,
            "hidden_sizes": list(self.hidden_sizes),
            "labels": list(self.labels),
            "activation": self.activation,
            "dropout": self.dropout,
            "padded": self.padded,
            "facts": self.facts,
        }

    @property
    def chunk_seconds(self) -> float:
        """Length of the chunks whose embeddings, averaged over a clip, it was trained on."""
        return float(self.facts.get("chunk_length", SEGMENT_SECONDS))


def restore_head(config: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> Head:
    """Make a head again.

    Args:
        config: what `Head.config` returned.
        state: its state dict.
        origin: where both were read.

    Returns:
        The head, in evaluation mode.

    Raises:
        UserError: something is missing, or they do not belong together.
    """
    try:
        sizes = {name: config[name] for name in ("hidden_sizes", "labels", "activation", "dropout")}
        head = Head(config["embed_dim"], config["num_classes"], **sizes)
        head.load_state_dict(dict(state), strict=True)
        head.facts, head.padded = dict(config["facts"]), bool(config["padded"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{origin}: is no whole head ({error}): make it again with `run.py probe`") from error
    return head.eval()


class HeadedTagger(AudioTagger):
    """A model and a head behind the face of a tagger: it embeds as the model does, and tags as the head does.

    A clip is embedded in one piece, or as the model cuts it itself. What a long one gets from the chunks that a head
    was trained on is the head's output for the mean of their embeddings, see `Head.chunk_seconds`.

    Args:
        model: gives the embeddings, and the front-end.
        head: reads them.
    """

    def __init__(self, model: AudioTagger, head: Head) -> None:
        super().__init__(model.front_end, num_classes=head.num_classes, embed_dim=model.embed_dim)
        self.model, self.head = model, head
        self.masks_padding = model.masks_padding  # type: ignore[misc]  # as the model does
        self.name, self.arguments = model.name, dict(model.arguments)
        self.labels, self.activation = list(head.labels), head.activation
        self.last_layer = f"head.layers.{len(head.layers) - 1}"  # type: ignore[misc]  # depends on the head's depth

    @property
    def full_name(self) -> str:
        """The names of model and head, joined by `+`."""
        return f"{self.model.full_name}+{self.head.facts.get('name', 'head')}"

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute what the model does, see `AudioTagger.encode`."""
        return self.model.encode(mel, n_frames, keep=keep, layers=layers)

    def classify(self, encoded: Encoded) -> Tensor:
        """Tag: logits (B,C)."""
        return self.head(self.model.pool(encoded))

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips as the model does: (B,E)."""
        return self.model.pool(encoded)

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps as the model does: (B,T',E)."""
        return self.model.frames(encoded)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tag clips: (B,S), own samples (B,) or None -> logits (B,C)."""
        return self.head(self.embed_for_head(waveform, lengths))

    @torch.no_grad()
    def tag_embedding(self, embedding: Tensor) -> Tensor:
        """Turn clip embeddings (B,E) into the head's probabilities (B,C), without gradients.

        Raises:
            UserError: they are no numbers.
        """
        if not bool(embedding.isfinite().all()):
            raise UserError(f"the model {self.name} gives NaN: its weights are damaged or its training diverged")
        return self.probabilities(self.head(embedding))

    def embed_for_head(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips as the head was trained on them: (B,S), own samples (B,) or None -> (B,E)."""
        if self.head.padded:  # trained on clips filled up with zeros that count as sound
            n_samples, least = waveform.shape[1], round(SEGMENT_SECONDS * self.sample_rate)
            if lengths is not None:
                behind = torch.arange(n_samples, device=waveform.device) >= lengths[:, None].to(waveform.device)
                waveform, lengths = waveform.masked_fill(behind, 0.0), lengths.clamp(min=least)
            waveform = F.pad(waveform, (0, max(least - n_samples, 0)))
        return self.model.embed_waveform(waveform, lengths)[0]

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), own frames (B,) or None -> logits (B,C)."""
        if self.head.padded:
            mel, n_frames = self._followed_by_silence(mel, n_frames)
        return self.head(self.model.embed_clips(mel, n_frames))

    def probabilities_of(self, mel: Tensor) -> Tensor:
        """Probabilities of spectrograms of any length (B,F,T) -> (B,C), in shapes alone, as graphs want it."""
        return self.probabilities(self.head(self.model.embedding_of(mel)))

    def embedding_of(self, mel: Tensor) -> Tensor:
        """Clip embeddings of spectrograms of any length (B,F,T) -> (B,E), in shapes alone, as graphs want it."""
        return self.model.embedding_of(mel)

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B,C) and clip embeddings (B,E) in one pass."""
        clip = self.model.embed_clips(mel, n_frames)  # of all lengths, so that the head reads them together
        return self.head(clip), clip

    def n_steps(self, n_samples: int) -> int:
        """Time steps that `embed` gives a clip of `n_samples` samples."""
        return self.model.n_steps(n_samples)

    def merge_tokens(self, setting: Any) -> None:
        """Merge tokens of the model from now on."""
        self.model.merge_tokens(setting)
        self.arguments = dict(self.model.arguments)

    def _followed_by_silence(self, mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fill spectrograms (B,F,T) up to `SEGMENT_SECONDS` with frames of silence that count as sound."""
        least = self.front_end.n_frames(round(SEGMENT_SECONDS * self.sample_rate))
        n_total = mel.shape[2]
        silence = self.front_end(mel.new_zeros(1, self.sample_rate))[:, :, -1:]  # (1,F,1)
        if n_frames is not None:
            n_frames = n_frames.to(mel.device)
            behind = torch.arange(n_total, device=mel.device) >= n_frames[:, None]  # (B,T)
            mel = torch.where(behind[:, None], silence, mel)
            n_frames = n_frames.clamp(min=least)
        if n_total < least:
            mel = torch.cat([mel, silence.expand(len(mel), -1, least - n_total)], 2)
        return mel, n_frames
