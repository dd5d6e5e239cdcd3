"""A pack that is being made: its finished shards, which the next start goes on from, and the change to the new pack.

While a pack is made, everything is in HDF5_FOLDER/.NAME.packing/: `settings.json`; NAME_0.h5 ...; and beside each shard
NAME_0.json ..., which is written last. A shard counts if its record is there, the settings are the same, and none of
its source files has changed.

The new pack takes the place of an earlier one in one rename, that of the manifest: it first names the shards in this
folder. Only then are they linked to their final names, and named by these. At each moment the manifest names shards
that belong to it; a start that finds it in between completes this first.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from audio.pack_report import Report
from common.files import remove_dead_partials, whole_file, write_json
from common.locks import lock_folder
from common.parsing import load_json


@dataclass(frozen=True)
class FinishedShard:
    """The record of a shard.

    Attributes:
        stop: number of listed files that this shard and those before it account for.
        sources: hash of the sizes and times of the shard's source files.
        n_bytes: size of the shard.
        lengths: row of the list → samples, of its clips in order.
        report: of everything up to `stop`.
    """

    stop: int
    sources: str
    n_bytes: int
    lengths: dict[int, int]
    report: Report

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "FinishedShard":
        """Restore a record."""
        lengths = {int(row): n for row, n in content["lengths"].items()}
        return cls(**content | {"lengths": lengths, "report": Report.from_state(content["report"])})


class PackProgress:
    """The folder of a pack that is being made.

    Args:
        folder: where its shards are put in the end.
        name: of the pack.
        settings: plain values that its shards depend on.
        sources: the listed files.

    Attributes:
        finished: the shards so far, those of earlier starts included.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], sources: Sequence[Path]) -> None:
        self.folder, self.name, self.sources = get_progress_folder(folder, name), name, sources
        remove_dead_partials(self.folder)
        path = self.folder / "settings.json"
        try:
            is_same = load_json(path) == settings
        except (OSError, ValueError):
            is_same = False
        if not is_same:
            self._remove_from(0)
            write_json(path, settings)
        self.finished = list(self._restore())
        self._remove_from(len(self.finished))

    @property
    def n_done(self) -> int:
        """Number of listed files that the finished shards account for."""
        return self.finished[-1].stop if self.finished else 0

    @property
    def next_path(self) -> Path:
        """Path of the shard to be written next."""
        return self.shard_path(len(self.finished))

    def shard_path(self, number: int) -> Path:
        """Return the path of a shard in this folder."""
        return self.folder / f"{self.name}_{number}.h5"

    def final_path(self, number: int) -> Path:
        """Return the path that a shard has in the end."""
        return self.folder.parent / f"{self.name}_{number}.h5"

    def record(self, stop: int, lengths: dict[int, int], report: Report) -> None:
        """Record the next shard, which has just been written; see `FinishedShard`."""
        path = self.next_path
        sources = _hash_status(self.sources[self.n_done : stop])
        shard = FinishedShard(stop, sources, path.stat().st_size, lengths, report)
        write_json(path.with_suffix(".json"), vars(shard) | {"report": report.as_state()})
        self.finished.append(shard)

    def publish(self, write_manifest: Callable[[list[Path]], None]) -> list[Path]:
        """Move the shards to their final names, and write the manifest.

        Args:
            write_manifest: writes the manifest with the given paths of the shards, atomically.

        Returns:
            The final paths.
        """
        numbers = range(len(self.finished))
        final = [self.final_path(number) for number in numbers]
        if any(path.exists() for path in final):  # of an earlier pack, whose manifest names them
            write_manifest([self._find(number) for number in numbers])
        for number in numbers:
            _move_out(self.shard_path(number), final[number])
        write_manifest(final)
        further = itertools.takewhile(Path.exists, map(self.final_path, itertools.count(len(final))))
        for old in reversed(list(further)):  # of an earlier, larger pack; the last one first, so that no gap remains
            old.unlink()
        return final

    def remove(self) -> None:
        """Mark the folder to be removed by `lock_pack`: without the settings the rest does not count."""
        (self.folder / "settings.json").unlink(missing_ok=True)

    def _find(self, number: int) -> Path:
        staged = self.shard_path(number)
        return staged if staged.exists() else self.final_path(number)  # moved by a start that was killed then

    def _restore(self) -> Iterator[FinishedShard]:
        """Yield the shards that still count."""
        first = 0
        for number in itertools.count():
            try:
                record = self.shard_path(number).with_suffix(".json").read_text(encoding="utf-8")
                shard = FinishedShard.from_json(json.loads(record))
                if self._find(number).stat().st_size != shard.n_bytes:
                    return
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return
            if _hash_status(self.sources[first : shard.stop]) != shard.sources:
                return
            yield shard
            first = shard.stop

    def _remove_from(self, first: int) -> None:
        """Remove shard `first` and all after it."""
        for path in list(self.folder.iterdir()):
            number = path.stem.rpartition("_")[2]
            if path.suffix in (".h5", ".json", ".link") and number.isdecimal() and int(number) >= first:
                path.unlink()


def complete_publishing(manifest: Path, folder: Path) -> None:
    """Let a manifest that names shards in a progress folder name them in the folder above, where they are put.

    Args:
        manifest: of the pack; it may not exist.
        folder: the progress folder.
    """
    if not manifest.is_file():
        return
    table = pd.read_csv(manifest, sep="\t", dtype=str, keep_default_na=False)
    if "hdf5path" not in table:
        return
    final = {path: path.parent.parent / path.name for path in map(Path, table["hdf5path"].unique())}
    final = {path: moved for path, moved in final.items() if path.parent.name == folder.name}
    for path, moved in final.items():
        _move_out(folder / path.name, folder.parent / moved.name)
    if final:
        names = {str(path): str(moved) for path, moved in final.items()}
        table["hdf5path"] = table["hdf5path"].replace(names)
        with whole_file(manifest) as file:
            table.to_csv(file, sep="\t", index=False)


def _move_out(staged: Path, final: Path) -> None:
    """Give a shard its final name, and keep that in the progress folder where the file system has links."""
    if not staged.exists():
        return
    link = staged.with_suffix(".link")
    link.unlink(missing_ok=True)
    with suppress(OSError):  # a file system without links: a reader sees a missing shard for a moment
        os.link(staged, link)
    os.replace(link if link.exists() else staged, final)


def get_progress_folder(folder: Path, name: str) -> Path:
    """Return the folder in which the shards of a pack are made."""
    return folder / f".{name}.packing"


@contextmanager
def lock_pack(folder: Path, name: str) -> Iterator[None]:
    """Lock the name of a pack in a folder of shards; folders that are created for nothing are removed in the end.

    Raises:
        UserError: another process is making a pack of this name there.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    progress = get_progress_folder(folder, name)
    busy = f"{folder / name}_*.h5 are being packed by another process: wait for its end, or give another --name"
    try:
        with lock_folder(progress, busy):
            try:
                yield
            finally:
                if not (progress / "settings.json").exists():
                    shutil.rmtree(progress, ignore_errors=True)
    finally:
        for path in missing:
            with suppress(OSError):  # it has files
                path.rmdir()


def _hash_status(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # it does not exist, or cannot be named
            digest.update(b"missing\n")
    return digest.hexdigest()
