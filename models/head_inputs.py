"""The input of heads: a model's clip embedding, the clip embeddings of several layers, or time steps.

Letters: B batch, F mel bands, T frames, E embedding width, T' time steps, R stored time steps, I input width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from models.base import AudioTagger, Encoded

MAX_STEPS = 64  # time steps of a chunk that are stored; CED has 62 in 10 s


@dataclass(frozen=True)
class HeadInput:
    """What a head takes of a model: one vector (I,) for each chunk of a clip.

    Attributes:
        layers: numbers of layers whose clip embeddings are concatenated; none for the model's clip embedding.
        stride: adjacent time steps that are averaged, see `average_steps`; the averages are concatenated. 0 for clip
            embeddings.
        steps: number R of averages, with a stride; 0 for as many as the longest clip of a batch has.
    """

    layers: tuple[int, ...] = ()
    stride: int = 0
    steps: int = 0

    def read(self, model: AudioTagger, encoded: Encoded) -> Tensor:
        """Return the input of a head (B,I), of what `model.encode(..., layers=self.layers)` gave."""
        if self.stride:
            return average_steps(model.frames(encoded), model.count_steps(encoded), self.stride, self.steps).flatten(1)
        if self.layers:
            pooled = model.pool_layers(encoded)
            return torch.cat([pooled[layer] for layer in self.layers], 1)
        return model.pool(encoded)

    def compute(self, model: AudioTagger, mel: Tensor, n_frames: Tensor | None) -> Tensor:
        """Return the input of a head (B,I) for spectrograms (B,F,T), frames of each (B,) or None.

        Raises:
            UserError: the model has no such layers, or no time steps.
        """
        return model.run_spectrogram(lambda encoded: (self.read(model, encoded),), mel, n_frames, self.layers)[0]


def average_steps(frames: Tensor, n_steps: Tensor | None, stride: int, n_out: int = 0) -> Tensor:
    """Average adjacent time steps; clips with fewer than others have their last average several times.

    Args:
        frames: (B,T',E).
        n_steps: (B,) steps of each clip, None for T'.
        stride: number of steps to average; the last average of a clip may be of fewer.
        n_out: R, 0 for the largest number of averages that a clip has. Of more, the first are returned.

    Returns:
        (B,R,E).
    """
    if n_steps is None and stride == 1 and n_out in (0, frames.shape[1]):
        return frames
    if n_steps is None:
        n_steps = torch.full((frames.shape[0],), frames.shape[1], device=frames.device)
    n_steps = n_steps.to(frames.device).clamp(min=1)[:, None]
    place = torch.arange(n_out or -(-frames.shape[1] // stride), device=frames.device)
    first = torch.minimum(place, (n_steps - 1) // stride) * stride  # (B,R)
    end = torch.minimum(first + stride, n_steps)
    step = torch.arange(frames.shape[1], device=frames.device)
    is_inside = (step >= first[..., None]) & (step < end[..., None])  # (B,R,T')
    return (is_inside / (end - first)[..., None]).to(frames.dtype) @ frames


@torch.no_grad()
def measure_layers(model: AudioTagger) -> list[int]:
    """Return the width of the clip embeddings of each layer of a model, by embedding a second of silence.

    Raises:
        UserError: it has no layers.
    """
    parameter = next(model.parameters())
    silence = torch.zeros(1, model.sample_rate, device=parameter.device)
    was_training = model.training
    model.eval()
    found = model.embed_layers(model.front_end(silence), None, range(model.n_layers))
    model.train(was_training)
    return [embedding.shape[1] for embedding in found]


@torch.no_grad()
def count_model_steps(model: AudioTagger, seconds: float) -> int:
    """Return the number of time steps that a model has in a chunk.

    Raises:
        UserError: it has none.
    """
    try:
        return model.n_steps(round(seconds * model.sample_rate))
    except NotImplementedError:
        raise UserError(f"{model.name} has no time steps, only clip embeddings: choose another head") from None
