"""What a network computes before pooling and head, and which of its tokens it computes.

Letters: B batch, R rows of the network's batch (a clip, or a chunk of a long one), f and t rows and columns of a patch
grid, N tokens, P prefix tokens, D width; primes mark sizes after striding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# Selects the tokens to compute in each row: (f, t, mask of valid columns (R,t) or None for all) -> ascending indices
# into the f t patches, frequency-major, (R,N').
Keep = Callable[[int, int, Tensor | None], Tensor]


@dataclass
class Encoded:
    """Output of a network before pooling and head; fields that an architecture does not have are None.

    Attributes:
        n_clips: B.
        tokens: (R,f,t,D) after the final norm, or (R,N',D) where `keep` selected them.
        prefix: (R,P,D) class and distillation tokens.
        maps: (B,D,F',T') of a CNN.
        valid: (R,t), or (R,N') with `keep`: which columns or tokens take part in attention and pooling; None for all.
        n_steps: (R,) columns of `tokens` or of the last `maps` that contain frames of the clip, which differs from
            `valid` in padded chunks; None where all do. `layers` of a CNN with other strides have other numbers.
        clip_of_row: (R,) ascending, None where every clip is one row.
        weights: (R,) weight of each row in the mean over the rows of a clip, None for equal weights.
        grid: f and t of `tokens`, after patch-out.
        kept: (R,N') indices into the f t patches that `keep` selected.
        layers: layer -> output of the requested layers, see `AudioTagger.encode`.
        n_frames: (B,) frames of each clip, None where all are the clip's own; for the layers of a CNN.
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
    n_frames: Tensor | None = None
