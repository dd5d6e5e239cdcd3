"""What is written of tagged files: rows and label tracks, a sound file at a time, gone on with after a stop.

Every output knows which files it holds already (`done`), so that a command given again does what is left. Rows are
appended; beside them lies NAME.meta.json with what they were made with and how many of their bytes are whole.
"""

import csv
import glob
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.files import whole_file, write_json, write_text
from tagging.files import TaggedFile, TaggedWindow
from tagging.parts import LastOne, Share, check_made_with, claim_folder, marks_of

COLUMNS = ("filename", "start", "end", "label", "probability", "error")
TRACKS = "audacity"


class Output(Protocol):
    """Takes tagged files.

    Attributes:
        done: names of the files that it, or another process's part of it, holds.
        faults: name → reason of those that could not be read.
    """

    done: set[str]
    faults: dict[str, str]

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        ...

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish; `paths` is the order wanted. False where other processes have not finished theirs.

        Where they have, this is the last process, and `faults` are then those of all.
        """
        ...


class Rows(Protocol):
    """How files become text that is appended, and what that text says of its files."""

    def header(self) -> str:
        """What comes first."""
        ...

    def text(self, file: TaggedFile) -> str:
        """All rows of a file."""
        ...

    def names(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Name of each row's file, and why it could not be read."""
        ...


class CsvRows:
    """`COLUMNS`: a row a label, best first within its window; of a file that cannot be read, the reason for error."""

    def header(self) -> str:
        """The line of column names."""
        return ",".join(COLUMNS) + "\n"

    def text(self, file: TaggedFile) -> str:
        """All rows of a file."""
        stream = io.StringIO()
        end = "\r\n" if "\r" in str(file.path) else "\n"  # what is in it is quoted, and nothing else
        csv.writer(stream, lineterminator=end).writerows(table_rows(file))
        return stream.getvalue()

    def names(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Name of each row's file, and why it could not be read."""
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield row["filename"], row["error"] or None


class JsonRows:
    """A line a window: filename, start, end and the list of its tags; or filename and error."""

    def header(self) -> str:
        """Nothing."""
        return ""

    def text(self, file: TaggedFile) -> str:
        """All lines of a file."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(file))

    def names(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Name of each line's file, and why it could not be read."""
        for row in _json_lines(text):
            yield row["filename"], row.get("error")


def table_rows(file: TaggedFile) -> Iterator[tuple[Any, ...]]:
    """The rows of a file, in `COLUMNS`; a file without tags has one row with nothing but its name."""
    if file.fault is not None or not any(window.tags for window in file.windows):
        yield str(file.path), None, None, None, None, file.fault
    for window in file.windows:
        for label, value in window.tags:
            yield str(file.path), round(window.start, 4), round(window.end, 4), label, round(value, 6), None


def _lines(file: TaggedFile) -> Iterator[dict[str, Any]]:
    if file.fault is not None:
        yield {"filename": str(file.path), "error": file.fault}
    elif not file.windows:
        yield {"filename": str(file.path), "tags": []}
    for window in file.windows:
        tags = [{"label": label, "probability": round(value, 6)} for label, value in window.tags]
        times = {"start": round(window.start, 4), "end": round(window.end, 4)}
        yield {"filename": str(file.path), **times, "tags": tags}


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.split("\n") if line)  # splitlines would split at U+2028, too


def _files(text: str) -> Iterator[TaggedFile]:
    """Put files together again from the text of `JsonRows`."""
    file: TaggedFile | None = None
    for row in _json_lines(text):
        if file is None or str(file.path) != row["filename"]:
            if file is not None:
                yield file
            file = TaggedFile(Path(row["filename"]), fault=row.get("error"))
        if "start" in row:
            tags = [(tag["label"], tag["probability"]) for tag in row["tags"]]
            file.windows.append(TaggedWindow(row["start"], row["end"], tags))
    if file is not None:
        yield file


