"""The interface of an engine, which computes the probabilities of clips.

Letters: B batch, S samples, C classes.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

MAX_THREADS = 8  # that call an engine at once; with more cores each call uses several


class Engine(Protocol):
    """Computes the probabilities of clips. Safe to call from several threads at once.

    Attributes:
        name: of the model or its file.
        sample_rate: of the clips, in hertz.
        labels: names of the C classes.
        max_samples: length of the longest clip supported, None for any length.
        n_threads: number of threads that should call it at once.
        batch_size: clips per call that use it well.
    """

    name: str
    sample_rate: int
    labels: list[str]
    max_samples: int | None
    n_threads: int
    batch_size: int

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities, float32 (B,C), of clips (S,) of any lengths, see `common.samples.as_clips`."""
        ...


class ContinuedSound(Protocol):
    """A sound whose probabilities are computed while its samples come, see `TorchEngine.open_sound`."""

    def push(self, samples: np.ndarray) -> None:
        """Add samples (S,) at the engine's sample rate."""
        ...

    def predict(self) -> np.ndarray:
        """Return the probabilities, float32 (C,), of all samples so far."""
        ...
