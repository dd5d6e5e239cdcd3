"""Times of the steps that `AudioTagger.embed` returns beside the clip's embedding."""

import torch
from torch import Tensor

from models.base import AudioTagger
from models.headed import HeadedTagger
from models.vit import SpectrogramTransformer

_LONG_SECONDS = 60


def find_step_seconds(model: AudioTagger) -> float:
    """Return the time from one step to the next, on average over a minute: chunks and ends may have shorter ones."""
    return _LONG_SECONDS / model.n_steps(_LONG_SECONDS * model.sample_rate)


def find_step_centers(model: AudioTagger, n_samples: int) -> Tensor:
    """Return the centres of the steps of a clip.

    Those of a transformer are the centres of its patches, chunk by chunk; steps of other networks divide the clip into
    equal parts.

    Args:
        model: any model.
        n_samples: of the clip, at the model's rate.

    Returns:
        Seconds from the start of the clip (T',), float32.
    """
    network = model.model if isinstance(model, HeadedTagger) else model
    step = torch.arange(model.n_steps(n_samples), dtype=torch.float64)
    if not isinstance(network, SpectrogramTransformer):
        return ((step + 0.5) * (n_samples / network.sample_rate / max(len(step), 1))).float()
    front_end, length = network.front_end, network.target_length
    in_chunk = (length - network.patch_size) // network.patch_stride + 1
    first_frame = step // in_chunk * length + step % in_chunk * network.patch_stride
    middle = first_frame + (network.patch_size - 1) / 2
    first_center = 0 if front_end.center else front_end.n_fft / 2  # sample that the first frame is centred on
    return ((middle * front_end.hop_size + first_center) / network.sample_rate).float()
