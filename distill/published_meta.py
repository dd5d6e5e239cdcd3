"""Read the pickled `meta.pt` of a published soft-target folder without executing it.

The published file is a `torch.save` of pickled modules. Unpickling can call any function, so this reader
replaces the classes of published stores with records of their attributes, allows standard containers, and rejects any
other name.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from common.errors import UserError


class _Record:
    """The attributes of an object of a known class."""

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


def _ignore(*_: Any, **__: Any) -> None:
    """Replaces tensors inside distributions, whose values replay does not need."""


_REPLACEMENTS: dict[tuple[str, str], Any] = {
    ("torch.nn.modules.container", "Sequential"): _Record,
    ("torch_audiomentations.core.composition", "Compose"): _Record,
    ("torch_audiomentations.augmentations.shift", "Shift"): _Shift,
    ("augment", "TimeMasking"): _TimeMasking,
    ("augment", "FrequencyMasking"): _FrequencyMasking,
    ("utils", "KwargsSequential"): _Record,
    ("utils", "Config"): _Record,
    ("torch.distributions.bernoulli", "Bernoulli"): _Record,
    ("torch._utils", "_rebuild_tensor_v2"): _ignore,
    ("torch", "FloatStorage"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _REPLACEMENTS[module, name]
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
        `logitconfig/` file of the store.

    Raises:
        UserError: the file is not such an archive, or contains a class that published stores do not use.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            [member] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(member)
        meta = _PlainUnpickler(io.BytesIO(content)).load()
        wave = [_read_shift(m) for m in _list_modules(meta["wavtransforms"])]
        spec = [_read_mask(m) for m in _list_modules(meta["spectransforms"])]
        config = dict(meta["config"].attributes)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains {error}, which is not a class of published soft-target folders, so it was not "
            "read; replace it with a meta.json with the transforms, or save the targets again"
        ) from None
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is not a meta.pt of a published soft-target folder ({type(error).__name__}: {error}); "
            "download it again, or save the targets again"
        ) from None
    return {"wavtransforms": dict(wave), "spectransforms": spec, "config": config}


def _list_modules(container: _Record) -> list[_Record]:
    return list(container.attributes["_modules"].values())


def _read_shift(record: _Record) -> tuple[str, dict[str, Any]]:
    if not isinstance(record, _Shift):
        raise TypeError("expected Shift as waveform transform")
    state = record.attributes
    if state.get("shift_unit", "fraction") != "fraction" or not state.get("rollover", True):
        raise ValueError("expected Shift in fractions, with rollover")
    return "Shift", {"min_shift": state["min_shift"], "max_shift": state["max_shift"], "p": state["_p"]}


def _read_mask(record: _Record) -> dict[str, dict[str, Any]]:
    if isinstance(record, _TimeMasking):
        return {"TimeMasking": {"time_mask_param": record.attributes["mask_param"]}}
    if isinstance(record, _FrequencyMasking):
        return {"FrequencyMasking": {"freq_mask_param": record.attributes["mask_param"]}}
    raise TypeError("expected TimeMasking or FrequencyMasking as spectrogram transform")
