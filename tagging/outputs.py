"""What is written of tagged files: rows and label tracks, a sound file at a time, gone on with after a stop.

Every output knows which files it holds already (`done`), so that a command given again does what is left.
"""

import errno
import glob
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import remove_dead_partials, write_text
from tagging.embeddings import is_made, is_part
from tagging.files import TaggedFile
from tagging.parts import LastOne, Output, Share, claim_folder, let_go, marks_of, take
from tagging.rows import (
    AppendedRows,
    JsonRows,
    ParquetTable,
    Place,
    describe_warnings,
    find_rows,
    form_of,
    is_hardly_begun,
    meta_of,
    open_rows,
    read_file,
)

TRACKS = "audacity"


class OwnRows(AppendedRows):
    """Rows that one process alone appends to; other processes are kept from them, see `tagging.parts.take`."""

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        take(path, share)
        super().__init__(path, form_of(path), settings)

    def close(self, paths: Iterable[Path] = ()) -> bool:
        """Flush to disk."""
        super().close()
        let_go(self.path)
        return True


class SharedRows(Output):
    """Rows of several processes, or in a form that cannot be appended to.

    Each process appends to a part of its own, TARGET.part-RANK-of-N.jsonl; the last one to finish adds all parts to the
    file wanted, in the order of the sounds.

    Args:
        path: the file wanted.
        settings: what rows are made with.
        share: this process's part.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        super().__init__()
        self.path, self.settings = path, dict(settings)
        self.last_one = LastOne(path, share)
        if path.suffix.lower() == ".parquet":
            table = ParquetTable(path, settings)
            self.done |= table.done
            self.faults |= table.faults
            self.warnings |= table.warnings
        elif path.exists() and not is_hardly_begun(path, form_of(path)):
            self._note_places(find_rows(path, form_of(path), settings)[0])
        for part in parts_of(path):
            self._note_places(_find_in_part(part, settings))
        self.part = AppendedRows(path.with_name(f"{path.name}.part-{share}.jsonl"), JsonRows(), settings)

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        if str(file.path) not in self.done:
            self.part.write(file)
            self.note(str(file.path), file.fault, describe_warnings(file.warnings))

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish this part; the last one to do so writes the file wanted."""
        self.part.close()
        with self.last_one.finish(self.faults) as everyones:
            if everyones is None:
                return False
            parts = parts_of(self.path)
            there = {name: (part, at) for part in parts for name, at in _find_in_part(part, self.settings).items()}
            target = open_rows(self.path, self.settings)
            order = (name for name in dict.fromkeys([*map(str, paths), *there]) if name in there)
            target.extend(read_file(part, name, place) for name in order for part, place in [there[name]])
            self.done |= target.done
            self.faults |= everyones
            self.warnings |= {name: place.warning for name, (_, place) in there.items() if place.warning}
            for part in parts:
                part.unlink()
                meta_of(part).unlink(missing_ok=True)  # a process may have been killed before it was there
            for partial in self.path.parent.glob(f".{glob.escape(self.path.name)}.part-*.partial"):
                partial.unlink()  # of processes that were killed
        return True

    def _note_places(self, places: Mapping[str, Place]) -> None:
        for name, place in places.items():
            self.note(name, place.fault, place.warning)


