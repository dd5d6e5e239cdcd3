"""Batch norms folded into the convolutions before them, for networks that are trained no further."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import UserError


def fold_batch_norm(model: nn.Module) -> None:
    """Fold each batch norm whose input is the output of one convolution or linear layer, in place.

    The output stays the same up to float rounding, which is checked. The layer gets a bias; the batch norm becomes an
    identity, or its activation where it has one (timm's `BatchNormAct2d`). Others, such as those of an input, stay.

    Args:
        model: a tagger; which layers follow each other is observed on a second of noise.

    Raises:
        UserError: there is nothing to fold, or the output of such a layer is used elsewhere as well.
    """
    was_training = model.training
    model.eval()
    noise = 0.1 * torch.randn(1, cast(Any, model).sample_rate, generator=torch.Generator().manual_seed(0))
    pairs, expected = _find_pairs(model, noise)
    if not pairs:
        raise UserError("fold_batch_norm: no batch norm follows a convolution; leave it out")
    names = {module: name for name, module in model.named_modules()}
    for layer, norm in pairs:
        _fold(layer, norm)
        parent, _, child = names[norm].rpartition(".")
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        setattr(model.get_submodule(parent), child, nn.Sequential(*rest) if rest else nn.Identity())
    with torch.no_grad():
        differs = not torch.allclose(cast(Callable[[Tensor], Tensor], model)(noise), expected, rtol=1e-2, atol=1e-3)
    model.train(was_training)
    if differs:
        raise UserError("fold_batch_norm: the output of a convolution is used beside its batch norm; leave it out")


@torch.no_grad()
def _find_pairs(model: nn.Module, waveform: Tensor) -> tuple[list[tuple[nn.Module, _BatchNorm]], Tensor]:
    """Return each layer with the batch norm that takes its output, in the order of computation; the model's output."""
    made: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are kept, so that no address is used twice
    calls: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Module, _BatchNorm]] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        made[id(output)] = (output, module)
        calls[module] = calls.get(module, 0) + 1

    def match(module: nn.Module, arguments: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if id(arguments[0]) in made and cast(_BatchNorm, module).track_running_stats:
            pairs.append((made[id(arguments[0])][1], cast(_BatchNorm, module)))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(keep))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(match))
    try:
        output = cast(Callable[[Tensor], Tensor], model)(waveform)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], output


@torch.no_grad()
def _fold(layer: Any, norm: _BatchNorm) -> None:
    """Fold norm(layer(x)) = a (W x + b - mean) + beta, with a = gamma / sqrt(variance + eps), into W and b."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = (0 if layer.bias is None else layer.bias.double()) - norm.running_mean
    bias = bias * factor + (0 if norm.bias is None else norm.bias)
    scaled = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(scaled)
    layer.bias = nn.Parameter(bias.float())
