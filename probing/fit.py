"""Fitting a head to frozen embeddings, and its predictions.

The embeddings are in memory, so that a fit takes seconds. The same arguments give the same head, bit for bit on a CPU.

Letters: N clips, M chunks of clips, E embedding width, I input width of a head, C classes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.headed import Head
from models.other_heads import NeighbourHead, PrototypeHead, create_head

BLOCK = 2**25  # numbers of an evaluation that are in memory at once
MAX_STATISTICS = 2**26  # numbers that mean and deviation are computed from
MIN_DEVIATION = 1e-6  # dimensions of a smaller deviation, relative to the largest one, are not scaled


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        hidden_sizes: widths of hidden layers; none for a linear head.
        epochs: at most.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        dropout: after each hidden layer.
        batch_size: clips a step.
        patience: epochs without a lower validation loss after which the fit ends.
        seed: of initial weights, order of clips and dropout.
        kind: of the head, a key of `models.other_heads.KINDS`.
        neighbours: of a head of kind "knn".
        prototypes: for each class, of a head of kind "prototypes".
        layers: of the model that the embeddings are of; none for the model's clip embedding.
        widths: of the clip embeddings of `layers`.
        steps: time steps that the embeddings consist of, each the average of `stride` of the model's; 0 for clip
            embeddings.
        stride: see `models.head_inputs.average_steps`.
    """

    hidden_sizes: tuple[int, ...] = ()
    epochs: int = 300
    lr: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.0
    batch_size: int = 64
    patience: int = 30
    seed: int = 42
    kind: str = "mlp"
    neighbours: int = 10
    prototypes: int = 20
    layers: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    steps: int = 0
    stride: int = 1

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values, those that only some heads have where they are not the defaults."""
        some_heads = ("kind", "neighbours", "prototypes", "layers", "widths", "steps", "stride")
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, usual) in values.items() if name not in some_heads or value != usual}


@dataclass(frozen=True)
class ChunkRows:
    """Which rows of an array are the chunks of a clip.

    Attributes:
        starts: (N+1,) first row of each clip, and at last M.
        shares: (M,) length of each chunk as a part of its clip.
    """

    starts: np.ndarray
    shares: np.ndarray

    def find(self, clips: np.ndarray) -> np.ndarray:
        """Return the rows of clips (n,), one clip after the other."""
        return np.concatenate([np.arange(self.starts[clip], self.starts[clip + 1]) for clip in clips])

    def take(self, clips: np.ndarray) -> "ChunkRows":
        """Return the rows of clips (n,) in an array of these rows alone."""
        counts = np.diff(self.starts)[clips]
        return ChunkRows(np.concatenate([[0], np.cumsum(counts)]), self.shares[self.find(clips)])


@dataclass(frozen=True)
class Examples:
    """Clips to train or evaluate on.

    Attributes:
        names: of the N clips.
        embeddings: float32 (N,E); for heads on time steps float16 (M, R E), see `models.head_inputs.HeadInput`.
        targets: float32 (N,C) of 0 and 1.
        chunks: the rows of each clip in `embeddings`; None where row n is clip n.
    """

    names: list[str]
    embeddings: np.ndarray
    targets: np.ndarray
    chunks: ChunkRows | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Examples":
        """Return the clips `rows` (int, or bool of N), in that order."""
        rows = np.arange(len(self))[rows]
        names, targets = [self.names[row] for row in rows], self.targets[rows]
        if self.chunks is None or not len(rows):
            return Examples(names, self.embeddings[rows], targets)
        return Examples(names, self.embeddings[self.chunks.find(rows)], targets, self.chunks.take(rows))


@dataclass(frozen=True)
class FittedHead:
    """A head and the facts of its fit.

    Attributes:
        head: of the best epoch, in evaluation mode, on the CPU.
        n_train: training clips.
        n_valid: validation clips.
        best_epoch: the epoch of the weights, counted from 1; 0 for a head that is not trained in epochs.
        n_epochs: epochs that were run.
        valid_loss: of the best epoch; None without validation clips.
    """

    head: Head
    n_train: int
    n_valid: int
    best_epoch: int
    n_epochs: int
    valid_loss: float | None


def fit(
    train: Examples,
    valid: Examples | None,
    labels: list[str],
    single: bool,
    settings: FitSettings,
    device: torch.device,
) -> FittedHead:
    """Fit a head, with early stopping unless it only stores the training clips.

    Args:
        train: training clips; mean and deviation of their embeddings become the head's standardisation.
        valid: clips whose loss selects the epoch; the last epoch is kept if there are none.
        labels: the C class names.
        single: exactly one class a clip: softmax and cross-entropy, else sigmoid and binary cross-entropy.
        settings: of the fit.
        device: to compute on.
    """
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(settings.seed)
        head = _create_head(train, labels, single, settings)
        vectors = train.embeddings.reshape(-1, head.embed_dim)
        mean, scale = compute_statistics(vectors[:: -(-vectors.size // MAX_STATISTICS)])
        head.mean.copy_(torch.from_numpy(mean))
        head.scale.copy_(torch.from_numpy(scale))
        if isinstance(head, NeighbourHead):
            head.store(torch.from_numpy(train.embeddings), torch.from_numpy(train.targets))
            return FittedHead(head.eval(), len(train), 0, 0, 0, None)
        head.to(device)
        valid_data = _Clips.move(valid, single, device) if valid else None
        results = _train(head, _Clips.move(train, single, device), valid_data, settings)
    return FittedHead(head.cpu().eval(), len(train), len(valid) if valid else 0, *results)


def _create_head(train: Examples, labels: list[str], single: bool, settings: FitSettings) -> Head:
    """Create the head of some settings.

    Raises:
        UserError: more neighbours than training clips.
    """
    arguments: dict[str, Any] = {"labels": labels, "activation": "softmax" if single else "sigmoid"}
    width = train.embeddings.shape[1] // max(settings.steps, 1)
    if settings.kind == PrototypeHead.kind:
        arguments |= {"n_prototypes": settings.prototypes * len(labels), "stride": settings.stride}
    else:
        arguments |= {"layers": settings.layers, "widths": settings.widths}
    if settings.kind == NeighbourHead.kind:
        arguments |= {"n_examples": len(train), "n_neighbours": settings.neighbours}
    if settings.kind == Head.kind:
        arguments |= {"hidden_sizes": settings.hidden_sizes, "dropout": settings.dropout}
    return create_head(settings.kind, width, len(labels), **arguments)


@dataclass(frozen=True)
class _Clips:
    """Clips on the device that a head is fitted on.

    Attributes:
        x: (N,E), or (M, R E) with `starts`.
        y: class of each (N,), int, or (N,C) of 0 and 1.
        starts: (N+1,) first row of each clip in `x`; None where row n is clip n.
        shares: (M,) length of each row as a part of its clip.
    """

    x: Tensor
    y: Tensor
    starts: Tensor | None = None
    shares: Tensor | None = None

    @classmethod
    def move(cls, examples: Examples, single: bool, device: torch.device) -> "_Clips":
        """Move clips to a device; `single`: each has one class."""
        targets = torch.from_numpy(examples.targets)
        x, y = torch.from_numpy(examples.embeddings).to(device), (targets.argmax(1) if single else targets).to(device)
        if examples.chunks is None:
            return cls(x, y)
        starts, shares = torch.from_numpy(examples.chunks.starts), torch.from_numpy(examples.chunks.shares).float()
        return cls(x, y, starts.to(device), shares.to(device))

    def compute_logits(self, head: Head, clips: Tensor) -> Tensor:
        """Return a head's logits (n,C) of clips (n,)."""
        if self.starts is None or self.shares is None:
            return head(head.reduce(self.x[clips].float()))
        n_chunks = self.starts[clips + 1] - self.starts[clips]
        place = torch.arange(len(clips), device=clips.device).repeat_interleave(n_chunks)  # among `clips`, of each row
        first = (self.starts[clips] - n_chunks.cumsum(0) + n_chunks).repeat_interleave(n_chunks)
        rows = first + torch.arange(len(place), device=clips.device)
        reduced = head.reduce(self.x[rows].float()) * self.shares[rows, None]
        return head(reduced.new_zeros(len(clips), reduced.shape[1]).index_add_(0, place, reduced))

    def split(self, head: Head) -> Iterator[Tensor]:
        """Yield all clips in blocks of limited size, as indices."""
        row = max(self.x.shape[1], self.x.shape[1] // head.embed_dim * head.width)
        n_rows = 1 if self.starts is None else int(self.starts.diff().max())  # of the longest clip
        size = max(1, min(8192, BLOCK // (row * n_rows)))
        yield from torch.arange(len(self.y), device=self.x.device).split(size)


def _train(head: Head, train: _Clips, valid: _Clips | None, settings: FitSettings) -> tuple[int, int, float | None]:
    """Train a head; return the best epoch, the number of epochs and the validation loss of the best epoch."""
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    order = torch.Generator().manual_seed(settings.seed)
    best_state, best_loss, best_epoch, epoch = None, float("inf"), settings.epochs, 0
    for epoch in range(1, settings.epochs + 1):
        head.train()
        for rows in torch.randperm(len(train.y), generator=order).to(train.y.device).split(settings.batch_size):
            optimiser.zero_grad()
            _compute_loss(train.compute_logits(head, rows), train.y[rows]).backward()
            optimiser.step()
        if valid is None:
            continue
        loss = _compute_mean_loss(head, valid)
        if loss < best_loss:
            best_state, best_loss, best_epoch = copy.deepcopy(head.state_dict()), loss, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    if best_state is None:  # without validation clips, or diverged, which the evaluation reports
        return epoch, epoch, None
    head.load_state_dict(best_state)
    return best_epoch, epoch, best_loss


def compute_statistics(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (E,) of embeddings (N,E); the deviation of a constant dimension is 1."""
    exact = embeddings.astype(np.float64)
    mean, deviation = exact.mean(axis=0), exact.std(axis=0)
    is_constant = deviation <= MIN_DEVIATION * deviation.max(initial=0)
    return mean.astype(np.float32), np.where(is_constant, 1, deviation).astype(np.float32)


@torch.inference_mode()
def predict(head: Head, examples: Examples) -> np.ndarray:
    """Return a head's probabilities of clips, float32 (N,C)."""
    head.eval()
    clips = _Clips.move(examples, False, next(head.buffers()).device)
    logits = torch.cat([clips.compute_logits(head, rows) for rows in clips.split(head)])
    return (logits.softmax(-1) if head.activation == "softmax" else logits.sigmoid()).numpy()


def _compute_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y) if y.ndim == 1 else F.binary_cross_entropy_with_logits(logits, y)


@torch.inference_mode()
def _compute_mean_loss(head: Head, clips: _Clips) -> float:
    head.eval()
    parts = ((rows, clips.compute_logits(head, rows)) for rows in clips.split(head))
    return sum(float(_compute_loss(logits, clips.y[rows])) * len(rows) for rows, logits in parts) / len(clips.y)
