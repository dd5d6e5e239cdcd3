"""Changes of HDF5 files, as a stranger may make them."""

import resource
from pathlib import Path
from typing import Any

import h5py


def peak_mb() -> float:
    """The highest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def replace_dataset(path: Path, name: str, **arguments: Any) -> None:
    """Put another dataset in the place of one; arguments as of `create_dataset`."""
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, **arguments)


def link_dataset(path: Path, name: str, link: Any) -> None:
    """Put a link in the place of a dataset."""
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = link


def make_virtual(path: Path, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Put a dataset whose values are in another file, `other.h5`, in the place of one."""
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other.create_dataset("x", shape, kind)
    layout = h5py.VirtualLayout(shape, kind)
    layout[:] = h5py.VirtualSource("other.h5", "x", shape)
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_virtual_dataset(name, layout)
