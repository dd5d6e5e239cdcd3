"""The interface of every tagger.

A network implements `encode`, from spectrograms to tokens or maps, and `classify`, `pool` and `frames` on the result.
`forward`, `predict`, `embed`, and tags and embeddings in one pass are implemented here on top of these.

Letters: B batch, S samples, F mel bands, T frames, R rows of the network's batch (a clip, or a chunk of a long one), N
tokens, P prefix tokens, D width, C classes, E embedding width; primes mark sizes after striding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError, some
from models.encoded import Encoded, Keep
from models.frontends import FrontEnd
from models.labels import labels_for
from models.waveforms import as_waveform, run_by_length, trim_common_padding

Activation = Literal["sigmoid", "softmax"]
Outputs = Literal["logits", "probabilities"]


class AudioTagger(nn.Module):
    """Base class of all networks: probabilities of C classes, and embeddings.

    The output for a clip depends neither on the other clips of its batch nor on padding. An architecture that masks
    padding sets `masks_padding`; the others are run once for every length in the batch.

    Args:
        front_end: waveform to spectrogram.
        num_classes: C, 0 for a network that only embeds.
        embed_dim: width E of the embeddings.
        outputs: whether `forward` returns "logits" or "probabilities".

    Attributes:
        name: in the registry.
        arguments: that it was created with, for checkpoints.
        activation: "sigmoid" (any number of classes at once) or "softmax" (exactly one).
    """

    masks_padding: ClassVar[bool] = False
    last_layer: ClassVar[str]  # name of the module whose weight has C rows
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
        """Names of the classes; by default AudioSet's if there are 527, else their numbers."""
        if self._labels is None:  # on first use, so that a network without labels does not read the table
            self._labels = labels_for(self.num_classes, None)
        return self._labels

    @labels.setter
    def labels(self, labels: list[str]) -> None:
        self._labels = labels

    @property
    def full_name(self) -> str:
        """`name`, and that of its head where there is one."""
        return self.name

    @property
    def sample_rate(self) -> int:
        """Of the input waveforms, in hertz."""
        return self.front_end.sample_rate

    @property
    def generator(self) -> torch.Generator | None:
        """Random generator of draws that a training batch shares (patch-out, mel band edges); None: torch's default."""
        return self.front_end.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.front_end.generator = generator

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute the input of pooling and head.

        Args:
            mel: (B,F,T) from the front-end.
            n_frames: (B,) frames of each clip, None for T. Networks that do not mask padding take clips of one length.
            keep: selects the tokens to compute (transformers only); the others are not computed. Called once for all
                rows. Selected padding is masked, so at least one token of each row must not be padding.
            layers: numbers of layers whose outputs are returned as well, from 0; -1 is the last one. Transformer:
                blocks before the final norm, (R,P+N,D), prefix tokens first, merged tokens copied to every position
                that they represent. CNN: stages, (B,D,F',T').

        Raises:
            UserError: a wrong shape, an unknown layer, `keep` without tokens, or clips of several lengths in a network
                that does not mask padding.
        """
        raise NotImplementedError

    def classify(self, encoded: Encoded) -> Tensor:
        """Return (B,C), logits or probabilities, see `outputs`."""
        raise NotImplementedError

    def pool(self, encoded: Encoded) -> Tensor:
        """Return clip embeddings (B,E)."""
        raise NotImplementedError

    def frames(self, encoded: Encoded) -> Tensor:
        """Return embeddings of time steps (B,T',E), zero after a clip's `n_steps`. May synchronise with the device."""
        raise NotImplementedError

    @property
    def n_layers(self) -> int:
        """Number of layers that `encode` can return: blocks of a transformer, stages of a CNN.

        Raises:
            UserError: the network has no layers that can be returned.
        """
        raise UserError(f"{self.name} has no layers whose outputs could be returned: use its clip embeddings")

    def pool_layers(self, encoded: Encoded) -> dict[int, Tensor]:
        """Return the clip embeddings of each layer in `encoded.layers`, under the same numbers, (B,E_l) each.

        Those of the last layer are `pool(encoded)`, after the final norm. Transformer: the output of an inner block,
        without that norm, pooled as `pool` does. CNN: means of a stage over frequency and the clip's own time.

        Raises:
            UserError: the network has no layers that can be returned.
        """
        raise UserError(f"{self.name} has no layers that could be pooled: use its clip embeddings")

    def count_steps(self, encoded: Encoded) -> Tensor | None:
        """Return the number of time steps in `frames` that belong to each clip, (B,); None where all do."""
        n_steps, clip = encoded.n_steps, encoded.clip_of_row
        if n_steps is None or clip is None:
            return n_steps
        return n_steps.new_zeros(encoded.n_clips).index_add_(0, clip, n_steps)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Check that `layers` are numbers of layers.

        Raises:
            UserError: an unknown layer.
        """
        n_layers = self.n_layers if layers else 0
        if unknown := [layer for layer in layers if not -n_layers <= layer < n_layers]:
            raise UserError(
                f"{self.name} has no layer {unknown[0]}: it has {n_layers}, 0 to {n_layers - 1}; -1 is the last"
            )

    def check_lengths(self, mel: Tensor, n_frames: Tensor | None) -> None:
        """Check that no clip of (B,F,T) is padded where the network does not mask padding.

        `classify`, `pool` and the layers of such a network would include the padding. Methods that return only these
        (`forward_spectrogram`, `embed_spectrogram`, ...) run each length alone instead.

        Raises:
            UserError: there are clips of several lengths.
        """
        if self.masks_padding or n_frames is None or bool((n_frames == mel.shape[2]).all()):
            return
        raise UserError(
            f"{self.name} does not mask padding, so it cannot encode clips of several lengths ({int(n_frames.min())} "
            f"to {mel.shape[2]} frames) in one batch: give clips of one length (`fill_chunks: true` in a training "
            "configuration), or a network that masks padding, such as CED or ResNet-10"
        )

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tag clips.

        Args:
            waveform: (B,S) in [-1, 1] at `sample_rate`.
            lengths: (B,) samples of each clip, None for S.

        Returns:
            (B,C), logits or probabilities, see `outputs`.
        """
        return self.run_waveform(lambda encoded: (self.classify(encoded),), waveform, lengths)[0]

    def forward_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Tag spectrograms: (B,F,T), frames of each clip (B,) or None -> (B,C), as `forward`."""
        return self.run_spectrogram(lambda encoded: (self.classify(encoded),), mel, n_frames)[0]

    def forward_features(self, mel: Tensor) -> Tensor:
        """Compute the input of pooling: (B,F,T) -> tokens (B,P+N,D), frequency-major, or maps (B,D,F',T').

        Raises:
            UserError: a wrong shape, or more frames than one chunk.
        """
        encoded = self.encode(mel)
        if encoded.clip_of_row is not None:
            raise UserError(
                f"{mel.shape[-1]} frames are more than one chunk of {self.name}: forward_features takes a single chunk"
            )
        if encoded.tokens is None:
            assert encoded.maps is not None
            return encoded.maps
        grid = encoded.tokens.flatten(1, 2)
        return grid if encoded.prefix is None else torch.cat([encoded.prefix, grid], dim=1)

    def embed(self, waveform: Any, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            waveform: (B,S) or (S,) at `sample_rate`, or a list of clips (S,): tensors or arrays of floats with full
                scale 1.0, or of int16. Average the channels of a multi-channel sound first: they would be clips.
            lengths: (B,) samples of each clip, None for S.

        Returns:
            One vector per clip (B,E), and one per time step (B,T',E), zero after a clip's `n_steps`.

        Raises:
            UserError: an invalid waveform, see `models.waveforms.as_waveform`.
        """
        return self.embed_waveform(*as_waveform(waveform, lengths, device=self._device))

    def embed_waveform(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed clips as `embed`, without checks: float32 (B,S) on the model's device."""
        clip, frames = self.run_waveform(self._pool_and_frames, waveform, lengths)
        return clip, frames

    def embed_spectrogram(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed spectrograms: (B,F,T), frames of each clip (B,) or None -> (B,E), (B,T',E)."""
        clip, frames = self.run_spectrogram(self._pool_and_frames, mel, n_frames)
        return clip, frames

    def embed_clips(self, mel: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """Return only the clip embeddings of `embed_spectrogram`: (B,F,T), frames (B,) or None -> (B,E)."""
        return self.run_spectrogram(lambda encoded: (self.pool(encoded),), mel, n_frames)[0]

    def embed_layers(self, mel: Tensor, n_frames: Tensor | None = None, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Return the clip embeddings of layers: (B,F,T), frames (B,) or None -> (B,E_l) each, see `pool_layers`.

        Raises:
            UserError: an unknown layer.
        """
        return list(self.run_spectrogram(lambda encoded: self._pool_in_order(encoded, layers), mel, n_frames, layers))

    def embed_layers_export(self, mel: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the clip embeddings of layers (B,E_l) of spectrograms (B,F,T) of one length, see `embed_export`."""
        return self.embed_layers(mel, None, layers)

    def tag_and_embed(self, mel: Tensor, n_frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tag and embed in one pass: (B,F,T), frames (B,) or None -> (B,C) as `forward`, clip embeddings (B,E)."""
        output, clip = self.run_spectrogram(self._classify_and_pool, mel, n_frames)
        return output, clip

    def _classify_and_pool(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return self.classify(encoded), self.pool(encoded)

    def _pool_in_order(self, encoded: Encoded, layers: Sequence[int]) -> tuple[Tensor, ...]:
        pooled = self.pool_layers(encoded)
        return tuple(pooled[layer] for layer in layers)

    def _pool_and_frames(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return self.pool(encoded), self.frames(encoded)

    def run_waveform(
        self,
        function: Callable[[Encoded], tuple[Tensor, ...]],
        waveform: Tensor,
        lengths: Tensor | None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """Encode waveforms (B,S) and apply a function; each length alone where the network does not mask padding."""
        waveform, lengths = trim_common_padding(waveform, lengths)
        if lengths is not None and not self.masks_padding:
            return run_by_length(lambda clips: self.run_waveform(function, clips, None, layers), waveform, lengths)
        return function(self.encode(*self.front_end.spectrogram(waveform, lengths), layers=layers))

    def run_spectrogram(
        self,
        function: Callable[[Encoded], tuple[Tensor, ...]],
        mel: Tensor,
        n_frames: Tensor | None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """Encode spectrograms (B,F,T) and apply a function; each length alone where padding is not masked."""
        if n_frames is not None and not self.masks_padding:
            return run_by_length(lambda clips: function(self.encode(clips, layers=layers)), mel, n_frames)
        return function(self.encode(mel, n_frames, layers=layers))

    def n_steps(self, n_samples: int) -> int:
        """Return the number of time steps T' that `embed` returns for a clip of `n_samples` samples."""
        raise NotImplementedError

    def probabilities(self, output: Tensor) -> Tensor:
        """Convert the output of `forward` (B,C) to probabilities (B,C); probabilities are returned as they are."""
        if self.outputs == "probabilities":
            return output
        return self._activate(output)

    def forward_export(self, mel: Tensor) -> Tensor:
        """Return probabilities (B,C) of spectrograms (B,F,T) of one length; traceable for any B and T.

        Exports trace this method. An architecture whose `forward_spectrogram` depends on tensor values overrides it.
        """
        return self.probabilities(self.forward_spectrogram(mel))

    def embed_export(self, mel: Tensor) -> Tensor:
        """Return clip embeddings (B,E) of spectrograms (B,F,T) of one length; traceable for any B and T.

        Exports of a model with a head trace this method. An architecture whose `pool` depends on tensor values
        overrides it.
        """
        return self.embed_clips(mel)

    def predict(self, waveform: Any, lengths: Any = None) -> Tensor:
        """Return probabilities (B,C) of clips, without gradients.

        Args:
            waveform: as in `embed`.
            lengths: (B,) samples of each clip, None for S.

        Raises:
            UserError: an invalid waveform, see `models.waveforms.as_waveform`, or the output is NaN.
        """
        return self.predict_waveform(*as_waveform(waveform, lengths, device=self._device))

    @torch.no_grad()
    def predict_waveform(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return probabilities as `predict`, without checks of the input: float32 (B,S) on the model's device -> (B,C).

        Raises:
            UserError: a clip contains NaN or infinite samples, or the output is NaN.
        """
        output = self(waveform, lengths)
        if not bool(output.isfinite().all()):
            rows = (~waveform.isfinite().all(1)).nonzero().flatten().tolist()
            if rows:
                raise UserError(f"clips {some(map(str, rows))} of the batch contain NaN or infinite samples")
            raise UserError(f"the output of {self.name} is NaN: its weights are damaged or its training diverged")
        return self.probabilities(output)

    def merge_tokens(self, setting: Any) -> None:
        """Set the token merging, see `models.token_merging.merging_schedule`.

        Raises:
            UserError: an invalid setting, or a network without tokens.
        """
        raise UserError(f"{self.name} has no tokens to merge: leave token_merging out, or give a vision transformer")

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fit the weights of a related network (of another input length, for example) to this one and log it."""
        return dict(state)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and norms."""
        return set()

    @property
    def _device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.parameters()), None)

    def _activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.activation == "softmax" else logits.sigmoid()
