"""Optimisers and the learning-rate schedule."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from models import AudioTagger

logger = logging.getLogger(__name__)


def parameter_groups(model: AudioTagger, objective: object) -> list[dict[str, Any]]:
    """Return what to optimise, in two groups: with weight decay, and without.

    Norms, biases and what a model names in `no_weight_decay` (position embeddings) are not decayed, as is usual for
    transformers. An objective with parameters of its own (a projection, say) has them trained as well.
    """
    spared = model.no_weight_decay()
    named = [*model.named_parameters(), *(objective.named_parameters() if isinstance(objective, nn.Module) else [])]
    decayed = [p for name, p in named if p.ndim > 1 and name not in spared]
    others = [p for name, p in named if p.ndim <= 1 or name in spared]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def create_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    arguments: dict[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """Build an optimiser by name.

    Args:
        name: `Adam8bit` (bitsandbytes, where it is installed with a GPU; Adam otherwise, with one line that says so),
            or `Adam`, `AdamW`, `SGD` of `torch.optim`.
        parameters: what to optimise.
        arguments: for the optimiser.
        device: where the parameters are.

    Raises:
        UserError: the optimiser does not know an argument.
    """
    factory = (_adam_8bit(device) or torch.optim.Adam) if name == "Adam8bit" else getattr(torch.optim, name)
    try:
        return factory(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer_args {arguments} do not fit {name}: {error}") from None


def _adam_8bit(device: torch.device) -> Any:
    if device.type == "cuda":
        try:
            import bitsandbytes  # optional; loads CUDA libraries, so only when asked for

            return bitsandbytes.optim.Adam8bit
        except ImportError:
            pass
    logger.info("optimizer: Adam in place of Adam8bit, which needs bitsandbytes and a GPU")
    return None


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int, decay_frac: float) -> Any:
    """Return a schedule, stepped once an iteration: linear from 0 over `warmup`, then a cosine to `decay_frac`.

    Args:
        optimizer: its groups' learning rates are the peak.
        warmup: iterations.
        total: iterations of the whole run, warm-up included.
        decay_frac: fraction of the peak at the end.
    """

    def factor(iteration: int) -> float:
        if iteration < warmup:
            return (iteration + 1) / (warmup + 1)
        progress = min(1.0, (iteration - warmup) / max(1, total - warmup))
        return decay_frac + (1 - decay_frac) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
