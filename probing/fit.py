"""Fitting a head to frozen embeddings, and its predictions.

The embeddings are in memory, so that a fit takes seconds. The same arguments give the same head, bit for bit on a CPU.

Letters: N clips, E embedding width, C classes.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.headed import Head

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
    """

    hidden_sizes: tuple[int, ...] = ()
    epochs: int = 300
    lr: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.0
    batch_size: int = 64
    patience: int = 30
    seed: int = 42


@dataclass(frozen=True)
class Examples:
    """Clips to train or evaluate on.

    Attributes:
        names: of the N clips.
        embeddings: float32 (N,E).
        targets: float32 (N,C) of 0 and 1.
    """

    names: list[str]
    embeddings: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Examples":
        """Return the clips `rows` (int, or bool of N), in that order."""
        rows = np.arange(len(self))[rows]
        return Examples([self.names[row] for row in rows], self.embeddings[rows], self.targets[rows])


@dataclass(frozen=True)
class FittedHead:
    """A head and the facts of its fit.

    Attributes:
        head: of the best epoch, in evaluation mode, on the CPU.
        n_train: training clips.
        n_valid: validation clips.
        best_epoch: the epoch of the weights, counted from 1.
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
    """Fit a head with early stopping.

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
        return _fit(train, valid if valid is not None and len(valid) else None, labels, single, settings, device)


def _fit(
    train: Examples,
    valid: Examples | None,
    labels: list[str],
    single: bool,
    settings: FitSettings,
    device: torch.device,
) -> FittedHead:
    width = train.embeddings.shape[1]
    activation = "softmax" if single else "sigmoid"
    head = Head(
        width,
        len(labels),
        hidden_sizes=settings.hidden_sizes,
        labels=labels,
        activation=activation,  # type: ignore[arg-type]
        dropout=settings.dropout,
    )
    mean, scale = compute_statistics(train.embeddings)
    head.mean.copy_(torch.from_numpy(mean))
    head.scale.copy_(torch.from_numpy(scale))
    head.to(device)
    x, y = _make_tensors(train, single, device)
    valid_tensors = _make_tensors(valid, single, device) if valid else None
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    order = torch.Generator().manual_seed(settings.seed)
    best_state, best_loss, best_epoch, epoch = None, float("inf"), settings.epochs, 0
    for epoch in range(1, settings.epochs + 1):
        head.train()
        for rows in torch.randperm(len(x), generator=order).to(device).split(settings.batch_size):
            optimiser.zero_grad()
            _compute_loss(head(x[rows]), y[rows], single).backward()
            optimiser.step()
        if valid_tensors is None:
            continue
        loss = _compute_mean_loss(head, *valid_tensors, single)
        if loss < best_loss:
            best_state, best_loss, best_epoch = copy.deepcopy(head.state_dict()), loss, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    if best_state is not None:
        head.load_state_dict(best_state)
    elif valid_tensors is not None:  # the loss was never finite; the evaluation reports a diverged head
        best_epoch = epoch
    valid_loss = best_loss if best_state is not None else None
    return FittedHead(head.cpu().eval(), len(train), len(valid) if valid else 0, best_epoch, epoch, valid_loss)


def compute_statistics(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (E,) of embeddings (N,E); the deviation of a constant dimension is 1."""
    exact = embeddings.astype(np.float64)
    mean, deviation = exact.mean(axis=0), exact.std(axis=0)
    is_constant = deviation <= MIN_DEVIATION * deviation.max(initial=0)
    return mean.astype(np.float32), np.where(is_constant, 1, deviation).astype(np.float32)


@torch.inference_mode()
def predict(head: Head, embeddings: np.ndarray, block: int = 8192) -> np.ndarray:
    """Return a head's probabilities, float32 (N,C), for embeddings (N,E)."""
    head.eval()
    logits = torch.cat(
        [head(torch.from_numpy(part)) for part in np.array_split(embeddings, len(embeddings) // block + 1)]
    )
    return (logits.softmax(-1) if head.activation == "softmax" else logits.sigmoid()).numpy()


def _make_tensors(examples: Examples, single: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    targets = torch.from_numpy(examples.targets)
    y = targets.argmax(1) if single else targets
    return torch.from_numpy(examples.embeddings).to(device), y.to(device)


def _compute_loss(logits: Tensor, y: Tensor, single: bool) -> Tensor:
    return F.cross_entropy(logits, y) if single else F.binary_cross_entropy_with_logits(logits, y)


@torch.inference_mode()
def _compute_mean_loss(head: Head, x: Tensor, y: Tensor, single: bool, block: int = 8192) -> float:
    head.eval()
    parts = zip(x.split(block), y.split(block), strict=True)
    return sum(float(_compute_loss(head(part), target, single)) * len(part) for part, target in parts) / len(x)
