"""A head on frozen embeddings: which clips it learns from, how it is fitted, what it says.

The embeddings lie in memory, so that a fit takes seconds. The same arguments give the same head, bit for bit on a CPU.

Letters: N clips, E embedding width, C classes.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.headed import Head

FLAT = 1e-6  # a dimension that varies less than this, relative to the one that varies most, is left as it is


@dataclass(frozen=True)
class Fitting:
    """How a head is fitted.

    Attributes:
        hidden_sizes: widths of hidden layers; none for a linear head.
        epochs: at most.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        dropout: after each hidden layer.
        batch_size: clips a step.
        patience: epochs without a lower loss on the validation clips after which it ends.
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
    """Clips to learn from or to be judged by.

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
class Fitted:
    """A head and how it came about.

    Attributes:
        head: as it was at its best, in evaluation mode, on the CPU.
        n_train: clips that it learned from.
        n_valid: clips that chose when to stop.
        best_epoch: whose weights these are, counted from 1.
        n_epochs: fitted.
        valid_loss: of the best epoch; None without validation clips.
    """

    head: Head
    n_train: int
    n_valid: int
    best_epoch: int
    n_epochs: int
    valid_loss: float | None


def fit(
    train: Examples, valid: Examples | None, labels: list[str], single: bool, how: Fitting, device: torch.device
) -> Fitted:
    """Fit a head; what `valid` holds decides when to stop, and nothing else.

    Args:
        train: clips to learn from; mean and scale of their embeddings become the head's standardisation.
        valid: clips whose loss chooses the epoch to keep; None or none to keep the last.
        labels: the C class names.
        single: exactly one class a clip: softmax and cross-entropy, else sigmoid and binary cross-entropy.
        how: the settings.
        device: to compute on.
    """
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(how.seed)
        return _fit(train, valid if valid is not None and len(valid) else None, labels, single, how, device)


def _fit(
    train: Examples, valid: Examples | None, labels: list[str], single: bool, how: Fitting, device: torch.device
) -> Fitted:
    width = train.embeddings.shape[1]
    activation = "softmax" if single else "sigmoid"
    head = Head(
        width,
        len(labels),
        hidden_sizes=how.hidden_sizes,
        labels=labels,
        activation=activation,  # type: ignore[arg-type]
        dropout=how.dropout,
    )
    mean, scale = standardisation(train.embeddings)
    head.mean.copy_(torch.from_numpy(mean))
    head.scale.copy_(torch.from_numpy(scale))
    head.to(device)
    x, y = _tensors(train, single, device)
    heard = _tensors(valid, single, device) if valid else None
    optimiser = torch.optim.AdamW(head.parameters(), lr=how.lr, weight_decay=how.weight_decay, fused=True)
    order = torch.Generator().manual_seed(how.seed)
    best_state, best_loss, best_epoch, epoch = None, float("inf"), how.epochs, 0
    for epoch in range(1, how.epochs + 1):
        head.train()
        for rows in torch.randperm(len(x), generator=order).to(device).split(how.batch_size):
            optimiser.zero_grad()
            _loss(head(x[rows]), y[rows], single).backward()
            optimiser.step()
        if heard is None:
            continue
        loss = _mean_loss(head, *heard, single)
        if loss < best_loss:
            best_state, best_loss, best_epoch = copy.deepcopy(head.state_dict()), loss, epoch
        elif epoch - best_epoch >= how.patience:
            break
    if best_state is not None:
        head.load_state_dict(best_state)
    elif heard is not None:  # never a number: what diverged is told where it is judged
        best_epoch = epoch
    told = best_loss if best_state is not None else None
    return Fitted(head.cpu().eval(), len(train), len(valid) if valid else 0, best_epoch, epoch, told)


def standardisation(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation (E,) of embeddings (N,E); 1 where a dimension does not vary."""
    exact = embeddings.astype(np.float64)
    mean, deviation = exact.mean(axis=0), exact.std(axis=0)
    flat = deviation <= FLAT * deviation.max(initial=0)
    return mean.astype(np.float32), np.where(flat, 1, deviation).astype(np.float32)


@torch.inference_mode()
def answer(head: Head, embeddings: np.ndarray, block: int = 8192) -> np.ndarray:
    """Return a head's probabilities, float32 (N,C), for embeddings (N,E)."""
    head.eval()
    logits = torch.cat(
        [head(torch.from_numpy(part)) for part in np.array_split(embeddings, len(embeddings) // block + 1)]
    )
    return (logits.softmax(-1) if head.activation == "softmax" else logits.sigmoid()).numpy()


def _tensors(examples: Examples, single: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    targets = torch.from_numpy(examples.targets)
    y = targets.argmax(1) if single else targets
    return torch.from_numpy(examples.embeddings).to(device), y.to(device)


def _loss(logits: Tensor, y: Tensor, single: bool) -> Tensor:
    return F.cross_entropy(logits, y) if single else F.binary_cross_entropy_with_logits(logits, y)


@torch.inference_mode()
def _mean_loss(head: Head, x: Tensor, y: Tensor, single: bool, block: int = 8192) -> float:
    head.eval()
    parts = zip(x.split(block), y.split(block), strict=True)
    return sum(float(_loss(head(part), target, single)) * len(part) for part, target in parts) / len(x)
