"""The interface that every tagger offers to the rest of the project.

A network is `encode`, from spectrograms to what it computes of them, and what is made of that: `classify`, `pool` and
`frames`. Everything else (`forward`, `predict`, `embed`, tags and embeddings in one pass) is written here, once.

Letters: B batch, S samples, F mel bands, T frames, R rows of the network's batch (a clip, or a chunk of a long one),
f and t rows and columns of a patch grid, N tokens, P prefix tokens, D width, C classes, E embedding width; primes mark
what is left after striding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError, some
from models.frontends import FrontEnd
from models.labels import labels_for
from models.waveforms import as_waveform

Activation = Literal["sigmoid", "softmax"]
Outputs = Literal["logits", "probabilities"]


# Chooses the tokens that are computed, for each row its own: rows f and columns t of the patch grid, and the columns
# that take part (R,t) or None for all -> ascending places in the f t patches, frequency-major, (R,N').
Keep = Callable[[int, int, Tensor | None], Tensor]


@dataclass
class Encoded:
    """What a network computes of a batch, before pooling and head; what it does not have is None.

    Attributes:
        n_clips: B.
        tokens: (R,f,t,D) after the final norm, or (R,N',D) where `keep` chose them.
        prefix: (R,P,D) class and distillation tokens.
        maps: (B,D,F',T') of a network of convolutions.
        valid: (R,t), or (R,N') where `keep` chose: which columns or tokens take part in attention and pooling; None
            for all.
        n_steps: (R,) columns that hold any of the clip's own frames, which differs from `valid` in filled-up chunks;
            None where all do.
        clip_of_row: (R,) ascending, None where every clip is one row.
        weights: (R,) what a row counts in the mean over its clip's, None where all count the same.
        grid: f and t, where there are tokens; what patch-out leaves of them.
        kept: (R,N') places in the f t patches that `keep` chose.
        layers: layer -> its output, those that were asked for, see `AudioTagger.encode`.
    """

    n_clips: int
    tokens: Tensor | None = None
    prefix: Tensor | None = None
    maps: Tensor | None = None
    valid: Tensor | None = None
    n_steps: Tensor | None = None
    clip_of_row: Tensor | None = None
    weights: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    kept: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


class AudioTagger(nn.Module):
    """A network that gives each of C classes a probability, and embeds sound on the way.

    A clip's result depends neither on its batch mates nor on padding. An architecture that can mask padding inside
    sets `masks_padding`; the others are run once for every length that occurs in the batch.

    Args:
        front_end: waveform to spectrogram.
        num_classes: C, 0 for a network that only embeds.
        embed_dim: width E of its embeddings.
        outputs: whether `forward` gives "logits" or "probabilities".

    Attributes:
        name: its name in the registry.
        arguments: what it was created with, kept for checkpoints.
        activation: "sigmoid" (any number of classes at once) or "softmax" (exactly one).
    """

    masks_padding: ClassVar[bool] = False
    last_layer: ClassVar[str]  # module of the state dict whose first dimension is C
    shared_settings: ClassVar[tuple[Any, ...]] = ()  # arguments with their defaults, see `models.settings`

    def __init__(
        self,
        front_end: FrontEnd,
        *,
        num_classes: int,
        embed_dim: int,
        outputs: Outputs = "logits",
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise UserError(f"num_classes must be at least 1, or 0 for a network that only embeds, not {num_classes}")
        self.name = type(self).__name__
        self.arguments: dict[str, Any] = {}
        self.front_end = front_end
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.activation: Activation = "sigmoid"
        self.outputs: Outputs = outputs
        self._labels: list[str] | None = None

    @property
    def labels(self) -> list[str]:
        """The names of its classes; where none were given, AudioSet's if there are 527, else their numbers."""
        if self._labels is None:  # worked out on first use: a network alone needs no table of names
            self._labels = labels_for(self.num_classes, None)
        return self._labels

    @labels.setter
    def labels(self, labels: list[str]) -> None:
        self._labels = labels

    @property
    def full_name(self) -> str:
        """What tells it from other taggers made with the same network: `name`, and what was put onto it."""
        return self.name

    @property
    def sample_rate(self) -> int:
        """Hertz of the waveforms it takes."""
        return self.front_end.sample_rate

    @property
    def generator(self) -> torch.Generator | None:
        """Draws what a batch of training shares (patch-out, edges of mel bands); None for torch's default."""
        return self.front_end.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.front_end.generator = generator

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute what pooling and head read.

        Args:
            mel: (B,F,T) as the front-end gives it.
            n_frames: (B,) frames of each clip, None where all of T belong to it; always None where the network does
                not mask padding.
            keep: chooses the tokens to compute, of networks that have tokens; the others cost nothing. Called once for
                all rows. Padding that it chooses counts for nothing, so that at least one of a row's tokens must not be
                padding.
            layers: numbers of layers whose output is wanted too, from 0; -1 is the last one. Of a transformer, blocks
                before the final norm: (R,P+N,D), prefix tokens first, merged tokens in all places that they stand for.
                Of a network of convolutions, its stages: (B,D,F',T').

        Raises:
            UserError: the spectrogram does not fit, there is no such layer, or there are no tokens to choose from.
        """
        raise NotImplementedError

    def classify(self, encoded: Encoded) -> Tensor:
        """Tag: (B,C), what `outputs` says."""
        raise NotImplementedError

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: (B,E)."""
        raise NotImplementedError

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps: (B,T',E), zero behind a clip's `n_steps`. It may wait for the device."""
        raise NotImplementedError

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tag clips.

        Args:
            waveform: (B,S) in [-1, 1] at `sample_rate`.
            lengths: (B,) samples of each clip, None where all of S belong to it.

        Returns:
            (B,C), what `outputs` says.
        """
        return self._of_waveform(lambda encoded: (self.classify(encoded),), waveform, lengths)[0]

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag clips whose spectrograms are at hand: (B,F,T), own frames (B,) or None -> (B,C), as `forward`."""
        return self._of_spectrogram(lambda encoded: (self.classify(encoded),), mel, n_frames)[0]

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute what the head reads: (B,F,T) -> tokens (B,P+N,D), frequency-major, or maps (B,D,F',T').

        Raises:
            UserError: the spectrogram does not fit, or is longer than one chunk.
        """
        encoded = self.encode(mel)
        if encoded.clip_of_row is not None:
            raise UserError(f"{mel.shape[-1]} frames are more than one chunk of {self.name}, whose tokens are wanted")
        if encoded.tokens is None:
            assert encoded.maps is not None
            return encoded.maps
        grid = encoded.tokens.flatten(1, 2)
        return grid if encoded.prefix is None else torch.cat([encoded.prefix, grid], dim=1)

    def embed(self, waveform: Any, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            waveform: (B,S) or (S,) at `sample_rate`, or a list of clips (S,): tensors or arrays of floats with full
                scale 1.0, or of int16. A sound of several channels would be several clips: average them first.
            lengths: (B,) samples of each clip, None where all of S belong to it.

        Returns:
            One vector a clip (B,E), and one vector a time step (B,T',E), zero behind a clip's `n_steps`.

        Raises:
            UserError: no such waveform, see `models.waveforms.as_waveform`.
        """
        return self.embed_waveform(*as_waveform(waveform, lengths, device=self._device))

    def embed_waveform(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips without a look at what is given: float32 (B,S) on the model's device; as `embed`."""
        clip, frames = self._of_waveform(self._pool_and_frames, waveform, lengths)
        return clip, frames

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips whose spectrograms are at hand: (B,F,T), own frames (B,) or None -> (B,E), (B,T',E)."""
        clip, frames = self._of_spectrogram(self._pool_and_frames, mel, n_frames)
        return clip, frames

    def embed_clips(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Embed clips alone: (B,F,T), own frames (B,) or None -> (B,E), as `embed_spectrogram`."""
        return self._of_spectrogram(lambda encoded: (self.pool(encoded),), mel, n_frames)[0]

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tag and embed in one pass: (B,F,T), own frames (B,) or None -> (B,C) as `forward`, clip embeddings (B,E)."""
        output, clip = self._of_spectrogram(self._classify_and_pool, mel, n_frames)
        return output, clip

    def _classify_and_pool(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return self.classify(encoded), self.pool(encoded)

    def _pool_and_frames(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return self.pool(encoded), self.frames(encoded)

    def _of_waveform(
        self, function: Callable[[Encoded], tuple[Tensor, ...]], waveform: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Apply a function to what the network computes of waveforms (B,S); lengths apart where it cannot mask."""
        waveform, lengths = _without_common_padding(waveform, lengths)
        if lengths is not None and not self.masks_padding:
            return run_by_length(lambda clips: self._of_waveform(function, clips, None), waveform, lengths)
        return function(self.encode(*self.front_end.spectrogram(waveform, lengths)))

    def _of_spectrogram(
        self, function: Callable[[Encoded], tuple[Tensor, ...]], mel: Tensor, n_frames: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Apply a function to what the network computes of spectrograms (B,F,T); lengths apart where it cannot mask."""
        if n_frames is not None and not self.masks_padding:
            return run_by_length(lambda clips: function(self.encode(clips)), mel, n_frames)
        return function(self.encode(mel, n_frames))

    def n_steps(self, n_samples: int) -> int:
        """Time steps T' that `embed` gives a clip of `n_samples` samples."""
        raise NotImplementedError

    def probabilities(self, output: Tensor) -> Tensor:
        """Turn what `forward` gave (B,C) into probabilities (B,C); probabilities stay as they are."""
        if self.outputs == "probabilities":
            return output
        return self._activate(output)

    def probabilities_of(self, mel: Tensor) -> Tensor:
        """Probabilities (B,C) of spectrograms (B,F,T) of one length, which a tracer can follow for any B and T.

        What an export holds. An architecture whose `forward_spectrogram` looks at values overrides it.
        """
        return self.probabilities(self.forward_spectrogram(mel))

    def embedding_of(self, mel: Tensor) -> Tensor:
        """Clip embeddings (B,E) of spectrograms (B,F,T) of one length, which a tracer can follow for any B and T.

        What an export of a head holds below it. An architecture whose `pool` looks at values overrides it.
        """
        return self.embed_clips(mel)

    def predict(self, waveform: Any, lengths: Any = None) -> Tensor:
        """Probabilities (B,C) of clips, without gradients.

        Args:
            waveform: (B,S) or (S,) at `sample_rate`, or a list of clips (S,): tensors or arrays of floats with full
                scale 1.0, or of int16. A sound of several channels would be several clips: average them first.
            lengths: (B,) samples of each clip, None where all of S belong to it.

        Raises:
            UserError: no such waveform, see `models.waveforms.as_waveform`, or the weights give NaN.
        """
        return self.predict_waveform(*as_waveform(waveform, lengths, device=self._device))

    @torch.no_grad()
    def predict_waveform(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Probabilities of clips without a look at what is given: float32 (B,S) on the model's device -> (B,C).

        Raises:
            UserError: a clip holds NaN or infinite samples, or the weights give NaN.
        """
        output = self(waveform, lengths)
        if not bool(output.isfinite().all()):
            rows = (~waveform.isfinite().all(1)).nonzero().flatten().tolist()
            if rows:
                raise UserError(f"clips {some(map(str, rows))} of the batch hold NaN or infinite samples")
            raise UserError(f"the model {self.name} gives NaN: its weights are damaged or its training diverged")
        return self.probabilities(output)

    def merge_tokens(self, setting: Any) -> None:
        """Merge tokens from now on, as `models.token_merging.merging_schedule` says.

        Raises:
            UserError: it is no such setting, or this network has no tokens.
        """
        raise UserError(f"{self.name} has no tokens to merge: leave token_merging out, or give a vision transformer")

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of a relative (another input length, say) to this network; logs what it changes."""
        return dict(state)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone, beside biases and norms."""
        return set()

    @property
    def _device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.parameters()), None)

    def _activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.activation == "softmax" else logits.sigmoid()


def _without_common_padding(waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut what is padding in every clip; lengths become None where none is left."""
    if waveform.ndim != 2 or not waveform.is_floating_point():
        raise UserError(
            f"the waveform is {waveform.dtype} of shape {tuple(waveform.shape)}; wanted waveforms (B,S), "
            "floats with full scale 1.0: `predict` and `embed` take other forms of sound"
        )
    if lengths is None or lengths.numel() == 0:
        return waveform, None
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > waveform.shape[1] or lengths.shape != waveform.shape[:1]:
        raise UserError(f"lengths {lengths.tolist()} must be one number a clip, 1 to {waveform.shape[1]} samples")
    return waveform[:, :longest], None if shortest == longest else lengths


def run_by_length(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Run clips of equal length together, for networks that cannot mask padding.

    Args:
        function: takes a batch without padding, returns tensors whose first axis is the batch.
        x: (B,...,T), padded along its last axis.
        lengths: (B,) what of T belongs to each clip.

    Returns:
        The results in the order of the batch, shorter axes zero-padded.
    """
    pieces: list[tuple[Tensor, ...]] = []
    rows: list[Tensor] = []
    for length in lengths.unique().tolist():
        row = (lengths == length).nonzero().flatten().to(x.device)
        pieces.append(function(x[row][..., :length]))
        rows.append(row)
    back = torch.cat(rows).argsort()
    joined = []
    for results in zip(*pieces, strict=True):
        shape = [max(sizes) for sizes in zip(*(result.shape[1:] for result in results), strict=True)]
        padded = [result.new_zeros(len(result), *shape) for result in results]
        for whole, result in zip(padded, results, strict=True):
            whole[tuple(slice(size) for size in result.shape)] = result
        joined.append(torch.cat(padded)[back])
    return tuple(joined)
