"""Registry of models: names, factories and published weights."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import UserError, did_you_mean, some
from models.base import AudioTagger
from models.settings import find_arguments

AUDIOSET_CLASSES = 527
COMMON_ARGUMENTS: dict[str, Any] = {"band_limit": None, "parametrize": None, "quantize": None}  # of every model
_INTERFACE = ("encode", "classify", "pool", "frames", "n_steps")  # methods that every architecture implements

Factory = TypeVar("Factory", bound=Callable[..., AudioTagger])


@dataclass(frozen=True)
class ModelEntry:
    """A registered model.

    Attributes:
        factory: called with `num_classes` and the arguments of the model.
        weights: URL of its published weights, None where there are none.
        initialisation: URL of published pre-training weights, "timm:NAME", or None.
    """

    factory: Callable[..., AudioTagger]
    weights: str | None = None
    initialisation: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments besides `num_classes`, with their defaults."""
        return find_arguments(self.factory) | COMMON_ARGUMENTS

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments besides `num_classes`."""
        return list(self.defaults)

    @property
    def masks_padding(self) -> bool:
        """Whether clips of several lengths share a batch, see `AudioTagger`."""
        return bool(getattr(_unwrap(self.factory), "masks_padding", False))


_MODELS: dict[str, ModelEntry] = {}


def register_model(
    name: str | None = None, *, weights: str | None = None, initialisation: str | None = None
) -> Callable[[Factory], Factory]:
    """Register a factory (a function, a class or a partial of one) as a model.

    Args:
        name: of the model, by default that of the factory.
        weights: URL of published weights.
        initialisation: URL of published pre-training weights, or "timm:NAME".

    Raises:
        ValueError: the name is empty or taken.
        TypeError: the class does not implement the interface of `AudioTagger`.

    Example:
        >>> @register_model()
        ... def my_tagger(*, num_classes, width=64):
        ...     return MyTagger(num_classes=num_classes, width=width)
    """

    def register(factory: Factory) -> Factory:
        key = name or getattr(factory, "__name__", "")
        if not key or key in _MODELS:
            raise ValueError(f"a model needs a unique name, {key!r} is taken or empty")
        if isinstance(kind := _unwrap(factory), type):
            check_interface(kind)
        _MODELS[key] = ModelEntry(factory, weights, initialisation)
        return factory

    return register


def _unwrap(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or class of a partial."""
    return getattr(factory, "func", factory)


def check_interface(kind: type) -> None:
    """Check that a class implements what `AudioTagger` leaves to its subclasses.

    Raises:
        TypeError: it is no `AudioTagger`, or methods or `last_layer` are missing.
    """
    if not issubclass(kind, AudioTagger):
        raise TypeError(f"{kind.__name__} is no model: expected a subclass of models.base.AudioTagger")
    missing = [name for name in _INTERFACE if getattr(kind, name) is getattr(AudioTagger, name)]
    if not hasattr(kind, "last_layer"):
        missing.append("last_layer (name of the module whose weight has num_classes rows)")
    if missing:
        raise TypeError(f"{kind.__name__} lacks {', '.join(missing)}: see models.base.AudioTagger")


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of all models that match a pattern such as "ced_*"."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def get_model_entry(name: str) -> ModelEntry:
    """Return the entry of a registered model.

    Raises:
        UserError: an unknown name.
    """
    if name not in _MODELS:
        raise UserError(
            f"no model is called {name!r}{did_you_mean(name, _MODELS) or f'; known are {some(list_models(), 99)}'}"
        )
    return _MODELS[name]
