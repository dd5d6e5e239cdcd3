"""Check packs, stores of targets, runs and models for damage.

    python scripts/check_pack.py data/mine/labels/train.tsv logits/mine/train/chunk_10 experiments/own_teacher/latest

Each PATH is a packed list (TSV) or a shard (.h5): every clip is compared with its checksum; the folder of a store: all
values are read and checked; a run's folder: its states and checkpoints; a checkpoint, a .safetensors or .ceq file or a
Hugging Face folder. Prints one line for each, and what is damaged. The exit status is 1 if anything is, and 2 for
paths of other kinds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from audio.dataset import Pack
from audio.manifest import read_manifest
from audio.shards import Shard
from common.errors import Faults, UserError, some
from common.options import Options, parse_arguments
from common.progress import create_progress
from distill.embeddings import EmbeddingStore
from distill.store import TargetStore
from distill.targets import SoftTargetStore
from models.packed import PACKED
from models.weight_sources import read_weights
from training.states import States


class CheckOptions(Options):
    """The options of check_pack.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("paths",)

    paths: list[str] = Field([])  # packed lists, shards, stores, runs, checkpoints and Hugging Face folders

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence where nothing is given."""
        if not self.paths:
            yield "give the paths to check"


def check_pack(path: Path) -> str:
    """Compare all clips of a packed list with their checksums; return what was checked."""
    faults = Faults(str(path), limit=20)
    try:
        pack = Pack.open(path)
    except UserError as error:
        faults.add(str(error))
        for name in read_manifest(path, required=("filename", "hdf5path"))["hdf5path"].unique():
            if Path(name).is_file():  # of the other shards, too, every damaged clip is named
                with faults.noted():
                    check_shard(Path(name))
        faults.raise_if_any()
        raise
    if pack.n_missing:
        faults.add(f"{pack.n_missing} clips of the list are not in their shards")
    for number, shard in enumerate(pack.shards):
        _check_clips(shard, pack.position_of[pack.shard_of == number], faults)
    faults.raise_if_any()
    return f"{len(pack)} clips in {len(pack.shards)} shards{_describe_missing_checksums(pack.shards)}"


def check_shard(path: Path) -> str:
    """Compare all clips of a shard with their checksums; return what was checked."""
    shard = Shard(path)
    faults = Faults(str(path), limit=20)
    _check_clips(shard, np.arange(len(shard)), faults)
    faults.raise_if_any()
    return f"{len(shard)} clips{_describe_missing_checksums([shard])}"


def _check_clips(shard: Shard, positions: np.ndarray, faults: Faults) -> None:
    with create_progress(total=len(positions), desc=shard.path.name, unit="clip") as progress:
        for position in positions:
            with faults.noted():
                if not shard.has_checksums:
                    shard.read(int(position))  # it may be too short
                elif not shard.is_intact(int(position)):
                    faults.add(f"{shard.path}: the clip {shard.names[position]!r} is damaged")
            progress.update()


def _describe_missing_checksums(shards: Sequence[Shard]) -> str:
    without = [shard.path.name for shard in shards if not shard.has_checksums]
    return f"; {some(without)} have no checksums, so that only their structure was checked" if without else ""


def check_store(path: Path) -> str:
    """Read and check all values of a store of targets; return what was checked."""
    kind: type[TargetStore] = EmbeddingStore if any(path.glob(f"{EmbeddingStore.prefix}_ep*")) else SoftTargetStore
    store = kind(path)
    faults = Faults(str(path), limit=20)
    n_rows = 0
    for epoch in store.epochs:
        with faults.noted():
            store.read_arrays(epoch)
            n_rows += len(store.read_rows(epoch))
    faults.raise_if_any()
    return f"{n_rows} chunks of {len(store.epochs)} epochs"


def check_run(path: Path) -> str:
    """Check the states and checkpoints of a run; return what was checked."""
    faults = Faults(str(path), limit=20)
    checkpoints = sorted(path.glob("*.pt"))
    for checkpoint in checkpoints:
        with faults.noted():
            check_model(checkpoint)
    states = sorted((path / "states").glob("step=*.pt"))
    for state in states:
        with faults.noted():
            States(path / "states").check(state)
    faults.raise_if_any()
    return f"{len(checkpoints)} checkpoints, {len(states)} states"


def check_model(path: Path) -> str:
    """Read a checkpoint or a Hugging Face folder, and check that its values are finite; return what was checked."""
    state, _ = read_weights(path)
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise UserError(f"{path}: {some(bad)} have values that are not finite")
    return f"{len(state)} tensors"


def choose_check(path: Path) -> tuple[str, Callable[[Path], str]] | None:
    """Return what a path is, and the function that checks it; None if it is none of the kinds that can be checked."""
    if path.is_dir():
        if any(path.glob("*_ep*_*.h5")):
            return "store", check_store
        if (path / "run.json").is_file():
            return "run", check_run
        is_model = (path / "config.json").is_file() or any(path.glob("*.pt"))
    else:
        is_model = path.suffix.lower() in (".pt", ".pth", ".ckpt", ".safetensors", PACKED)
        if path.suffix.lower() == ".tsv":
            return "pack", check_pack
        if path.suffix.lower() in (".h5", ".hdf5"):
            return "shard", check_shard
    return ("model", check_model) if is_model else None


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Check all paths, and print a line for each."""
    options = parse_arguments(CheckOptions, __doc__, arguments)
    paths = [Path(path) for path in options.paths]
    for folder in [path for path in paths if path.is_dir() and choose_check(path) is None]:  # OUTDIR of the packer
        place = paths.index(folder)
        paths[place : place + 1] = sorted(folder.glob("labels/*.tsv")) or [folder]
    status = 0
    for path in paths:
        chosen = choose_check(path) if path.exists() else None
        if chosen is None:
            status = max(status, 2)
            found = "is nothing that can be checked" if path.exists() else "does not exist"
            print(f"{path} {found}; expected a packed list, a shard, a store, a run or a model")
            continue
        kind, check = chosen
        try:
            print(f"{path}: {kind} intact ({check(path)})")
        except UserError as error:
            status = 1
            print(f"{path}: DAMAGED, or no {kind}\n{error}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
