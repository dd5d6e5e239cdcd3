"""What all networks of convolutions have in common: stages, and maps whose means are embeddings.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark what is left after
striding.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger, Encoded, Keep


def run_through(x: Tensor, stages: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the output of each of several modules in a row, the last one of which is that of all."""
    for stage in stages:
        x = stage(x)
        yield x


class Backbone(nn.Module):
    """A network below the pooling: (B,F,T) -> (B,D,F',T').

    Attributes:
        stride: frames and bands to a position of the last maps.
        channels: D of these.
    """

    stride: int
    channels: int

    def stages(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage: (B,F,T) -> (B,D,F',T') each, the last maps last."""
        raise NotImplementedError

    def forward(self, mel: Tensor) -> Tensor:
        """(B,F,T) -> (B,D,F',T')."""
        return deque(self.stages(mel), maxlen=1).pop()


class PooledCNN(AudioTagger):
    """A network of convolutions; its last maps are averaged over frequency for a time step, over both axes for a clip.

    It takes clips of any length in one piece. A subclass brings `stages` and `tag`, and what it does otherwise.

    Attributes:
        stride: frames to a column of the last maps.
    """

    stride: int

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of each stage: (B,F,T), own frames (B,) or None -> (B,D,F',T') each, the last maps last."""
        raise NotImplementedError

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Tag clips from their embeddings (B,E) and what these were computed from -> (B,C), what `outputs` says."""
        raise NotImplementedError

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute the maps below the pooling; see `AudioTagger.encode`.

        Raises:
            UserError: there is no such stage, or `keep` is given.
        """
        if keep is not None:
            raise UserError(f"{self.name} has no tokens to choose from: give a vision transformer")
        outputs: list[Tensor] = []
        for x in self.stages(mel, n_frames):
            outputs = [*outputs, x] if layers else [x]  # what is not wanted is freed
        number = len(outputs)
        if missing := [layer for layer in layers if not -number <= layer < number]:
            raise UserError(
                f"{self.name} has no layer {missing[0]}: it has {number}, 0 to {number - 1}; -1 is the last"
            )
        n_steps = None if n_frames is None else (n_frames - 1) // self.stride + 1
        found = {layer: outputs[layer] for layer in layers}
        return Encoded(mel.shape[0], maps=outputs[-1], n_steps=n_steps, layers=found)

    def classify(self, encoded: Encoded) -> Tensor:
        """Tag: (B,C), what `outputs` says."""
        return self.tag(self.pool(encoded), encoded)

    def pool(self, encoded: Encoded) -> Tensor:
        """Embed clips: the mean of the last maps (B,E)."""
        assert encoded.maps is not None
        return encoded.maps.mean((2, 3))

    def frames(self, encoded: Encoded) -> Tensor:
        """Embed time steps: the mean over frequency for every column of the last maps (B,T',E)."""
        assert encoded.maps is not None
        return encoded.maps.mean(2).transpose(1, 2)

    def n_steps(self, n_samples: int) -> int:
        """Columns of the last maps, of which the last may hold fewer frames than `stride`."""
        return -(-self.front_end.n_frames(n_samples) // self.stride)

    def _classify_and_pool(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        clip = self.pool(encoded)
        return self.tag(clip, encoded), clip
