"""Read the pickled `meta.pt` of a published soft-target folder without executing it.

The published file is a `torch.save` of pickled modules. A pickle can name any function and have it called, so this
reader builds nothing: the class names known from published stores become plain records of their attributes, harmless
containers become plain containers, and any other name is refused by that name.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from common.errors import UserError


class _Record:
    """A placeholder for an object of a known class: has its attributes and runs no code."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Shift(_Record):
    pass


class _TimeMasking(_Record):
    pass


class _FrequencyMasking(_Record):
    pass


def _nothing(*_: Any, **__: Any) -> None:
    """A placeholder for the tensors inside distributions, whose values replay does not need."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch.nn.modules.container", "Sequential"): _Record,
    ("torch_audiomentations.core.composition", "Compose"): _Record,
    ("torch_audiomentations.augmentations.shift", "Shift"): _Shift,
    ("augment", "TimeMasking"): _TimeMasking,
    ("augment", "FrequencyMasking"): _FrequencyMasking,
    ("utils", "KwargsSequential"): _Record,
    ("utils", "Config"): _Record,
    ("torch.distributions.bernoulli", "Bernoulli"): _Record,
    ("torch._utils", "_rebuild_tensor_v2"): _nothing,
    ("torch", "FloatStorage"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> None:
        return None


def read_published_meta(path: str | Path) -> dict[str, Any]:
    """Return the settings in a published `meta.pt` as plain values.

    Args:
        path: the file, a zip archive as `torch.save` writes it.

    Returns:
        `wavtransforms` {name: arguments}, `spectransforms` [{name: arguments}], and `config`, the keys of the
        `logitconfig/` file it was made from.

    Raises:
        UserError: the file is not such an archive, or names a class that published stores do not use.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            [member] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(member)
        meta = _PlainUnpickler(io.BytesIO(content)).load()
        wave = [_shift_settings(m) for m in _modules(meta["wavtransforms"])]
        spec = [_mask_settings(m) for m in _modules(meta["spectransforms"])]
        config = dict(meta["config"].attributes)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} names {error}, which is not among the classes that published soft-target folders hold, so it was "
            "not opened any further; write a meta.json with the transforms in its place, or save the targets anew"
        ) from None
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is not a meta.pt as published soft-target folders hold it ({type(error).__name__}: {error}); "
            "download it again, or save the targets anew"
        ) from None
    return {"wavtransforms": dict(wave), "spectransforms": spec, "config": config}


def _modules(container: _Record) -> list[_Record]:
    return list(container.attributes["_modules"].values())


def _shift_settings(record: _Record) -> tuple[str, dict[str, Any]]:
    if not isinstance(record, _Shift):
        raise TypeError("a waveform transform that is not Shift")
    saved = record.attributes
    if saved.get("shift_unit", "fraction") != "fraction" or not saved.get("rollover", True):
        raise ValueError("Shift in another unit than fractions, or without rollover")
    return "Shift", {"min_shift": saved["min_shift"], "max_shift": saved["max_shift"], "p": saved["_p"]}


def _mask_settings(record: _Record) -> dict[str, dict[str, Any]]:
    if isinstance(record, _TimeMasking):
        return {"TimeMasking": {"time_mask_param": record.attributes["mask_param"]}}
    if isinstance(record, _FrequencyMasking):
        return {"FrequencyMasking": {"freq_mask_param": record.attributes["mask_param"]}}
    raise TypeError("a spectrogram transform that is neither TimeMasking nor FrequencyMasking")
