"""Read the pickled `meta.pt` of a published soft-target folder without executing it.

The published file is a `torch.save` of pickled modules. Unpickling can call any function, so this reader
replaces the classes of published stores with records of their attributes, allows standard containers, and rejects any
other name.
"""

import io
import math
from pathlib import Path
from typing import Any

from common.archives import StoredArchive
from common.errors import UserError
from common.parsing import check_regular_file
from common.pickles import ForeignObjectError, PlainUnpickler, Record, build_dict, build_set, check_expansion


class _Shift(Record):
    pass


class _TimeMasking(Record):
    pass


class _FrequencyMasking(Record):
    pass


def _ignore(*_: Any, **__: Any) -> None:
    """Replaces tensors inside distributions, whose values replay does not need."""


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch.nn.modules.container", "Sequential"): Record,
    ("torch_audiomentations.core.composition", "Compose"): Record,
    ("torch_audiomentations.augmentations.shift", "Shift"): _Shift,
    ("augment", "TimeMasking"): _TimeMasking,
    ("augment", "FrequencyMasking"): _FrequencyMasking,
    ("utils", "KwargsSequential"): Record,
    ("utils", "Config"): Record,
    ("torch.distributions.bernoulli", "Bernoulli"): Record,
    ("torch._utils", "_rebuild_tensor_v2"): _ignore,
    ("torch", "FloatStorage"): Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): build_dict,
    ("__builtin__", "set"): build_set,
    ("builtins", "set"): build_set,
}


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
    check_regular_file(path)
    try:
        with open(path, "rb") as file:
            archive = StoredArchive(file, path.stat().st_size)
            content = archive.read(archive.find("/data.pkl") or "data.pkl")
        meta = PlainUnpickler(io.BytesIO(content), _FUNCTIONS).load()
        check_expansion(meta, len(content))
        wave = [_read_shift(m) for m in _list_modules(meta["wavtransforms"])]
        spec = [_read_mask(m) for m in _list_modules(meta["spectransforms"])]
        config = {str(key): value for key, value in meta["config"].attributes.items()}
    except ForeignObjectError as error:
        raise UserError(
            f"{path} contains {error}, which is not a class of published soft-target folders, so it was not "
            "read; replace it with a meta.json with the transforms, or save the targets again"
        ) from None
    except Exception as error:  # of any type, for what is no such pickle
        raise UserError(
            f"{path} is not a meta.pt of a published soft-target folder ({type(error).__name__}: {error!s:.200}); "
            "download it again, or save the targets again"
        ) from None
    return {"wavtransforms": dict(wave), "spectransforms": spec, "config": config}


def _list_modules(container: Record) -> list[Record]:
    return list(container.attributes["_modules"].values())


def _check_number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"expected a number, found a {type(value).__name__}")
    return value


def _read_shift(record: Record) -> tuple[str, dict[str, Any]]:
    if not isinstance(record, _Shift):
        raise TypeError("expected Shift as waveform transform")
    state = record.attributes
    if state.get("shift_unit", "fraction") != "fraction" or not state.get("rollover", True):
        raise ValueError("expected Shift in fractions, with rollover")
    names = {"min_shift": "min_shift", "max_shift": "max_shift", "p": "_p"}
    return "Shift", {name: _check_number(state[key]) for name, key in names.items()}


def _read_mask(record: Record) -> dict[str, dict[str, Any]]:
    if isinstance(record, _TimeMasking):
        return {"TimeMasking": {"time_mask_param": _check_number(record.attributes["mask_param"])}}
    if isinstance(record, _FrequencyMasking):
        return {"FrequencyMasking": {"freq_mask_param": _check_number(record.attributes["mask_param"])}}
    raise TypeError("expected TimeMasking or FrequencyMasking as spectrogram transform")
