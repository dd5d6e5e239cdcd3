"""Parametrizations of a network's weights (low-rank, quantised, merged) as an argument of the model.

`create_model(NAME, parametrize={CHANGE: SETTINGS})` builds the network and then applies the change with
`torch.nn.utils.parametrize`: the original parameters are trained, and the weights are computed from them. The argument
is stored in checkpoints like every other one. A new change is a function with `@register_parametrization("name")`.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.errors import UserError, did_you_mean, some

Change = Callable[..., None]

_CHANGES: dict[str, Change] = {}


def register_parametrization(name: str) -> Callable[[Change], Change]:
    """Register a change: a function of a model, which it changes in place, and of settings by keyword."""

    def register(change: Change) -> Change:
        _CHANGES[name] = change
        return change

    return register


def parametrize_model(model: nn.Module, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Apply changes to the parameters of a model, in place.

    Args:
        model: with plain parameters.
        changes: names and settings, in order.

    Raises:
        UserError: an unknown change or setting, or values out of range.
    """
    if not isinstance(changes, Mapping):
        raise UserError(f"parametrize is {changes!r}; expected names of changes with their settings")
    for name, settings in changes.items():
        if name not in _CHANGES:
            known = f"; known are {some(_CHANGES, 99)}" if _CHANGES else "; none is registered"
            raise UserError(f"parametrize: no change is called {name!r}{did_you_mean(name, _CHANGES) or known}")
        try:
            _CHANGES[name](model, **settings or {})
        except TypeError as error:
            raise UserError(f"parametrize: {name} cannot be applied with {dict(settings or {})}: {error}") from None


def fit_plain_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the plain weights of a state dict for a model with parametrizations.

    Each becomes the original parameter, or those that `right_inverse` of the parametrization computes from it. Tensors
    that are stored under their parametrized names are not changed.
    """
    fitted = dict(state)
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, changed in cast(nn.ModuleDict, module.parametrizations).items():
            prefix = f"{path}." if path else ""
            key, inside = f"{prefix}{name}", f"{prefix}parametrizations.{name}."
            if key in fitted and not any(other.startswith(inside) for other in fitted):
                value = fitted.pop(key)
                own = _pop_prefix(fitted, f"{key}_{kept}.") if (kept := _kept_as(changed)) else {}
                inverts = all(hasattr(change, "right_inverse") for change in changed.children())
                inverts &= value.shape == cast(Tensor, getattr(module, name)).shape
                if inverts:  # a copy on the model's device, since its parameter shares the memory of what is set
                    setattr(module, name, value.to(getattr(module, name), copy=True))
                parts = {f"{inside}{part}": tensor for part, tensor in changed.state_dict().items()}
                fitted |= parts if inverts else parts | {f"{inside}original": value}
                fitted |= {f"{inside}0.{part}": tensor for part, tensor in own.items()}
    return fitted


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with plain names, where a parametrization has a name to be kept under (`kept_as`).

    The original of X becomes X, tensors of its parametrization become those of X_NAME, a quantizer's for example. Other
    parametrizations keep their names.
    """
    state: dict[str, Tensor] = model.state_dict()
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, changed in cast(nn.ModuleDict, module.parametrizations).items():
            if kept := _kept_as(changed):
                prefix = f"{path}." if path else ""
                inside = f"{prefix}parametrizations.{name}."
                state[f"{prefix}{name}"] = state.pop(f"{inside}original")
                own = _pop_prefix(state, f"{inside}0.")
                state |= {f"{prefix}{name}_{kept}.{part}": tensor for part, tensor in own.items()}
    return state


def _kept_as(chain: nn.Module) -> str | None:
    """Return the name that a weight's only parametrization is kept under."""
    parts = list(chain.children())
    return getattr(parts[0], "kept_as", None) if len(parts) == 1 else None


def _pop_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose names start with a prefix; return them by the rest of their names."""
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}


def bake_parametrizations(model: nn.Module) -> None:
    """Replace parametrizations by plain parameters of the values that they have in evaluation, in place.

    Those with a name to be kept under (`kept_as`) stay beside the parameter, as a module that is not applied.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            chains = cast(nn.ModuleDict, module.parametrizations).eval()  # in training, a change may not be on yet
            values = {name: getattr(module, name).detach() for name in chains}
            kept = {
                f"{name}_{part.kept_as}": part
                for name in chains
                for part in chains[name].children()
                if hasattr(part, "kept_as")
            }
            # Not `remove_parametrizations`, which deletes the property of the class that a copy of the module shares.
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
            for name, part in kept.items():
                module.add_module(name, part)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # refers to the new parameters
