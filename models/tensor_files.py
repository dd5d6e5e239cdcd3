"""Reading of files of tensors: those of `torch.save` in both of its formats, safetensors, and quantized models.

A file may come from a stranger: pickles are read by `common.pickles`, no tensor is larger than what the file holds of
it, and the checksums of an archive, which `torch.load` leaves out, are verified. What is no such file, is damaged or
contains other objects is reported in one sentence.
"""

import io
import math
import mmap
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.archives import StoredArchive
from common.errors import UserError
from common.parsing import check_regular_file
from common.pickles import ForeignObjectError, PlainUnpickler, build_set, check_expansion, check_key
from models.packed import PACKED, read_packed
from models.source_errors import describe_kind

_ARCHIVE = b"PK\x03\x04"
_MAX_AXES = 16
_MAX_EXPANDED = 1 << 18  # values of a tensor that repeats those of its storage
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before 1.6
_DTYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    "Bool": torch.bool,
}
_DTYPE_NAMES = (*map(str, _DTYPES.values()), "torch.float8_e4m3fn", "torch.float8_e5m2", "torch.uint16", "torch.uint32")


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of tensors and plain values.

    Args:
        path: a file of `torch.save`, of safetensors if `.safetensors` is among its suffixes, or of `models.packed`.

    Returns:
        Its content, with names that are text.

    Raises:
        UserError: it cannot be read, is damaged, or contains other objects.
    """
    path = Path(path)
    check_regular_file(path)
    try:
        content = _read(path)
    except UserError:
        raise
    except ForeignObjectError as error:
        raise UserError(
            f"{path}: contains more than tensors and plain values ({error}). Pickled code is never executed: save the "
            "state dict alone, with torch.save(model.state_dict(), PATH), where the model was trained"
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: its {path.stat().st_size} bytes do not fit into memory") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # of any type, for files of another kind
        if kind := describe_kind(path):
            raise UserError(
                f"{path} is {kind}, not a checkpoint; give a name, a .pt or .safetensors file, or a run's folder"
            ) from error
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({_describe(error)}); is the file complete? Copy or download it "
            "again"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        kind = "names that are no text" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{path}: found {kind}; expected a state dict, or one under 'model'")
    return dict(content)


def _describe(error: Exception) -> str:
    """Return the first line of an error's message, cut, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines and not isinstance(error, KeyError | struct.error) else type(error).__name__


def _read(path: Path) -> Any:
    if PACKED in path.suffixes:
        return read_packed(path)
    return dict(load_file(path)) if ".safetensors" in path.suffixes else _read_torch(path)


def _read_torch(path: Path) -> Any:
    with open(path, "rb") as file:
        n_bytes = path.stat().st_size
        if file.read(len(_ARCHIVE)) == _ARCHIVE:
            return _read_archive(file, n_bytes)
        if n_bytes == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_legacy(mapped)


