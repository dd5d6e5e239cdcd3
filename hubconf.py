"""Entry points of PyTorch's hub: models of this project by one call from Python in any folder.

    model = torch.hub.load("/path/to/this/project", "ced_mini", source="local")
    model = torch.hub.load("OWNER/REPOSITORY", "tagger", "experiments/mine/latest")
    probabilities = model.predict(waveform)  # (B,C); floats (B,S) with full scale 1.0 at model.sample_rate
    clip, frames = model.embed(waveform)  # (B,E), (B,T',E)

Entry points are every name in `models.list_models()`, `tagger` for any value of `-m` on the command line (a name, a
checkpoint, a run's or Hugging Face folder), and `ssondo` (see `models.get_ssondo`).
"""

import importlib as _importlib
import sys as _sys
import warnings as _warnings
from importlib.machinery import PathFinder as _PathFinder
from pathlib import Path as _Path

dependencies = ["torch", "numpy", "safetensors"]

_ROOT = _Path(__file__).resolve().parent
_PACKAGES = ("common", "models")  # packages of this project that are imported


def _is_ours(path):
    return path is not None and _Path(path).resolve().is_relative_to(_ROOT)


def _find_package(name, path):
    """Return the location of a package of that name, or None; folders without Python files do not count."""
    spec = _PathFinder.find_spec(name, path)
    if spec is None or spec.origin is not None:
        return spec and spec.origin
    folders = map(_Path, spec.submodule_search_locations or ())
    return next((str(folder) for folder in folders if any(folder.glob("*.py"))), None)


def _import_models():
    """Import this project's packages; warn of a user's packages of the same names.

    The project's folder is then moved to the end of `sys.path`, after the user's packages: loader workers and the
    project's other packages are imported from there.

    Raises:
        ImportError: another package of one of the names is imported already.
    """
    for name in _PACKAGES:
        module = _sys.modules.get(name)
        found = None if module is None else getattr(module, "__file__", None) or next(iter(module.__path__), None)
        if module is not None and not _is_ours(found):
            raise ImportError(
                f"the package {name!r} of {found} is imported already, and this project, {_ROOT}, has one of the same "
                "name: load the model in a separate process, or rename yours"
            )
    others = [entry for entry in _sys.path if not _is_ours(entry or ".")]
    hidden = [place for name in _PACKAGES if (place := _find_package(name, others)) is not None]
    if hidden:
        _warnings.warn(
            f"from now on `import {' or '.join(_PACKAGES)}` imports the packages of {_ROOT}, and no longer "
            f"{' and '.join(hidden)}: load the model in a separate process where you need those, or rename them",
            stacklevel=2,
        )
    _sys.path.insert(0, str(_ROOT))
    try:
        return _importlib.import_module("models")
    finally:
        _sys.path.remove(str(_ROOT))
        if _sys.path[-1:] != [str(_ROOT)]:  # the hub removes its own entry afterwards, which may be the same
            _sys.path.append(str(_ROOT))


_models = _import_models()


def tagger(checkpoint, head=None, **settings):
    """Load any model, as `-m CHECKPOINT --head HEAD` does on the command line.

    Args:
        checkpoint: a name in `torch.hub.list`, a checkpoint, or a run's or Hugging Face folder.
        head: a name in heads/ or a head's file, to be attached to the model.
        **settings: see `models.load_tagger`: weights, device, num_classes, labels, ...

    Returns:
        The model, in evaluation mode.
    """
    return _models.load_tagger(checkpoint, head=head, **settings)


def ssondo(*arguments, **settings):
    """Load a model that embeds waveforms of any length, or tags them with a head; see `models.get_ssondo`."""
    return _models.get_ssondo(*arguments, **settings)


def _entry_point(name):
    published = _models.get_model_entry(name).weights

    def load(pretrained=published is not None, *, weights=None, device="cpu", **settings):
        if pretrained or weights is not None:
            return _models.load_model(name, weights=weights, device=device, **settings)
        return _models.create_model(name, **settings).to(device).eval()

    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"""{name}, in evaluation mode.

    Args:
        pretrained: load the published weights, which are downloaded once and cached; else the weights are random. By
            default {published is not None}: there are {"published weights" if published else "none"}.
        weights: file or URL of other weights.
        device: of the model.
        **settings: num_classes, labels, activation, and settings of the network; see `models.create_model`.
    """
    return load


globals().update({_name: _entry_point(_name) for _name in _models.list_models()})
