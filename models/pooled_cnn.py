"""Base classes of CNNs: backbones, and taggers whose embeddings are means of the last maps.

Letters: B batch, F mel bands, T frames, C classes, D channels, E embedding width; primes mark sizes after striding.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger, Encoded, Keep


def run_stages(x: Tensor, stages: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Apply modules one after the other and yield the output of each."""
    for stage in stages:
        x = stage(x)
        yield x


class Backbone(nn.Module):
    """The layers before pooling: (B,F,T) -> (B,D,F',T').

    Attributes:
        stride: frames and bands per position of the last maps.
        channels: D of the last maps.
        n_stages: number of maps that `stages` yields.
    """

    stride: int
    channels: int
    n_stages: int

    def stages(self, mel: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage: (B,F,T) -> (B,D,F',T') each, the last maps last."""
        raise NotImplementedError

    def forward(self, mel: Tensor) -> Tensor:
        """(B,F,T) -> (B,D,F',T')."""
        return deque(self.stages(mel), maxlen=1).pop()


class PooledCNN(AudioTagger):
    """A CNN whose last maps are averaged over frequency for time steps, and over both axes for clips.

    Clips of any length are computed in one piece. Subclasses implement `stages`, `n_layers` and `tag`.

    Attributes:
        stride: frames per column of the last maps.
    """

    stride: int

    def stages(self, mel: Tensor, n_frames: Tensor | None) -> Iterator[Tensor]:
        """Yield the output of each stage: (B,F,T), frames of each (B,) or None -> (B,D,F',T') each."""
        raise NotImplementedError

    def tag(self, clip: Tensor, encoded: Encoded) -> Tensor:
        """Classify clip embeddings (B,E), or the maps that they were computed from -> (B,C), see `outputs`."""
        raise NotImplementedError

    def encode(
        self, mel: Tensor, n_frames: Tensor | None = None, *, keep: Keep | None = None, layers: Sequence[int] = ()
    ) -> Encoded:
        """Compute the last maps; see `AudioTagger.encode`.

        Raises:
            UserError: an unknown stage, `keep`, or clips of several lengths where the network does not mask padding.
        """
        if keep is not None:
            raise UserError(f"{self.name} has no tokens to choose from: give a vision transformer")
        self.check_lengths(mel, n_frames)
        self.check_layers(layers)
        outputs: list[Tensor] = []
        for x in self.stages(mel, n_frames):
            outputs = [*outputs, x] if layers else [x]  # frees the memory of stages that are not returned
        n_steps = None if n_frames is None else (n_frames - 1) // self.stride + 1
        chosen = {layer: outputs[layer] for layer in layers}
        return Encoded(mel.shape[0], maps=outputs[-1], n_steps=n_steps, layers=chosen, n_frames=n_frames)

    def classify(self, encoded: Encoded) -> Tensor:
        """Return (B,C), logits or probabilities, see `outputs`."""
        return self.tag(self.pool(encoded), encoded)

    def pool(self, encoded: Encoded) -> Tensor:
        """Return clip embeddings, the means of the last maps (B,E)."""
        assert encoded.maps is not None
        return encoded.maps.mean((2, 3))

    def pool_layers(self, encoded: Encoded) -> dict[int, Tensor]:
        """Embed clips by each stage in `encoded.layers`: (B,D) each, see `AudioTagger.pool_layers`."""
        last = self.n_layers - 1
        return {
            layer: self.pool(encoded) if layer % self.n_layers == last else self._pool_stage(encoded, layer)
            for layer in encoded.layers
        }

    def _pool_stage(self, encoded: Encoded, layer: int) -> Tensor:
        """Embed clips by the means of a stage other than the last: (B,D). Networks that mask padding override it."""
        return encoded.layers[layer].mean((2, 3))

    def frames(self, encoded: Encoded) -> Tensor:
        """Return time step embeddings, the means over frequency of the columns of the last maps (B,T',E)."""
        assert encoded.maps is not None
        return encoded.maps.mean(2).transpose(1, 2)

    def n_steps(self, n_samples: int) -> int:
        """Return the number of columns of the last maps for `n_samples` samples."""
        return -(-self.front_end.n_frames(n_samples) // self.stride)

    def _classify_and_pool(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        clip = self.pool(encoded)
        return self.tag(clip, encoded), clip
