"""Rows of tags: their forms, and the files that hold them.

Rows are appended, all of a sound file at once; beside them lies NAME.meta.json with what they were made with and how
many of their bytes are whole.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from audio.io import LOSSES
from common.errors import UserError
from common.files import whole_file, write_json
from tagging.files import TaggedFile, TaggedWindow
from tagging.parts import Output, Record, check_made_with

COLUMNS = ("filename", "start", "end", "label", "probability", "error", "warning")
GROUP = 1 << 16  # rows that are held, of a parquet file


class Rows(Protocol):
    """How files become text that is appended, and what that text says of its files."""

    def header(self) -> str:
        """What comes first."""
        ...

    def text(self, file: TaggedFile) -> str:
        """All rows of a file."""
        ...

    def names(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """Name of each row's file, why it could not be read, what is odd; takes no more lines than rows so far have."""
        ...


class CsvRows:
    """`COLUMNS`: a row a label, best first within its window; of a file that cannot be read, the reason for error.

    What is odd about a file, `describe_warnings`, is in each of its rows.
    """

    def header(self) -> str:
        """The line of column names."""
        return ",".join(COLUMNS) + "\n"

    def text(self, file: TaggedFile) -> str:
        """All rows of a file."""
        stream = io.StringIO()
        end = "\r\n" if "\r" in str(file.path) else "\n"  # what is in it is quoted, and nothing else
        csv.writer(stream, lineterminator=end).writerows(table_rows(file))
        return stream.getvalue()

    def names(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """Name of each row's file, why it could not be read, and what is odd."""
        for row in csv.reader(lines, strict=True):
            fault, odd = (*row, *COLUMNS)[5:7] if len(row) == len(COLUMNS) else ("", "")  # else it is cut
            yield row[0], fault or None, odd or None


class JsonRows:
    """A line a window: filename, start, end and the list of its tags; or filename and error.

    The first line of a file that is odd has its warnings, too: kind → sentence.
    """

    def header(self) -> str:
        """Nothing."""
        return ""

    def text(self, file: TaggedFile) -> str:
        """All lines of a file."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(file))

    def names(self, lines: Iterator[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """Name of each line's file, why it could not be read, and what is odd."""
        for row in map(json.loads, lines):
            yield row["filename"], row.get("error"), describe_warnings(row.get("warnings", {}))


def describe_warnings(warnings: Mapping[str, str]) -> str | None:
    """Put warnings into one text, each with its kind in front; None where there are none."""
    return "; ".join(f"{kind}: {sentence}" for kind, sentence in warnings.items()) or None


def has_lost_sound(text: str) -> bool:
    """Whether warnings, as `describe_warnings` has put them, mean that sound is missing."""
    return any(part.split(":")[0] in LOSSES for part in text.split("; "))


def table_rows(file: TaggedFile) -> Iterator[tuple[Any, ...]]:
    """The rows of a file, in `COLUMNS`; a file without tags has one row without any."""
    odd = describe_warnings(file.warnings)
    if file.fault is not None or not any(window.tags for window in file.windows):
        yield str(file.path), None, None, None, None, file.fault, odd
    for window in file.windows:
        for label, value in window.tags:
            yield str(file.path), round(window.start, 4), round(window.end, 4), label, round(value, 6), None, odd


def _lines(file: TaggedFile) -> Iterator[dict[str, Any]]:
    odd: dict[str, Any] = {"warnings": file.warnings} if file.warnings else {}
    if file.fault is not None:
        yield {"filename": str(file.path), "error": file.fault}
    elif not file.windows:
        yield {"filename": str(file.path), "tags": [], **odd}
    for window in file.windows:
        tags = [{"label": label, "probability": round(value, 6)} for label, value in window.tags]
        times = {"start": round(window.start, 4), "end": round(window.end, 4)}
        yield {"filename": str(file.path), **times, "tags": tags, **odd}
        odd = {}


class Place(NamedTuple):
    """Where the rows of a sound file are: bytes from `first` to `stop`; why it could not be read; what is odd."""

    first: int
    stop: int
    fault: str | None
    warning: str | None = None


def read_file(path: Path, name: str, place: Place) -> TaggedFile:
    """Put a file together again from what `JsonRows` has written of it."""
    with open(path, "rb") as stream:
        stream.seek(place.first)
        text = _text(stream.read(place.stop - place.first))
    tagged = TaggedFile(Path(name), fault=place.fault)
    for line in text.split("\n")[:-1]:  # splitlines would split at U+2028, too
        row = json.loads(line)
        tagged.warnings |= row.get("warnings", {})
        if "start" in row:
            tags = [(tag["label"], tag["probability"]) for tag in row["tags"]]
            tagged.windows.append(TaggedWindow(row["start"], row["end"], tags))
    return tagged


class AppendedRows(Output):
    """A file of rows that grows by one sound file at a time.

    Args:
        path: the file of rows.
        rows: their form.
        settings: what they are made with.

    Raises:
        UserError: the file exists and was made with other settings, or not by this.
    """

    def __init__(self, path: Path, rows: Rows, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.path, self.rows, self.settings = path, rows, dict(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.n_whole = 0
        if path.exists() and not is_hardly_begun(path, rows):
            places, self.n_whole = find_rows(path, rows, settings)
            for name, place in places.items():
                self.note(name, place.fault, place.warning)
            self._write_meta()  # first: it never says more than there is
            os.truncate(path, self.n_whole)
        self.file = open(path, "ab" if self.n_whole else "wb")  # noqa: SIM115 - open as long as the output
        if not self.n_whole:
            self._append(rows.header())

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless it is there."""
        if str(file.path) not in self.done:
            self._append(self.rows.text(file))
            self.note(str(file.path), file.fault, describe_warnings(file.warnings))

    def extend(self, files: Iterable[TaggedFile]) -> None:
        """Add files that are not there, and close."""
        for file in files:
            self.write(file)
        self.close()

    def close(self, paths: Iterable[Path] = ()) -> bool:
        """Flush to disk."""
        if not self.file.closed:
            os.fsync(self.file.fileno())
            self.file.close()
        return True

    def _append(self, text: str) -> None:
        self.n_whole += self.file.write(_bytes(text))
        self.file.flush()
        self._write_meta()

    def _write_meta(self) -> None:
        # Renamed but not flushed to disk, for speed: after a power cut the rows may be fewer than it says.
        meta = meta_of(self.path)
        partial = meta.with_name(f".{meta.name}.partial")
        partial.write_text(json.dumps({"bytes": self.n_whole, "made_with": self.settings}), encoding="utf-8")
        os.replace(partial, meta)


def is_hardly_begun(path: Path, rows: Rows) -> bool:
    """Whether a run was stopped after the file was made and before the first note of what it holds."""
    header = _bytes(rows.header())
    if meta_of(path).exists() or path.stat().st_size > len(header):
        return False
    return header.startswith(path.read_bytes())


def find_rows(path: Path, rows: Rows, settings: Mapping[str, Any]) -> tuple[dict[str, Place], int]:
    """Find the whole rows of a file that `AppendedRows` has written, line by line.

    Where rows were lost in a power cut, those of the last sound file that is left do not count: there may be more.

    Returns:
        Where those of each file are, by its name; and bytes in all, 0 where not even the header is left.

    Raises:
        UserError: they were made with other settings, or by something else.
    """
    meta = meta_of(path)
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
        n_whole, made_with = int(content["bytes"]), dict(content["made_with"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} exists, but {meta.name}, which would say how it was made, is missing or damaged: write elsewhere, "
            "or remove it"
        ) from None
    check_made_with(path, made_with, settings)
    is_short = path.stat().st_size < n_whole
    places: dict[str, Place] = {}
    header = _bytes(rows.header())
    stop = len(header)
    with open(path, "rb") as file:
        if file.read(stop) != header:
            if is_short:
                return {}, 0
            raise UserError(f"{path} has other columns than are written now: write elsewhere, or give --overwrite")
        lines = _Lines(file, stop, n_whole)
        try:
            for name, fault, odd in rows.names(lines):
                if lines.is_cut:
                    break
                before = places.get(name)
                first, odd = (before.first, odd or before.warning) if before else (stop, odd)
                places[name] = Place(first, lines.position, fault, odd)
                stop = lines.position
        except (csv.Error, ValueError):
            if not is_short:
                raise UserError(f"{path} was changed by something else: write elsewhere, or give --overwrite") from None
    if is_short and places:
        stop = places.popitem()[1].first
    return places, stop


class _Lines:
    """Lines of a file from where it is, up to a byte.

    Attributes:
        position: where the last one ends.
        is_cut: whether it does not end in a line feed.
    """

    def __init__(self, file: IO[bytes], position: int, stop: int) -> None:
        self.file, self.position, self.stop = file, position, stop
        self.is_cut = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(self.stop - self.position)
        if not line:
            raise StopIteration
        self.position += len(line)
        self.is_cut = not line.endswith(b"\n")
        return _text(line)


class ParquetTable(Record):
    """A parquet file in `COLUMNS`, written whole together with what it held before; names as `as_text`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__()
        self.path, self.settings = path, dict(settings)
        if path.exists():
            try:
                made_with = json.loads(meta_of(path).read_text(encoding="utf-8"))
                check_made_with(path, made_with, settings)
                with pyarrow.parquet.ParquetFile(path) as held:
                    if missing := set(COLUMNS) - set(held.schema_arrow.names):
                        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
                    for batch in held.iter_batches(columns=["filename", "error", "warning"]):
                        for row in batch.to_pylist():
                            self.note(row["filename"], row["error"], row["warning"])
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise UserError(
                    f"{path} exists and cannot be added to ({error}): write elsewhere, or remove it"
                ) from error
        self.done = set(from_text(self.done))

    def extend(self, files: Iterable[TaggedFile]) -> None:
        """Write what is there, and files that are not, in groups of rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = (pa.string(), pa.float64(), pa.float64(), pa.string(), pa.float64(), pa.string(), pa.string())
        schema = pa.schema(zip(COLUMNS, kinds, strict=True))
        rows: list[tuple[Any, ...]] = []
        write_json(meta_of(self.path), self.settings)  # first: a table without it could not be added to
        with whole_file(self.path) as partial, pq.ParquetWriter(partial, schema) as writer:

            def write() -> None:
                columns = [[row[i] for row in rows] for i in range(len(COLUMNS))]
                writer.write_table(pa.table(columns, schema=schema))
                rows.clear()

            if self.path.exists():
                with pq.ParquetFile(self.path) as held:
                    for number in range(held.num_row_groups):
                        writer.write_table(held.read_row_group(number).select(list(COLUMNS)).cast(schema))
            for file in files:
                if str(file.path) not in self.done:
                    rows.extend((as_text(name), *rest) for name, *rest in table_rows(file))
                    self.done.add(str(file.path))
                    if len(rows) >= GROUP:
                        write()
            write()


def open_rows(path: Path, settings: Mapping[str, Any]) -> AppendedRows | ParquetTable:
    """Open a file of rows of any form for this process alone."""
    if path.suffix.lower() == ".parquet":
        return ParquetTable(path, settings)
    return AppendedRows(path, form_of(path), settings)


def form_of(path: Path) -> Rows:
    """Tell the form of rows that can be appended by the file's name."""
    return CsvRows() if path.suffix.lower() == ".csv" else JsonRows()


def meta_of(path: Path) -> Path:
    """Name the note beside a file of rows: what they were made with, and how many of their bytes are whole."""
    return path.with_name(f"{path.name}.meta.json")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


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
