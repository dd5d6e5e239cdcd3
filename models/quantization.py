"""Quantized weights as an argument of any model: training with quantization, and quantization after training.

`create_model(NAME, quantize={"weights": 4})` computes with weights of 2^4 values in each group. The optimiser trains
the latent weights in float32; gradients pass through the rounding as if it were the identity (straight-through
estimator, Bengio et al., arXiv 1308.3432). Checkpoints hold the latent weights under their plain names with the
parameters of the grid, `models.load_model` returns a network of quantized weights, and `encode` of its quantizers gives
the codes. The paper on quantized distillation leaves bit widths, grids and groups open: these are our choices.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from common.errors import UserError, some
from models.batch_norm_folding import fold_batch_norm
from models.quantization_recipe import Quantization
from models.quantizers import FakeQuantize
from models.straight_through import ActivationQuantizer

_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU, nn.MultiheadAttention)


def _quantize_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, module.activation_quantizer)(arguments[0]), *arguments[1:])


def _weight_names(module: nn.Module) -> list[str]:
    """Return the names of the weights of a layer that are quantized."""
    if not isinstance(module, _MODULES):
        return []
    values = {name: value for name, value in module._parameters.items() if "weight" in name}
    return [name for name, value in values.items() if value is not None and value.ndim > 1 and value.numel()]


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a layer is a convolution of each channel by itself."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups == module.in_channels


def quantize_model(model: nn.Module, recipe: Quantization) -> None:
    """Quantize the weights of linear, convolutional, recurrent and attention layers, in place, as parametrizations.

    Args:
        model: with float weights, trained or not. Its front-end is left as it is.
        recipe: see `Quantization`.

    Raises:
        UserError: a pattern that fits nothing, no weights left, groups of fewer weights than levels, weights that are
            not finite, or a model that is quantized or parametrized already.
    """
    if any(quantized_weights(model)):
        raise UserError("quantize: the model is quantized already; give the checkpoint of float weights")
    if any(map(parametrize.is_parametrized, model.modules())):
        raise UserError("quantize: the weights have parametrizations already; leave out parametrize, or quantize")
    if recipe.fold_batch_norm:
        fold_batch_norm(model)
    found = {
        f"{path}.{name}" if path else name: (path, module, name)
        for path, module in model.named_modules()
        for name in _weight_names(module)
        if not path.startswith("front_end")
    }
    skipped: set[str] = set()
    for pattern in recipe.skip:
        fitting = {
            key
            for key, (path, module, _) in found.items()
            if fnmatch.fnmatch(key, pattern)
            or fnmatch.fnmatch(path, pattern)
            or (pattern == "depthwise" and is_depthwise(module))
        }
        if not fitting:
            raise UserError(f"quantize: the pattern {pattern!r} in skip fits no weight; these are {some(found, 12)}")
        skipped |= fitting
    found = {key: value for key, value in found.items() if key not in skipped}
    if not found:
        raise UserError(
            f"quantize: no weights are left to quantize after skip {some(recipe.skip)}"
            if recipe.skip
            else "quantize: the model has no weights to quantize"
        )
    _check_levels(recipe, {key: getattr(module, name) for key, (_, module, name) in found.items()})
    for _, module, name in found.values():
        quantizer = FakeQuantize(getattr(module, name), recipe)
        parametrize.register_parametrization(module, name, quantizer, unsafe=True)  # else the grid is fitted twice
        # attention layers read the weights of their parts, whose own forward pass is not used
        takes_inputs = not isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear)
        if recipe.activations and takes_inputs and not hasattr(module, "activation_quantizer"):
            module.activation_quantizer = ActivationQuantizer(recipe.start, isinstance(module, nn.Conv1d | nn.Conv2d))
            module.register_forward_pre_hook(_quantize_input)
        if isinstance(module, nn.RNNBase) and len(cast(nn.ModuleDict, module.parametrizations)) == 1:
            _adapt_recurrent_layer(module)


def _check_levels(recipe: Quantization, weights: Mapping[str, nn.Parameter]) -> None:
    """Check that groups have more weights than levels.

    Raises:
        UserError: one has not.
    """
    for key, weight in weights.items():
        size = recipe.group_size(weight.shape)
        if recipe.scheme == "levels" and size <= 2**recipe.weights:
            raise UserError(
                f"quantize: {key} has groups of {size} weights, which need no {2**recipe.weights} levels each; give "
                "fewer bits or scope: tensor, or leave it out by skip"
            )


def _adapt_recurrent_layer(module: nn.RNNBase) -> None:
    """Make a parametrized recurrent layer compute each weight once in a pass, and copy without them.

    PyTorch computes them three times, to see whether they have changed. Weights that were computed cannot be copied.
    """
    kind = cast(Any, type(module))  # of this layer alone, made by `register_parametrization`
    copy_parametrized = kind.__deepcopy__

    def copy(module: Any, memo: dict[int, Any]) -> Any:
        module._flat_weights = [weight.detach() for weight in module._flat_weights]  # until the next forward pass
        return copy_parametrized(module, memo)

    def compute_weights(module: Any) -> None:
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]

    kind.__deepcopy__ = copy
    kind._update_flat_weights = compute_weights


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, FakeQuantize]]:
    """Yield the plain name of each quantized weight, its module, its name there, and its quantizer."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for name, chain in cast(nn.ModuleDict, module.parametrizations).items():
                for part in chain.children():
                    if isinstance(part, FakeQuantize):
                        yield f"{prefix}{name}", module, name, part
        for child, part in module.named_children():
            if isinstance(part, FakeQuantize) and child.endswith(f"_{part.kept_as}"):
                name = child.removesuffix(f"_{part.kept_as}")
                yield f"{prefix}{name}", module, name, part


def drop_quantizers(model: nn.Module) -> None:
    """Remove the grids from a model after `bake_parametrizations`, so that only plain weights are left, in place."""
    for _, module, name, quantizer in list(quantized_weights(model)):
        delattr(module, f"{name}_{quantizer.kept_as}")


class QuantizationSchedule:
    """Keeps the grids of a model up to date while it is trained; does nothing for other models.

    Args:
        model: with its parametrizations.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [
            (cast(Any, module).parametrizations[name], quantizer)
            for _, module, name, quantizer in quantized_weights(model)
            if parametrize.is_parametrized(module, name)
        ]
        self._inputs = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]

    def advance(self, step: int, n_steps: int) -> None:
        """Prepare a training step, numbered from 0, of a run of `n_steps`."""
        for chain, quantizer in self._weights:
            quantizer.advance(chain.original, step, n_steps)
        for inputs in self._inputs:
            inputs.active = step >= inputs.start * n_steps