def parts_of(path: Path) -> list[Path]:
    """Find what processes have left for a file that is not joined yet."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*-of-*.jsonl"))


def _find_in_part(part: Path, settings: Mapping[str, Any]) -> dict[str, Place]:
    if not meta_of(part).exists():  # just begun by another process
        return {}
    return find_rows(part, JsonRows(), settings)[0]


class FileEach(Output):
    """A folder with a file for each sound that can be read.

    Args:
        folder: where they go, laid out as the sounds are.
        paths: all sounds.
        settings: what they are made with.
        share: this process's part of the work.
    """

    extension: str

    def __init__(self, folder: Path, paths: Iterable[Path], settings: Mapping[str, Any], share: Share) -> None:
        super().__init__()
        self.targets = beside(folder, paths, self.extension)
        self.last_one = LastOne(folder, share)
        claim_folder(folder, settings)
        for parent in {folder, *(target.parent for target in self.targets.values())}:
            remove_dead_partials(parent)
        self.done = {name for name, target in self.targets.items() if os.path.exists(target)}  # whatever its length

    def write(self, file: TaggedFile) -> None:
        """Make a sound's file, unless it is there or the sound cannot be read."""
        name = str(file.path)
        if file.fault is not None:
            self.faults[name] = file.fault
        elif name not in self.done:
            try:
                self.make(file, self.targets[name])
                self.done.add(name)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                self.faults[name] = f"its name is too long for a file beside others, {self.extension} at its end"

    def make(self, file: TaggedFile, target: Path) -> None:
        """Make the file of a sound that could be read."""
        raise NotImplementedError

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish; there is nothing to join."""
        with self.last_one.finish(self.faults) as everyones:
            self.faults |= everyones or {}
            return everyones is not None


class LabelTracks(FileEach):
    """Audacity label tracks: for each sound a text file of start, end and label, separated by tabs."""

    extension = ".txt"

    def make(self, file: TaggedFile, target: Path) -> None:
        """Write a file's track."""
        lines = [
            f"{window.start:.6f}\t{window.end:.6f}\t{label} {value:.2f}\n"
            for window in file.windows
            for label, value in window.tags
        ]
        write_text(target, "".join(lines))


def beside(folder: Path, paths: Iterable[Path], extension: str) -> dict[str, Path]:
    """Name a file in `folder` for each sound: as the sounds lie below the deepest folder that holds them all."""
    whole = {str(path): Path(os.path.abspath(path)) for path in paths}
    if not whole:
        return {}
    root = os.path.commonpath([path.parent for path in whole.values()])
    return {name: folder / path.relative_to(root).with_name(f"{path.name}{extension}") for name, path in whole.items()}


def open_output(
    path: Path,
    kind: str | None,
    paths: list[Path],
    settings: Mapping[str, Any],
    share: Share,
) -> Output:
    """Open where tags go.

    Args:
        path: a file of rows, or a folder of label tracks.
        kind: csv, jsonl, parquet or audacity; by default what the name ends in.
        paths: all sounds of all processes.
        settings: what tags are made with.
        share: this process's part of the work.

    Raises:
        UserError: no known form, or what is there was made otherwise.
    """
    wanted = check_form(path, kind)
    if wanted == TRACKS:
        return LabelTracks(path, paths, settings, share)
    if wanted == "parquet" or share.world_size > 1 or parts_of(path):  # or of several that were stopped
        return SharedRows(path, settings, share)
    return OwnRows(path, settings, share)


def check_form(path: Path, kind: str | None) -> str:
    """Tell the form of an output, see `open_output`.

    Raises:
        UserError: no known form.
    """
    endings = (".csv", ".jsonl", ".parquet")
    wanted = kind or path.suffix.lower().lstrip(".")
    if wanted != TRACKS and (f".{wanted}" not in endings or path.suffix.lower() != f".{wanted}"):
        raise UserError(
            f"--output {path}: wanted a name that ends in {', '.join(endings)}, or a folder with --format {TRACKS}"
        )
    return wanted


def check_ours(path: Path) -> None:
    """Check that an output may be removed: rows with their note, embeddings and folders that say how they were made.

    Raises:
        UserError: it is something else.
    """
    parts = path.with_name(f"{path.name}.parts")
    if path.is_dir():
        is_ours = not any(path.iterdir()) or (path / "made_with.json").exists()
    else:
        is_ours = not path.exists() or meta_of(path).exists() or is_hardly_begun(path, form_of(path)) or is_made(path)
    for is_fine, what in (
        (is_ours, path),
        (not parts.is_dir() or all(map(is_part, parts.iterdir())), parts),
    ):
        if not is_fine:
            raise UserError(f"{what} is or holds something else, which --overwrite does not touch: write elsewhere")


def remove_output(path: Path) -> None:
    """Remove an output that `check_ours` has let pass, together with what lies beside it."""
    if path.is_dir():
        shutil.rmtree(path)
    shutil.rmtree(path.with_name(f"{path.name}.parts"), ignore_errors=True)
    parts = parts_of(path)
    partials = path.parent.glob(f".{glob.escape(path.name)}.part-*.partial")
    for file in [path, meta_of(path), *parts, *map(meta_of, parts), *partials, *marks_of(path)]:
        file.unlink(missing_ok=True)