class _Storages:
    """The storages that a pickle describes: key -> their values, (n,), of the type of its tensors.

    Args:
        n_bytes: what all of them may have together.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_remaining = n_bytes
        self.values: dict[str, Tensor] = {}

    def get(self, pid: Any) -> Tensor:
        """Return the values of a storage, allocated once and not yet read."""
        kind, dtype, key, _, n_values, *views = pid
        if kind not in ("storage", b"storage") or not isinstance(dtype, torch.dtype) or any(views):
            raise ValueError("a storage is described in another way")
        key = key.decode() if isinstance(key, bytes) else str(key)
        if key in self.values:
            values = self.values[key]
            if values.dtype != dtype or len(values) != n_values:
                raise ValueError(f"storage {key} is described twice, differently")
            return values
        if type(n_values) is not int or not 0 <= n_values * dtype.itemsize <= self.n_remaining:
            raise ValueError(f"a storage of {n_values} values is larger than the file")
        self.n_remaining -= n_values * dtype.itemsize
        self.values[key] = torch.empty(n_values, dtype=dtype)
        return self.values[key]


def _get_memory(values: Tensor) -> memoryview:
    """Return the memory of values (n,) as bytes."""
    return memoryview(cast(Any, values.view(torch.uint8).numpy()))


def _read_archive(file: IO[bytes], n_bytes: int) -> Any:
    archive = StoredArchive(file, n_bytes)
    member = archive.find("/data.pkl")
    if member is None or archive.find("/constants.pkl"):
        kind = "a TorchScript program" if member else "a zip archive of another kind"
        raise ValueError(f"it is {kind}; expected the state dict, saved by torch.save")
    folder = member.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.members and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    storages = _Storages(n_bytes)
    content = _read_pickle(io.BytesIO(archive.read(member)), storages, archive.members[member].file_size)
    for key, values in storages.values.items():
        archive.read_into(f"{folder}data/{key}", _get_memory(values))
    return content


def _read_legacy(file: mmap.mmap) -> Any:
    """Read the format before PyTorch 1.6: five pickles, then each storage behind the number of its values."""
    if PlainUnpickler(file, {}).load() != _LEGACY_MAGIC:
        raise ValueError("it does not begin as torch.save writes it")
    for _ in range(2):  # the version of the format, and what kind of machine wrote it
        PlainUnpickler(file, {}).load()
    storages = _Storages(len(file))
    content = _read_pickle(file, storages, len(file))
    keys = [key.decode() if isinstance(key, bytes) else key for key in PlainUnpickler(file, {}).load()]
    if sorted(keys) != sorted(storages.values):
        raise ValueError("its storages are not those of its description")
    for key in keys:
        values = storages.values[key]
        if struct.unpack("<q", file.read(8))[0] != len(values):
            raise ValueError(f"storage {key} has another length than in its description")
        _get_memory(values)[:] = file.read(values.nbytes)
    return content


def _read_pickle(file: Any, storages: _Storages, n_bytes: int) -> Any:
    content = PlainUnpickler(file, _FUNCTIONS, storages.get).load()
    check_expansion(content, n_bytes)
    return content


def _rebuild_tensor(values: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a tensor of a storage (n,); one that is larger than it, by strides of 0, has few values."""
    sizes, strides = [*size], [*stride]
    if not all(type(number) is int and number >= 0 for number in (offset, *sizes, *strides)):
        raise ValueError("a tensor has sizes that are no whole numbers")
    if len(sizes) != len(strides) or len(sizes) > _MAX_AXES:
        raise ValueError("a tensor has another number of sizes than of strides")
    n_values = math.prod(sizes)
    if n_values == 0:
        return values.new_empty([min(number, _MAX_EXPANDED) for number in sizes])
    last = offset + sum((number - 1) * step for number, step in zip(sizes, strides, strict=True))
    if last >= len(values) or n_values > max(len(values), _MAX_EXPANDED):
        raise ValueError(f"a tensor of {n_values} values is larger than what the file holds of it")
    return values.as_strided(sizes, strides, offset)


def _rebuild_tensor_of_bytes(values: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Return a tensor whose type is not that of its storage, as of float8; `rest` has the type in third place."""
    if not isinstance(rest[2], torch.dtype) or values.dtype != torch.uint8:
        raise ValueError("a tensor is described in another way")
    return _rebuild_tensor(values.view(rest[2]), offset, size, stride)


def _build_ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((check_key(key), value) for key, value in pairs)


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that Python 3 has pickled as text."""
    if encoding != "latin1":
        raise ValueError("bytes are described in another way")
    return text.encode("latin1")


# What stands for the names in a pickle.
_FUNCTIONS: dict[tuple[str, str], Any] = {
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name.removeprefix("torch.")): getattr(torch, name.removeprefix("torch.")) for name in _DTYPE_NAMES},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): lambda sizes=(): torch.Size(sizes),
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): _build_ordered_dict,
    ("__builtin__", "set"): build_set,
    ("builtins", "set"): build_set,
    ("_codecs", "encode"): _encode,
}
