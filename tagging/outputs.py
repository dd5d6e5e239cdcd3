"""What is written of tagged files: tables, embeddings, and folders with a file for each sound.

Every output lists the files that it holds (`done`), so that the same command, given again, does what remains.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import remove_dead_partials, write_json, write_text
from common.parsing import read_json
from tagging.embeddings import is_embedding_file, is_part, parts_folder
from tagging.files import TaggedFile
from tagging.parts import Output, Share, check_provenance, find_marks
from tagging.rows import TagTable, find_leftovers, is_new, meta_path

TABLES = ("csv", "jsonl", "parquet")
TRACKS = "audacity"


class FilePerSound(Output):
    """A folder with a file for each sound that can be read; a subclass implements `make`.

    Args:
        folder: where they go, in the same subfolders as the sounds.
        paths: all sounds.
        settings: the provenance of the files.
        share: this process's share of the work.

    Raises:
        UserError: the folder was made with other settings, holds other files, or is locked.
    """

    extension: str

    def __init__(self, folder: Path, paths: Iterable[Path], settings: Mapping[str, Any], share: Share) -> None:
        super().__init__(folder, settings, share)
        self.targets = name_targets(folder, paths, self.extension)
        claim_folder(folder, settings)
        for parent in {folder, *(target.parent for target in self.targets.values())}:
            remove_dead_partials(parent)
        # os.path: Path.exists raises for a name that is too long.
        self.done = {name for name, target in self.targets.items() if os.path.exists(target)}

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
                self.faults[name] = (
                    f"its name is too long: {self.extension} and a partial file's ending are added to it"
                )

    def make(self, file: TaggedFile, target: Path) -> None:
        """Make the file of a sound that could be read."""
        raise NotImplementedError


class LabelTracks(FilePerSound):
    """Audacity label tracks: for each sound a text file of start, end and label, separated by tabs."""

    extension = ".txt"

    def make(self, file: TaggedFile, target: Path) -> None:
        """Write a sound's track."""
        lines = [
            f"{window.start:.6f}\t{window.end:.6f}\t{label} {value:.2f}\n"
            for window in file.windows
            for label, value in window.tags
        ]
        write_text(target, "".join(lines))


def name_targets(folder: Path, paths: Iterable[Path], extension: str) -> dict[str, Path]:
    """Name a file in `folder` for each sound, in the same subfolders as below the sounds' deepest common folder."""
    absolute = {str(path): Path(os.path.abspath(path)) for path in paths}
    if not absolute:
        return {}
    root = os.path.commonpath([path.parent for path in absolute.values()])
    return {
        name: folder / path.relative_to(root).with_name(f"{path.name}{extension}") for name, path in absolute.items()
    }


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder with its provenance, or check that an existing one has the same.

    Raises:
        UserError: it was made with other settings, or holds other files.
    """
    note = folder / "made_with.json"
    if note.exists():
        check_provenance(folder, read_json(note, "write elsewhere, or remove the folder"), settings)
    elif folder.is_dir() and any(not path.name.startswith(".") and path != note for path in folder.iterdir()):
        raise UserError(f"{folder} holds files of another program: write elsewhere")
    write_json(note, dict(settings))


def open_output(
    path: Path, output_format: str | None, paths: list[Path], settings: Mapping[str, Any], share: Share
) -> Output:
    """Open a table of tags, or a folder of label tracks.

    Args:
        path: the file or folder.
        output_format: csv, jsonl, parquet or audacity; by default the path's extension.
        paths: all sounds of all processes.
        settings: the provenance of the tags.
        share: this process's share of the work.

    Raises:
        UserError: the format is not supported, or see `TagTable` and `LabelTracks`.
    """
    if check_format(path, output_format) == TRACKS:
        return LabelTracks(path, paths, settings, share)
    return TagTable(path, settings, share)


def check_format(path: Path, output_format: str | None) -> str:
    """Return the format of an output, see `open_output`.

    Raises:
        UserError: the format is not supported, or is not that of the path's extension.
    """
    extension = path.suffix.lower().lstrip(".")
    output_format = output_format or extension
    if output_format != TRACKS and (output_format not in TABLES or output_format != extension):
        expected = ", ".join(f".{name}" for name in TABLES)
        raise UserError(f"--output {path}: expected a name that ends in {expected}, or a folder with --format {TRACKS}")
    return output_format


def check_removable(path: Path) -> None:
    """Check that this program has written an output, so that `remove_output` may remove it.

    Raises:
        UserError: it is or holds something else.
    """
    parts = parts_folder(path)
    if path.is_dir():
        is_ours = (path / "made_with.json").exists() or not any(path.iterdir())
    else:
        is_ours = meta_path(path).exists() or is_new(path) or is_embedding_file(path)
    has_foreign_parts = parts.is_dir() and not all(map(is_part, parts.iterdir()))
    if not is_ours or has_foreign_parts:
        raise UserError(
            f"{parts if is_ours else path} is or holds files of another program, which --overwrite does not touch: "
            "write elsewhere"
        )


def remove_output(path: Path) -> None:
    """Remove an output that `check_removable` accepts, with its parts and marks."""
    if path.is_dir():
        shutil.rmtree(path)
    shutil.rmtree(parts_folder(path), ignore_errors=True)
    for file in [path, meta_path(path), *find_leftovers(path), *find_marks(path)]:
        file.unlink(missing_ok=True)