class AppendedRows:
    """A file of rows that grows by one sound file at a time.

    Args:
        path: the file of rows.
        rows: their form.
        settings: what they are made with.

    Raises:
        UserError: the file exists and was made with other settings, or not by this.
    """

    def __init__(self, path: Path, rows: Rows, settings: Mapping[str, Any]) -> None:
        self.path, self.rows, self.settings = path, rows, dict(settings)
        self.done: set[str] = set()
        self.faults: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self._is_hardly_begun():
            text = read_rows(path, settings)
            for name, fault in rows.names(text):
                self.done.add(name)
                if fault:
                    self.faults[name] = fault
            self.n_whole = len(_bytes(text))
            os.truncate(path, self.n_whole)
            self.file = open(path, "ab")  # noqa: SIM115 - open as long as the output
        else:
            self.n_whole = 0
            self.file = open(path, "wb")  # noqa: SIM115
            self._append(rows.header())

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        name = str(file.path)
        if name in self.done:
            return
        self._append(self.rows.text(file))
        self.done.add(name)
        if file.fault is not None:
            self.faults[name] = file.fault

    def close(self, paths: Iterable[Path] = ()) -> bool:
        """Flush to disk."""
        if not self.file.closed:
            os.fsync(self.file.fileno())
            self.file.close()
        return True

    def _is_hardly_begun(self) -> bool:
        """Whether a run was stopped after the file was made and before the first note of what it holds."""
        header = _bytes(self.rows.header())
        return (
            not _meta(self.path).exists()
            and self.path.stat().st_size <= len(header)
            and header.startswith(self.path.read_bytes())
        )

    def _append(self, text: str) -> None:
        self.n_whole += self.file.write(_bytes(text))
        self.file.flush()
        # Renamed but not flushed to disk, for speed: after a power cut the rows may be fewer than it says.
        meta = _meta(self.path)
        partial = meta.with_name(f".{meta.name}.partial")
        partial.write_text(json.dumps({"bytes": self.n_whole, "made_with": self.settings}), encoding="utf-8")
        os.replace(partial, meta)


def read_rows(path: Path, settings: Mapping[str, Any]) -> str:
    """Read the whole rows of a file that `AppendedRows` has written.

    Raises:
        UserError: they were made with other settings, or by something else.
    """
    meta = _meta(path)
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
        n_whole, made_with = int(content["bytes"]), dict(content["made_with"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} exists, but {meta.name}, which would say how it was made, is missing or damaged: write elsewhere, "
            "or give --overwrite to begin anew"
        ) from None
    check_made_with(path, made_with, settings)
    with open(path, "rb") as file:
        data = file.read(n_whole)
    if len(data) < n_whole:
        raise UserError(f"{path} is shorter than {meta.name} says: give --overwrite to begin anew")
    return data.decode("utf-8", "surrogateescape")


class ParquetTable:
    """A parquet file in `COLUMNS`, written whole at the end together with what it held before; names as `as_text`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        import pandas as pd

        self.path, self.settings = path, dict(settings)
        self.held = pd.DataFrame(columns=list(COLUMNS))
        if path.exists():
            try:
                made_with = json.loads(_meta(path).read_text(encoding="utf-8"))
                self.held = pd.read_parquet(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} exists and cannot be added to ({error}): give --overwrite") from error
            check_made_with(path, made_with, settings)
        self.done = set(from_text(self.held["filename"]))
        faulty = self.held.dropna(subset=["error"])
        self.faults = dict(zip(faulty["filename"], faulty["error"], strict=True))
        self.more: list[tuple[Any, ...]] = []

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        if str(file.path) not in self.done:
            self.more.extend((as_text(name), *rest) for name, *rest in table_rows(file))
            self.done.add(str(file.path))

    def close(self, paths: Iterable[Path] = ()) -> bool:
        """Write the file."""
        import pandas as pd

        kinds = dict(zip(COLUMNS, ("string", "float64", "float64", "string", "float64", "string"), strict=True))
        new = pd.DataFrame(self.more, columns=list(COLUMNS)).astype(kinds)
        table = pd.concat([self.held.astype(kinds), new]) if len(self.held) else new
        write_json(_meta(self.path), self.settings)  # first: a table without it could not be added to
        with whole_file(self.path) as partial:
            table.to_parquet(partial, index=False)
        return True


class SharedRows:
    """Rows of several processes, or in a form that cannot be appended to.

    Each process appends to a part of its own, TARGET.part-RANK-of-N.jsonl; the last one to finish adds all parts to the
    file wanted, in the order of the sounds.

    Args:
        path: the file wanted.
        settings: what rows are made with.
        share: this process's part.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        self.path, self.settings = path, dict(settings)
        self.last_one = LastOne(path, share)
        self.done: set[str] = set()
        self.faults: dict[str, str] = {}
        if path.exists():
            target = open_target(path, settings)
            self._note(target.done, target.faults)
            if isinstance(target, AppendedRows):
                target.close()
        for part in self._parts():
            for file in _read_part(part, settings):
                self._note({str(file.path)}, {str(file.path): file.fault} if file.fault else {})
        self.part = AppendedRows(path.with_name(f"{path.name}.part-{share}.jsonl"), JsonRows(), settings)

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        if str(file.path) not in self.done:
            self.part.write(file)
            self._note({str(file.path)}, {str(file.path): file.fault} if file.fault else {})

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish this part; the last one to do so writes the file wanted."""
        self.part.close()
        with self.last_one.finish(self.faults) as everyones:
            if everyones is None:
                return False
            parts = self._parts()
            there = {str(file.path): file for part in parts for file in _read_part(part, self.settings)}
            target = open_target(self.path, self.settings)
            for name in dict.fromkeys([*map(str, paths), *there]):
                if name in there:
                    target.write(there[name])
            target.close(paths)
            self._note(target.done, everyones)
            for part in parts:
                part.unlink()
                _meta(part).unlink()
            for partial in self.path.parent.glob(f".{glob.escape(self.path.name)}.part-*.partial"):
                partial.unlink()  # of processes that were killed
        return True

    def _note(self, done: set[str], faults: Mapping[str, str]) -> None:
        self.done |= done
        self.faults |= faults

    def _parts(self) -> list[Path]:
        return parts_of(self.path)


def parts_of(path: Path) -> list[Path]:
    """Find what processes have left for a file that is not joined yet."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*-of-*.jsonl"))


