"""Heads of other kinds: nearest neighbours, and prototypes of time steps; and how heads of all kinds are made.

Letters: B batch, C classes, N stored clips, P prototypes, E embedding width, R time steps, L layers, k neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from models.head_inputs import HeadInput
from models.headed import Head

TEMPERATURE = 0.07  # of the weights of neighbours, as in the papers
_LEAST = 1e-6  # probability of a class without neighbours


class NeighbourHead(Head):
    """Cosine k-nearest neighbours with soft votes.

    A neighbour of cosine s weighs exp(s / 0.07), and a class has the share of its neighbours in the sum of weights: Wu,
    Xiong, Yu, Lin, "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, as DINO uses
    it. That embeddings are standardised first, and that layers count equally, are this project's own choices.

    Args:
        embed_dim: E, with `layers` the sum of their widths.
        num_classes: C.
        n_examples: N.
        n_neighbours: k.
        **settings: `labels`, `activation`, `layers` and `widths`, see `Head`.

    Attributes:
        examples: (N,E) embeddings of the training clips, standardised and of length one.
        votes: (N,C) their classes, 0 or 1.

    Raises:
        UserError: more neighbours than examples.
    """

    kind = "knn"
    examples: Tensor
    votes: Tensor

    def __init__(
        self, embed_dim: int, num_classes: int, *, n_examples: int, n_neighbours: int, **settings: Any
    ) -> None:
        if not 1 <= n_neighbours <= n_examples:
            raise UserError(
                f"{n_neighbours} neighbours among {n_examples} training clips: expected 1 to {n_examples}; give "
                "--neighbours, or more training clips"
            )
        super().__init__(embed_dim, num_classes, **settings)
        self.n_examples, self.n_neighbours = n_examples, n_neighbours
        self.register_buffer("examples", torch.zeros(n_examples, embed_dim))
        self.register_buffer("votes", torch.zeros(n_examples, num_classes))

    def _add_classifier(self, sizes: Sequence[int]) -> None:
        self.gate = None  # nothing is trained

    @property
    def layer_weights(self) -> dict[int, float]:
        """Weight of each layer, the same for all."""
        return dict.fromkeys(self.read_layers, 1 / max(len(self.read_layers), 1))

    def normalise(self, embedding: Tensor) -> Tensor:
        """Standardise embeddings (B,E) and scale each to length one, and each of their layers to the same length."""
        x = (embedding - self.mean) / self.scale
        parts = x.split(self.widths or self.embed_dim, 1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5

    def store(self, embedding: Tensor, targets: Tensor) -> None:
        """Store the training clips, (N,E) and (N,C) of 0 and 1, once `mean` and `scale` are set."""
        self.examples.copy_(self.normalise(embedding))
        self.votes.copy_(targets)

    def forward(self, embedding: Tensor) -> Tensor:
        """Clip embeddings (B,E) -> logits (B,C), of the probabilities that are the shares of votes."""
        near = (self.normalise(embedding) @ self.examples.T).topk(self.n_neighbours, 1)
        weights = (near.values / TEMPERATURE).softmax(1)  # (B,k)
        shares = (weights[..., None] * self.votes[near.indices]).sum(1)
        shares = shares.clamp(_LEAST, 1 - _LEAST)
        return shares.log() if self.activation == "softmax" else shares.logit()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of its kind as plain values."""
        own = {"n_examples": self.n_examples, "n_neighbours": self.n_neighbours}
        return own | {key: value for key, value in super().arguments().items() if key in ("layers", "widths")}


class PrototypeHead(Head):
    """Binarised prototypes of time steps, and a linear layer on how well each fits anywhere in the clip.

    Rauch et al., "Unmute the patch tokens: Rethinking probing in multi-label audio classification", ICLR 2026 (arXiv
    2509.24901): prototypes, shared by all classes, are binarised by their sign, with a straight-through gradient, and
    compared with each token; the result is pooled over tokens and classified by a linear layer. What abstract and
    summaries leave open is this project's own choice: tokens are time steps (means over frequency), standardised;
    cosines, multiplied by the root of E, which gives those of chance a deviation of one; their maximum over tokens;
    prototypes start from random numbers.

    Args:
        embed_dim: E.
        num_classes: C.
        n_prototypes: P.
        stride: adjacent time steps that are averaged to a token, see `models.head_inputs.average_steps`.
        **settings: `labels` and `activation`, see `Head`.

    Attributes:
        prototypes: (P,E) latent numbers, whose signs are used.
    """

    kind = "prototypes"
    stride: int

    def __init__(self, embed_dim: int, num_classes: int, *, n_prototypes: int, stride: int, **settings: Any) -> None:
        if min(n_prototypes, stride) < 1:
            raise UserError(f"a head of {n_prototypes} prototypes and stride {stride}: expected at least 1 of each")
        self.n_prototypes, self.stride = n_prototypes, stride
        super().__init__(embed_dim, num_classes, **settings)
        self.prototypes = nn.Parameter(torch.randn(n_prototypes, embed_dim) * 0.02)

    def _add_classifier(self, sizes: Sequence[int]) -> None:
        self.layers = nn.Sequential(nn.Linear(self.n_prototypes, sizes[-1]))

    @property
    def input(self) -> HeadInput:
        """What it takes of a model."""
        return HeadInput(stride=self.stride)

    @property
    def width(self) -> int:
        """P."""
        return self.n_prototypes

    def reduce(self, chunks: Tensor) -> Tensor:
        """Compare time steps with prototypes: (B,R E) -> the largest similarity of each in the chunk (B,P)."""
        tokens = (chunks.unflatten(1, (-1, self.embed_dim)) - self.mean) / self.scale  # (B,R,E)
        signs = torch.where(self.prototypes >= 0, 1.0, -1.0).to(tokens.dtype)
        signs = signs + (self.prototypes - self.prototypes.detach())  # straight through
        return (F.normalize(tokens, dim=2) @ signs.T).amax(1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Means over a clip's chunks of what `reduce` returns: (B,P) -> logits (B,C)."""
        return self.layers(embedding)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of its kind as plain values."""
        return {"n_prototypes": self.n_prototypes, "stride": self.stride}


KINDS: dict[str, type[Head]] = {kind.kind: kind for kind in (Head, NeighbourHead, PrototypeHead)}


def create_head(kind: str, embed_dim: int, num_classes: int, **arguments: Any) -> Head:
    """Return a head of a kind, see the classes in `KINDS` for the arguments."""
    return KINDS[kind](embed_dim, num_classes, **arguments)
