"""Optimisation: frozen parameters, parameter groups, optimisers and learning-rate schedules."""

import fnmatch
import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from common.errors import UserError, some
from models import AudioTagger
from training.config import TrainConfig

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Freeze parameters.

    Args:
        model: the model.
        patterns: shell patterns of parameter names: `patch_embed.*`, `blocks.[0-5].*`.

    Returns:
        The modules whose parameters are all frozen; they should stay in evaluation mode.

    Raises:
        UserError: no parameter matches a pattern, or all are frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            prefixes = some(dict.fromkeys(name.split(".")[0] + ".*" for name in parameters), 12)
            raise UserError(f"freeze: no parameter matches {pattern!r}; the names start with {prefixes}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"freeze: no parameter is left to train after {some(patterns)}")
    return [
        module
        for module in model.modules()
        if (of_module := list(module.parameters())) and not any(p.requires_grad for p in of_module)
    ]


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter: 0 before the first numbered block, i + 1 in block i, more after them."""
    depths: dict[str, int] = {}
    deepest = 0
    for name, _ in model.named_parameters():
        block = re.search(r"(?:^|\.)(?:blocks|features|layers)\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else (deepest + 1 if deepest else 0)
        deepest = max(deepest, depth) if block else deepest
        depths[name] = depth
    return depths


def parameter_groups(
    model: AudioTagger, objective: nn.Module, learning_rate: float | None = None, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups by weight decay and, with `layer_decay`, by depth.

    Norms, biases and the parameters in a model's `no_weight_decay` (position embeddings) have no weight decay, as is
    usual for transformers. Parameters of the objective (a projection, for example) are included. Layer-wise decay is
    that of BEiT (Bao et al., ICLR 2022): the learning rate of each block is `layer_decay` times that of the next one.

    Args:
        model: the student; frozen parameters are left out.
        objective: the objective.
        learning_rate: of the topmost layer; needed with `layer_decay`.
        layer_decay: between 0 and 1, or None for the same learning rate in all layers.
    """
    excluded, depths = model.no_weight_decay(), layer_depths(model)
    top = max(depths.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in [*model.named_parameters(), *objective.named_parameters(prefix="objective")]:
        if parameter.requires_grad:
            below = 0 if layer_decay is None else top - depths.get(name, top)
            groups.setdefault((below, parameter.ndim > 1 and name not in excluded), []).append(parameter)
    entries: list[dict[str, Any]] = []
    for (below, decayed), parameters in sorted(groups.items(), key=lambda group: (group[0][0], not group[0][1])):
        entry: dict[str, Any] = {"params": parameters} | ({} if decayed else {"weight_decay": 0.0})
        if layer_decay is not None and learning_rate is not None:
            entry["lr"] = learning_rate * layer_decay**below
        entries.append(entry)
    return entries


def create_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    arguments: dict[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """Build an optimiser by name.

    Args:
        name: `Adam8bit` (of bitsandbytes; Adam without it or without a GPU, which is logged), or `Adam`, `AdamW`, `SGD`
            of `torch.optim`.
        parameters: parameters or parameter groups.
        arguments: arguments of the optimiser.
        device: device of the parameters.

    Raises:
        UserError: an argument is not supported by the optimiser.
    """
    factory = _adam_8bit(device) if name == "Adam8bit" else getattr(torch.optim, name)
    if factory is None:
        factory = torch.optim.Adam
    if factory.__module__.startswith("torch.") and not {"foreach", "fused", "differentiable"} & arguments.keys():
        arguments = arguments | {"fused": True}
    try:
        return factory(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer_args {arguments} do not fit {name}: {error}") from None


def _adam_8bit(device: torch.device) -> Any:
    if device.type == "cuda":
        try:
            import bitsandbytes  # optional; loads CUDA libraries

            return bitsandbytes.optim.Adam8bit
        except ImportError:
            pass
    logger.info("optimizer: Adam in place of Adam8bit, which needs bitsandbytes and a GPU")
    return None


def ced_rate(iteration: int, warmup: int, total: int, decay_frac: float) -> float:
    """Return the learning rate of CED's published run at an iteration from 0, as a fraction of its peak.

    A line from exactly 0 reaches the peak at iteration `warmup` - 1. From there a cosine falls towards `decay_frac`
    over `total` further iterations; the run ends before, above `decay_frac`. With a warm-up of at most one iteration,
    the peak is at iteration 0.
    """
    rise = max(warmup - 1, 0)  # iterations before the peak
    return iteration / rise if iteration < rise else _descend("cosine", (iteration - rise) / total, decay_frac)


def fitted_rate(iteration: int, shape: str, warmup: int, total: int, decay_frac: float) -> float:
    """Return the learning rate of schedules that reach `decay_frac` at the end of the run, as a fraction of the peak.

    A line from 1 / (`warmup` + 1) reaches the peak at iteration `warmup`; from there the rate falls to `decay_frac` at
    `total`, or is constant. The arguments are those of `create_schedule`.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    return _descend(shape, min(1.0, (iteration - warmup) / max(1, total - warmup)), decay_frac)


def _descend(shape: str, progress: float, end: float) -> float:
    """Return the value of a descent from 1 to `end` at `progress`, from 0 to 1."""
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[shape]
    return end + (1 - end) * remaining


def create_schedule(
    optimizer: torch.optim.Optimizer, shape: str, warmup: int, total: int, decay_frac: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule, stepped once an iteration.

    Args:
        optimizer: its groups' learning rates are the peak.
        shape: ced (see `ced_rate`), or cosine, linear or constant (see `fitted_rate`).
        warmup: iterations, 0 for none.
        total: iterations of the whole run, warm-up included.
        decay_frac: final fraction of the peak.
    """

    def factor(iteration: int) -> float:
        if shape == "ced":
            return ced_rate(iteration, warmup, total, decay_frac)
        return fitted_rate(iteration, shape, warmup, total, decay_frac)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def count_warmup(config: TrainConfig, epoch_steps: int, total_steps: int) -> int:
    """Return the number of warm-up steps; too many for a short run are reduced with a warning."""
    if not config.use_scheduler:
        return 0
    warmup = config.warmup_iters or 0 if config.warmup_epochs is None else config.warmup_epochs * epoch_steps
    if warmup < total_steps:
        return warmup
    shortened = total_steps // 10
    logger.warning("warm-up of %d iterations in a run of %d: shortened to %d", warmup, total_steps, shortened)
    return shortened