def _read_part(part: Path, settings: Mapping[str, Any]) -> list[TaggedFile]:
    if not _meta(part).exists():  # just begun by another process
        return []
    return list(_files(read_rows(part, settings)))


def _meta(path: Path) -> Path:
    return path.with_name(f"{path.name}.meta.json")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files need not be text


def as_text(name: str) -> str:
    r"""Write the bytes of a file's name that are no text as \xNN, for stores that hold nothing but text."""
    return _bytes(name).decode("utf-8", "backslashreplace")


def from_text(names: Iterable[str]) -> Iterator[str]:
    r"""Give the names that `as_text` may have been given; one that holds \xNN may have been written so itself."""
    for name in names:
        yield name
        yield re.sub(r"\\x([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)


class FileEach:
    """A folder with a file for each sound that can be read.

    Args:
        folder: where they go, laid out as the sounds are.
        paths: all sounds.
        settings: what they are made with.
        share: this process's part of the work.
    """

    extension: str

    def __init__(self, folder: Path, paths: Iterable[Path], settings: Mapping[str, Any], share: Share) -> None:
        self.targets = beside(folder, paths, self.extension)
        claim_folder(folder, settings)
        self.last_one = LastOne(folder, share)
        self.done = {name for name, target in self.targets.items() if target.exists()}
        self.faults: dict[str, str] = {}

    def write(self, file: TaggedFile) -> None:
        """Make a sound's file, unless it is there or the sound cannot be read."""
        name = str(file.path)
        if file.fault is not None:
            self.faults[name] = file.fault
        elif name not in self.done:
            self.make(file, self.targets[name])
            self.done.add(name)

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


def open_target(path: Path, settings: Mapping[str, Any]) -> AppendedRows | ParquetTable:
    """Open a file of rows of any form for this process alone."""
    if path.suffix.lower() == ".parquet":
        return ParquetTable(path, settings)
    return AppendedRows(path, CsvRows() if path.suffix.lower() == ".csv" else JsonRows(), settings)


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
    endings = (".csv", ".jsonl", ".parquet")
    wanted = kind or path.suffix.lower().lstrip(".")
    if wanted != TRACKS and (f".{wanted}" not in endings or path.suffix.lower() != f".{wanted}"):
        raise UserError(
            f"--output {path}: wanted a name that ends in {', '.join(endings)}, or a folder with --format {TRACKS}"
        )
    if wanted == TRACKS:
        return LabelTracks(path, paths, settings, share)
    if wanted == "parquet" or share.world_size > 1 or parts_of(path):  # or of several that were stopped
        return SharedRows(path, settings, share)
    return open_target(path, settings)


def remove_output(path: Path) -> None:
    """Remove an output together with what lies beside it."""
    if path.is_dir():
        if any(path.iterdir()) and not (path / "made_with.json").exists():
            raise UserError(f"{path} holds files of something else, which --overwrite does not touch: write elsewhere")
        shutil.rmtree(path)
    shutil.rmtree(path.with_name(f"{path.name}.parts"), ignore_errors=True)
    parts = parts_of(path)
    partials = path.parent.glob(f".{glob.escape(path.name)}.part-*.partial")
    for file in [path, _meta(path), *parts, *map(_meta, parts), *partials, *marks_of(path)]:
        file.unlink(missing_ok=True)
