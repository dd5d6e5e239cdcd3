"""Soft targets in the layout of CED's own code: base names, its columns, and a `meta.pt`.

That code expects, in one folder,

- `logits_ep{E}_{R}.h5` with `topk_values` float16 (N, K), `topk_indexes` int16 (N, K) and `seeds` int32 (N,), and
  beside it a `.parquet` with `filename` (without folders: clips of a pack are found by base name), `start` and
  `end` (float32 seconds), row by row; the pack has one dataset a clip at 16 kHz, under that base name
  (`scripts/wavlist_to_hdf5.py --layout published`);
- `meta.pt`, a `torch.save` of {"wavtransforms", "spectransforms", "config"}: the transforms are modules, whose
  classes the pickle names: `torch_audiomentations...Shift` inside `torch.nn.Sequential`,
  `TimeMasking` and `FrequencyMasking` of CED's module `augment` inside `KwargsSequential` of its module `utils`, and
  `utils.Config`.

The pickle is written opcode by opcode, without these packages. Reading it with CED's code requires them (its folder on
the path, torch_audiomentations installed) and a `torch.load` that builds any object, the default before PyTorch 2.6.
`distill.published_meta` reads it without them. The layout has no place for the hashes that `distill.sound_check`
compares.
"""

import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from audio.dataset import Pack
from common.errors import Faults, some
from common.files import whole_file
from distill.replay import REFERENCE_RATE, FrequencyMasking, Replay, Shift, TimeMasking

PUBLISHED_KEYS = (
    *("train_data", "model", "outputpath", "model_args", "chunk_length", "num_workers", "epochs", "batch_size", "topk"),
    *("mode", "spectransforms", "wavtransforms"),
)


def check_published(replay: Replay, pack: Pack, faults: Faults) -> None:
    """Add settings that the published layout cannot represent to `faults`."""
    if pack.sample_rate != REFERENCE_RATE:
        faults.add(f"{pack.manifest} has {pack.sample_rate} Hz; CED's code expects {REFERENCE_RATE} Hz")
    repeated = [name for name, n in Counter(Path(name).name for name in pack.names).items() if n > 1]
    if repeated:
        faults.add(
            f"{len(repeated)} base names of {pack.manifest} belong to several clips ({some(repeated)}), but CED's "
            "code finds clips by base name; rename these files and pack them again"
        )
    if replay.mask_fill != "0dB":
        faults.add(f"mask_fill {replay.mask_fill} is not supported by CED's code; expected 0dB")
    if any(getattr(mask, "max_share", None) is not None for mask in replay.masks):
        faults.add("max_share of masks is not supported by CED's code; remove it from spectransforms")


def convert_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a store in the published layout."""
    seconds = {key: rows[key].to_numpy(np.float32) for key in ("start", "end")}
    return pd.DataFrame({"filename": [Path(name).name for name in rows["filename"]], **seconds})


def write_published_meta(path: Path, replay: Replay, config: Mapping[str, Any]) -> None:
    """Write `meta.pt`, atomically.

    Args:
        path: the file.
        replay: the augmentation.
        config: settings of the store; `PUBLISHED_KEYS` are written.
    """
    storages: list[float] = []
    meta = {
        "wavtransforms": _build_sequential(
            _Global("torch.nn.modules.container", "Sequential"),
            [_build_shift(Shift(**(arguments or {})), storages) for arguments in replay.wavtransforms.values()],
        ),
        "spectransforms": _build_sequential(_Global("utils", "KwargsSequential"), list(map(_build_mask, replay.masks))),
        "config": _Object(_Global("utils", "Config"), {key: config[key] for key in PUBLISHED_KEYS}),
    }
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("meta/data.pkl", dump(meta))
        archive.writestr("meta/byteorder", "little")
        for number, value in enumerate(storages):
            archive.writestr(f"meta/data/{number}", struct.pack("<f", value))
        archive.writestr("meta/version", "3\n")


def _build_sequential(kind: "_Global", modules: list["_Object"]) -> "_Object":
    children = {str(number): module for number, module in enumerate(modules)}
    return _Object(kind, _get_module_state() | {"_modules": children})


def _get_module_state() -> dict[str, Any]:
    return dict(torch.nn.Module().__dict__)


def _build_shift(shift: Shift, storages: list[float]) -> "_Object":
    storages.append(shift.p)
    state = {
        **{"mode": "per_example", "_p": shift.p, "p_mode": "per_example", "sample_rate": None, "target_rate": None},
        **{"output_type": "tensor", "transform_parameters": {}, "are_parameters_frozen": False},
        "bernoulli_distribution": _build_bernoulli(len(storages) - 1),
        **{"min_shift": shift.min_shift, "max_shift": shift.max_shift, "shift_unit": "fraction", "rollover": True},
    }
    return _Object(_Global("torch_audiomentations.augmentations.shift", "Shift"), _get_module_state() | state)


def _build_bernoulli(number: int) -> "_Object":
    """Return the distribution for `p`, whose value is the tensor in storage `number`."""
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    no_hooks = _Call(_Global("collections", "OrderedDict"), ())
    probability = _Call(rebuild, (_Storage(str(number), 1), 0, (), (), False, no_hooks))
    no_size = _Call(_Global("torch", "Size"), ((),))
    state = {"probs": probability, "_param": probability, "_batch_shape": no_size, "_event_shape": no_size}
    return _Object(_Global("torch.distributions.bernoulli", "Bernoulli"), state)


def _build_mask(mask: Any) -> "_Object":
    kinds = {TimeMasking: ("TimeMasking", 2), FrequencyMasking: ("FrequencyMasking", 1)}
    name, axis = kinds[type(mask)]
    state = {"mask_param": mask.param, "axis": axis, "iid_masks": False, "p": 1.0}
    return _Object(_Global("augment", name), _get_module_state() | state)


# --- Pickling of objects whose classes are not installed (protocol 2, no memo) ---


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True)
class _Object:
    """An object built from its attributes, without its constructor."""

    kind: _Global
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    function: _Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Storage:
    """The float32 values of a tensor, in a separate file of the archive."""

    key: str
    n_values: int


def dump(value: Any) -> bytes:
    """Pickle plain values, `_Object`, `_Call` and `_Storage`.

    Raises:
        TypeError: any other type.
    """
    return pickle.PROTO + b"\x02" + _encode(value) + pickle.STOP


def _encode(value: Any) -> bytes:
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.LONG1 + bytes([len(encoded := pickle.encode_long(value))]) + encoded
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            encoded = value.encode("utf-8")
            return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
        case tuple():
            return pickle.MARK + b"".join(map(_encode, value)) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_encode, value)) + pickle.APPENDS
        case set():
            return _encode(_Call(_Global("builtins", "set"), (list(value),)))
        case _Global(module, name):
            return pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case _Object(kind, state):
            return _encode(kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + _encode(dict(state)) + pickle.BUILD
        case _Call(function, arguments):
            return _encode(function) + _encode(arguments) + pickle.REDUCE
        case _Storage(key, n_values):
            kind = _Global("torch", "FloatStorage")
            return _encode(("storage", kind, key, "cpu", n_values)) + pickle.BINPERSID
        case Mapping():  # also OrderedDict: the hooks of a module, always empty
            pairs = b"".join(_encode(key) + _encode(item) for key, item in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS
    raise TypeError(f"{type(value).__name__} cannot be pickled")
