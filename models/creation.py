"""Building registered models with fresh weights."""

import warnings
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.errors import Faults, UserError, did_you_mean, some
from models.argument_checks import find_argument_faults
from models.base import Activation, AudioTagger
from models.labels import labels_for
from models.parametrizations import parametrize_model
from models.quantization import quantize_model
from models.quantization_recipe import Quantization
from models.registry import AUDIOSET_CLASSES, COMMON_ARGUMENTS, check_interface, get_model_entry

_STARTS = ("normal", "uniform", "zero", "zeros", "fill", "erfinv", "mul", "add", "clamp")  # what sets initial weights


class _WithoutMemory(TorchFunctionMode):
    """Makes parameters without memory, on the device "meta", and leaves out their random start.

    Not `torch.device("meta")`, where the windows and filters of a front-end make PyTorch import its compiler, for
    seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.randn):
            return torch.empty(*args, **kwargs | {"device": "meta"})
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, Tensor) and first.is_meta and getattr(func, "__name__", "").rstrip("_") in _STARTS:
            return first
        return func(*args, **kwargs)


def count_weights(name: str, num_classes: int, arguments: Mapping[str, Any]) -> int:
    """Return the number of weights of a model without those of its last layer; none of them is allocated.

    Args:
        name: see `list_models`.
        num_classes: see `create_model`.
        arguments: settings of the architecture, of the right types.

    Raises:
        UserError: values that contradict each other.
    """
    given = {key: value for key, value in arguments.items() if key not in COMMON_ARGUMENTS}
    with _WithoutMemory():
        model = _build(name, num_classes, given)
    last = f"{model.last_layer}."
    return sum(value.numel() for key, value in model.state_dict().items() if not key.startswith(last))


def _build(name: str, num_classes: int, arguments: Mapping[str, Any]) -> AudioTagger:
    try:
        with warnings.catch_warnings():  # num_classes=0 makes PyTorch warn of an empty last layer
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            return get_model_entry(name).factory(num_classes=num_classes, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name!r} cannot be built with {arguments}: {error}") from error


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    labels: list[str] | None = None,
    activation: Activation = "sigmoid",
    band_limit: float | None = None,
    parametrize: Mapping[str, Mapping[str, Any] | None] | None = None,
    quantize: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> AudioTagger:
    """Build a registered model with fresh weights.

    Args:
        name: see `list_models`.
        num_classes: C, by default the number of labels, or AudioSet's 527; 0 for a network that only embeds.
        labels: names of the classes, by default AudioSet's if there are 527, else their numbers.
        activation: "sigmoid" (any number of classes at once) or "softmax" (exactly one).
        band_limit: frequency in hertz above which the front-end ignores the signal, see `FrontEnd.limit_band`; None for
            no limit.
        parametrize: changes of its parameters, see `models.parametrizations`; None for none.
        quantize: settings of quantized weights, see `models.quantization_recipe.Quantization`; None for float weights.
        **arguments: settings of the architecture.

    Returns:
        The network, in training mode.

    Raises:
        UserError: an unknown name, unknown arguments, or values that contradict each other.
    """
    entry = get_model_entry(name)
    faults = Faults(f"model {name!r}")
    for key in arguments:
        if key not in entry.arguments:
            hint = did_you_mean(key, entry.arguments) or f"; it takes {some(entry.arguments, 99)}"
            faults.add(f"unknown argument {key!r}{hint}")
    if activation not in get_args(Activation):
        faults.add(f"activation must be one of {some(get_args(Activation))}, not {activation!r}")
    for sentence in find_argument_faults(entry.factory, arguments):
        faults.add(sentence)
    faults.raise_if_any()
    if num_classes is None:
        num_classes = AUDIOSET_CLASSES if labels is None else len(labels)
    labels = labels_for(num_classes, labels)
    model = _build(name, num_classes, arguments)
    check_interface(type(model))  # of what a function built, which registration could not check
    if band_limit is not None:
        model.front_end.limit_band(band_limit)
        arguments["band_limit"] = band_limit
    if parametrize:
        parametrize_model(model, parametrize)
        arguments["parametrize"] = {name: dict(settings or {}) for name, settings in parametrize.items()}
    model.name, model.arguments, model.labels, model.activation = name, dict(arguments), labels, activation
    if quantize is not None:
        quantize_tagger(model, quantize)
    return model


def quantize_tagger(model: AudioTagger, settings: Mapping[str, Any]) -> None:
    """Quantize the weights of a model in place, and store the settings as its argument `quantize`.

    Raises:
        UserError: invalid settings, see `models.quantization.quantize_model`.
    """
    recipe = Quantization.parse(settings)
    quantize_model(model, recipe)
    model.arguments["quantize"] = recipe.describe()
