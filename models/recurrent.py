"""Recurrent networks for streams: LSTM and GRU on log mel filter-bank energies, one step after the other.

Nothing looks ahead: a frame of Kaldi's front-end consists of the samples from its own start on, its logarithms have a
fixed floor and are normalised band by band with running statistics, and the layers are unidirectional. `step` therefore
continues a sound where it was left, with a state of fixed size.

Methods: Hochreiter, Schmidhuber, "Long short-term memory", Neural Computation 1997; Cho et al., "Learning phrase
representations using RNN encoder-decoder", EMNLP 2014 (GRU); Sak, Senior, Rao, Beaufays, "Fast and accurate recurrent
neural network acoustic models for speech recognition", Interspeech 2015, for steps of several frames; Wang, Li, Metze,
"A comparison of five multiple instance learning pooling functions for sound event detection with weak labeling", ICASSP
2019, for linear softmax pooling. Sizes, steps and normalisation are this project's own choice.

Letters: B batch, F mel bands, T frames, k frames of a step, T' steps, C classes, D units.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, some
from models.base import AudioTagger, Encoded, Keep
from models.kaldi_mel import KaldiMel
from models.registry import register_model
from models.resnet import normalise
from models.settings import Blocks, Bounds, Rate, Width, take_settings

Cell = Literal["lstm", "gru"]
Pooling = Literal["last", "mean", "linear_softmax"]

_CELLS: dict[Cell, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class RecurrentState:
    """What `RecurrentTagger.step` needs of the sound so far; its size does not depend on the length of the sound.

    Attributes:
        frames: (B,F,<k) normalised frames since the last step.
        hidden: of each layer, h (1,B,D) or (h, c); None before the first step.
        pooled: float64, see `RecurrentTagger.pooling`; None before the first step.
        probabilities: (B,n,C) of the n steps that the last call computed.
    """

    frames: Tensor
    hidden: tuple[Any, ...]
    pooled: Tensor | None
    probabilities: Tensor


class RecurrentTagger(AudioTagger):
    """LSTM or GRU; gives logits.

    Args:
        cell: "lstm" or "gru".
        num_classes: C.
        hidden_size: D of every layer.
        num_layers: number of layers.
        frame_stride: k. A step takes the last k frames, so that steps are k times as rare; the first one takes the
            first frame alone, and up to k - 1 frames at the end of a clip are in no step.
        pooling: what a clip's output is computed from: the "last" step; the "mean" of the states of all steps; or
            "linear_softmax", the mean of the probabilities of all steps, each weighted by itself.
        dropout: before the last layer and between recurrent layers.
        **settings: those of `MelSettings` (`models.settings`), by default `shared_settings`.

    Raises:
        UserError: a pooling that does not exist.
    """

    masks_padding = True
    last_layer = "classifier"
    shared_settings = (replace(KaldiMel.defaults, n_mels=64),)

    def __init__(
        self,
        cell: Cell,
        /,
        *,
        num_classes: int = 527,
        hidden_size: Width = 128,
        num_layers: Blocks = 2,
        frame_stride: Annotated[int, Bounds(ge=1, le=64)] = 2,
        pooling: Pooling = "mean",
        dropout: Rate = 0.0,
        **settings: Any,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise UserError(f"pooling must be one of {some(get_args(Pooling))}, not {pooling!r}")
        (mel,) = take_settings(self.shared_settings, settings)
        super().__init__(KaldiMel(**asdict(mel)), num_classes=num_classes, embed_dim=hidden_size)
        self.frame_stride, self.pooling = frame_stride, pooling
        # without scale and offset, which the weights of the first layer include
        self.bands = nn.BatchNorm2d(mel.n_mels, momentum=0.01, affine=False)
        widths = [mel.n_mels * frame_stride, *[hidden_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(_CELLS[cell](width, hidden_size, batch_first=True) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_classes)
        nn.init.zeros_(self.classifier.bias)  # until `init_from_data` sets it to what is known of the classes

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute the states of all steps, maps (B,D,1,T'); see `AudioTagger.encode`.

        Steps of padding come after those of the clip, which they cannot change.

        Raises:
            UserError: an unknown layer, or `keep`.
        """
        if keep is not None:
            raise UserError(f"{self.name} has no tokens to choose from: give a vision transformer")
        self.check_layers(layers)
        steps, _ = self._stack(self._normalise(mel, n_frames), self._first_frames(mel))
        outputs, _ = self._run(steps, (None,) * len(self.layers))
        maps = [output.mT.unsqueeze(2) for output in outputs]
        n_steps = None if n_frames is None else (n_frames - 1) // self.frame_stride + 1
        return Encoded(mel.shape[0], maps=maps[-1], n_steps=n_steps, layers={layer: maps[layer] for layer in layers})

    def classify(self, encoded: Encoded) -> Tensor:
        """Return logits (B,C)."""
        return self._finish(self._pool_steps(self._states(encoded), encoded.n_steps))

    def pool(self, encoded: Encoded) -> Tensor:
        """Return clip embeddings (B,D): the state of the last step, or the mean over steps, see `pooling`."""
        states = self._states(encoded)
        if self.pooling == "last":
            return _take_last(states, encoded.n_steps)
        return _sum_steps(states, encoded.n_steps) / _count_steps(states, encoded.n_steps)

    @property
    def n_layers(self) -> int:
        """Number of recurrent layers."""
        return len(self.layers)

    def pool_layers(self, encoded: Encoded) -> dict[int, Tensor]:
        """Embed clips by each layer in `encoded.layers`: (B,D) each, pooled as `pool` does."""
        return {layer: self.pool(replace(encoded, maps=maps)) for layer, maps in encoded.layers.items()}

    def frames(self, encoded: Encoded) -> Tensor:
        """Return the states of the steps (B,T',D), zero after a clip's `n_steps`."""
        states = self._states(encoded)
        return states if encoded.n_steps is None else states * _valid(states, encoded.n_steps)[..., None]

    def step_probabilities(self, encoded: Encoded) -> Tensor:
        """Return the probabilities of each step (B,T',C); those after a clip's `n_steps` are undefined."""
        return self._activate(self.classifier(self.dropout(self._states(encoded))))

    def n_steps(self, n_samples: int) -> int:
        """Return the number of steps for `n_samples` samples."""
        return -(-self.front_end.n_frames(n_samples) // self.frame_stride)

    def initial_state(self, batch_size: int = 1) -> RecurrentState:
        """Return the state before the first frame of B sounds."""
        example = self.classifier.weight.new_zeros(batch_size, self.front_end.n_mels, 0)
        probabilities = example.new_zeros(batch_size, 0, self.num_classes)
        return RecurrentState(self._first_frames(example), (None,) * len(self.layers), None, probabilities)

    def step(self, frames: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Continue B sounds by their next frames; in evaluation mode.

        Args:
            frames: (B,F,t) from the front-end, any number of frames.
            state: after the frames before, or `initial_state`; it is not changed.

        Returns:
            What `forward_spectrogram` gives for all frames since the start (B,C), and the state after them, with the
            probabilities of the new steps.

        Raises:
            UserError: another number of sounds or bands, or no frame so far.
        """
        if frames.ndim != 3 or frames.shape[:2] != state.frames.shape[:2]:
            raise UserError(
                f"frames have shape {tuple(frames.shape)}; expected {tuple(state.frames.shape[:2])} and any number of "
                "frames"
            )
        steps, remaining = self._stack(self._normalise(frames, None), state.frames)
        hidden, pooled = state.hidden, state.pooled
        states = steps.new_zeros(len(steps), 0, self.embed_dim)
        if steps.shape[1]:
            outputs, hidden = self._run(steps, hidden)
            states = outputs[-1].float()
            pooled = self._join(pooled, self._pool_steps(states, None).double())
        if pooled is None:
            raise UserError("there is no frame so far: give at least one")
        probabilities = self._activate(self.classifier(states))
        return self._finish(pooled), RecurrentState(remaining, hidden, pooled, probabilities)

    def _normalise(self, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Normalise each band of (B,F,T)."""
        return normalise(self.bands, mel.unsqueeze(2), n_frames).squeeze(2)

    def _first_frames(self, mel: Tensor) -> Tensor:
        """Return what precedes the first frame in its step, (B,F,k-1)."""
        return mel.new_zeros(mel.shape[0], mel.shape[1], self.frame_stride - 1)

    def _stack(self, mel: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Stack the k frames of each step: (B,F,T), (B,F,<k) before them -> (B,T',F k), remaining frames (B,F,<k)."""
        if self.frame_stride == 1:
            return mel.mT, previous
        mel = torch.cat([previous.to(mel.dtype), mel], 2)
        n_steps = mel.shape[2] // self.frame_stride
        n_used = n_steps * self.frame_stride
        steps = mel.narrow(2, 0, n_used).unflatten(2, (n_steps, self.frame_stride))
        return steps.permute(0, 2, 1, 3).flatten(2), mel[:, :, n_used:]

    def _run(self, x: Tensor, hidden: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Run all layers: (B,T',F k), states before -> (B,T',D) of each layer, states after."""
        outputs: list[Tensor] = []
        after = []
        for layer, before in zip(self.layers, hidden, strict=True):
            x = self.dropout(x) if outputs else x
            x, last = layer(x, before)
            outputs.append(x)
            after.append(last)
        return outputs, tuple(after)

    def _states(self, encoded: Encoded) -> Tensor:
        """Return the states of the last layer, float32 (B,T',D)."""
        assert encoded.maps is not None
        return encoded.maps.squeeze(2).mT.float()

    def _pool_steps(self, states: Tensor, n_steps: Tensor | None) -> Tensor:
        """Reduce steps to what `_join` and `_finish` need: (B,T',D), steps of each clip (B,) or None -> (B,..)."""
        if self.pooling == "last":
            return _take_last(states, n_steps)
        if self.pooling == "mean":
            count = _count_steps(states, n_steps)
            return torch.cat([_sum_steps(states, n_steps), count.expand(states.shape[0], 1)], 1)
        logits = self.classifier(self.dropout(states)).float()
        if self.activation == "softmax":
            log_p = logits.log_softmax(2)
            terms = torch.stack([2 * log_p, log_p], 1)
        else:  # log p is -softplus(-logit) and log(1 - p) is -softplus(logit)
            log_p = -F.softplus(-logits)
            terms = torch.stack([2 * log_p, log_p - F.softplus(logits)], 1)  # (B,2,T',C)
        if n_steps is not None:
            terms = terms.masked_fill(~_valid(states, n_steps)[:, None, :, None], -torch.inf)
        return terms.logsumexp(2)

    def _join(self, before: Tensor | None, new: Tensor) -> Tensor:
        """Combine what `_pool_steps` gives for a sound so far with what it gives for its next steps."""
        if before is None or self.pooling == "last":
            return new
        return before + new if self.pooling == "mean" else torch.logaddexp(before, new)

    def _finish(self, pooled: Tensor) -> Tensor:
        """Convert what `_pool_steps` gives to logits (B,C).

        Linear softmax: y = sum p^2 / sum p, hence ln(y / (1 - y)) = ln sum p^2 - ln sum p (1 - p). With the activation
        softmax, logits are ln y, which softmax divides by their sum over classes.
        """
        if self.pooling == "linear_softmax":
            return (pooled[:, 0] - pooled[:, 1]).float()
        clip = pooled[:, :-1] / pooled[:, -1:] if self.pooling == "mean" else pooled
        return self.classifier(self.dropout(clip.float()))


class RecurrentSound:
    """A sound whose output is computed while its samples come; neither samples nor steps are kept.

    Args:
        model: in evaluation mode, without a front-end that centres frames.
    """

    def __init__(self, model: RecurrentTagger) -> None:
        self.model, self.state = model, model.initial_state()
        self._samples = self.model.classifier.weight.new_zeros(0)  # from the start of the next frame on
        self._n_frames = 0

    @torch.inference_mode()
    def push(self, samples: Tensor) -> None:
        """Add samples (S,) at the model's sample rate; those of a second are computed at once."""
        self._samples = torch.cat([self._samples, samples.to(self._samples)])
        if len(self._samples) >= self.model.sample_rate:
            self._step()

    @torch.inference_mode()
    def predict(self) -> Tensor:
        """Return the probabilities (C,) of all samples so far, as `AudioTagger.predict` does.

        Raises:
            UserError: there are no samples so far, or the output is NaN.
        """
        self._step()
        if self._n_frames:
            frames = self._samples.new_zeros(1, self.model.front_end.n_mels, 0)
        else:  # shorter than a frame, which the front-end pads
            frames = self.model.front_end(self._samples[None])
        output, _ = self.model.step(frames, self.state)
        if not bool(output.isfinite().all()):
            raise UserError(f"the output of {self.model.name} is NaN: its weights are damaged or its training diverged")
        return self.model.probabilities(output)[0]

    def _step(self) -> None:
        """Compute the frames that are complete."""
        front_end = self.model.front_end
        if len(self._samples) >= front_end.min_samples:
            frames = front_end(self._samples[None])
            _, self.state = self.model.step(frames, self.state)
            self._n_frames += frames.shape[2]
            self._samples = self._samples[frames.shape[2] * front_end.hop_size :].clone()  # a view would keep all


def _valid(states: Tensor, n_steps: Tensor) -> Tensor:
    """Return which steps of (B,T',D) belong to their clip, bool (B,T')."""
    return torch.arange(states.shape[1], device=states.device) < n_steps[:, None].to(states.device)


def _take_last(states: Tensor, n_steps: Tensor | None) -> Tensor:
    """Return the last state of each clip: (B,T',D), (B,) or None -> (B,D)."""
    if n_steps is None:
        return states[:, -1]
    return states[torch.arange(states.shape[0], device=states.device), n_steps.to(states.device) - 1]


def _sum_steps(states: Tensor, n_steps: Tensor | None) -> Tensor:
    """Return the sum of the states of each clip: (B,T',D), (B,) or None -> (B,D)."""
    return states.sum(1) if n_steps is None else (states * _valid(states, n_steps)[..., None]).sum(1)


def _count_steps(states: Tensor, n_steps: Tensor | None) -> Tensor:
    """Return the number of steps of each clip, as a tensor that divides the sum, (1,1) or (B,1)."""
    if n_steps is None:
        return states.new_ones(1, states.shape[1]).sum(1, keepdim=True)
    return n_steps[:, None].to(states)


SIZES: dict[str, tuple[Cell, int]] = {
    "lstm_small": ("lstm", 128),
    "lstm_medium": ("lstm", 512),
    "gru_small": ("gru", 128),
}
for _name, (_cell, _size) in SIZES.items():
    register_model(_name)(partial(RecurrentTagger, _cell, hidden_size=_size))
