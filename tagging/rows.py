"""Tables of tags: CSV, JSON lines and parquet.

A single process appends to a .csv or .jsonl file itself, all rows of a sound file at once; NAME.meta.json beside it
holds the provenance of the rows and the number of bytes that are whole. Several processes, and those that write
parquet, append JSON lines to parts of the same kind, TARGET.part-RANK-of-N.jsonl, which the last process converts.
"""

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from audio.io import LOSSES
from common.errors import UserError
from common.files import append_bytes, explain_write_errors, whole_file, write_json
from common.parsing import load_json
from tagging.files import TaggedFile, TaggedWindow
from tagging.parts import Output, Share, check_provenance

COLUMNS = ("filename", "start", "end", "label", "probability", "error", "warning")
GROUP = 1 << 16  # rows of a parquet file that are held in memory


class RowFormat(NamedTuple):
    """A text format to which rows can be appended.

    Attributes:
        header: first line of a file.
        format_file: returns all rows of a sound file.
        parse: yields name, fault and warning of each row; reads no more lines than the rows so far take.
    """

    header: str
    format_file: Callable[[TaggedFile], str]
    parse: Callable[[Iterator[str]], Iterator[tuple[str, str | None, str | None]]]


_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
_LITERAL = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")


def describe_warnings(warnings: Mapping[str, str]) -> str | None:
    """Join warnings to one text, each behind its kind; None where there are none."""
    return "; ".join(f"{kind}: {sentence}" for kind, sentence in warnings.items()) or None


def has_lost_sound(text: str) -> bool:
    """Return whether a text of `describe_warnings` has a warning of missing sound."""
    return any(part.split(":")[0] in LOSSES for part in text.split("; "))


def _table_rows(file: TaggedFile) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a file in `COLUMNS`: one a label, best first in a window, or one where there is no label."""
    name, warning = escape_name(str(file.path)), describe_warnings(file.warnings)
    if file.fault is not None or not any(window.tags for window in file.windows):
        yield name, None, None, None, None, file.fault, warning
    for window in file.windows:
        for label, value in window.tags:
            yield name, round(window.start, 4), round(window.end, 4), label, round(value, 6), None, warning


def _format_csv(file: TaggedFile) -> str:
    stream = io.StringIO()
    end = "\r\n" if "\r" in str(file.path) else "\n"  # the csv module quotes no \r that is not in its line terminator
    csv.writer(stream, lineterminator=end).writerows(_table_rows(file))
    return stream.getvalue()


def _parse_csv(lines: Iterator[str]) -> Iterator[tuple[str, str | None, str | None]]:
    for row in csv.reader(lines, strict=True):
        *_, fault, warning = row if len(row) == len(COLUMNS) else ("", "")
        yield unescape_name(row[0]), fault or None, warning or None


def _json_rows(file: TaggedFile) -> Iterator[dict[str, Any]]:
    """Yield a row a window, or one for a file without windows; the first has the file's warnings, kind → sentence."""
    name = {"filename": escape_name(str(file.path))}
    warnings: dict[str, Any] = {"warnings": file.warnings} if file.warnings else {}
    if file.fault is not None:
        yield {**name, "error": file.fault}
    elif not file.windows:
        yield {**name, "tags": [], **warnings}
    for window in file.windows:
        tags = [{"label": label, "probability": round(value, 6)} for label, value in window.tags]
        yield {**name, "start": round(window.start, 4), "end": round(window.end, 4), "tags": tags, **warnings}
        warnings = {}


def _format_json(file: TaggedFile) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _json_rows(file))


def _parse_json(lines: Iterator[str]) -> Iterator[tuple[str, str | None, str | None]]:
    for row in map(json.loads, lines):
        yield unescape_name(row["filename"]), row.get("error"), describe_warnings(row.get("warnings", {}))


CSV = RowFormat(",".join(COLUMNS) + "\n", _format_csv, _parse_csv)
JSON_LINES = RowFormat("", _format_json, _parse_json)


class Place(NamedTuple):
    """Bytes `first` to `stop` of a table, which hold the rows of a sound file; its fault and its warning."""

    first: int
    stop: int
    fault: str | None
    warning: str | None


def find_rows(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Place], int]:
    """Find the whole rows of a table.

    Where a power cut has shortened a .csv or .jsonl file, the rows of its last sound file, which may be incomplete, are
    left out.

    Returns:
        The place of each sound file's rows, by its name; and the number of bytes that are whole, 0 where not even the
        header is and for parquet, to which nothing is appended.

    Raises:
        UserError: the rows were made with other settings, or the file was not written by this program.
    """
    if _is_parquet(path):
        return _read_parquet(path, settings), 0
    if is_new(path):
        return {}, 0
    meta, row_format = meta_path(path), get_format(path)
    try:
        content = load_json(meta)
        n_whole, provenance = int(content["bytes"]), dict(content["made_with"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} exists, but {meta.name} with its provenance is missing or damaged: write elsewhere, or remove it"
        ) from None
    check_provenance(path, provenance, settings)
    is_short = path.stat().st_size < n_whole
    places: dict[str, Place] = {}
    header = row_format.header.encode()
    stop = len(header)
    with open(path, "rb") as file:
        if file.read(stop) != header:
            if is_short:
                return {}, 0
            raise UserError(f"{path} has other columns than expected: write elsewhere, or give --overwrite")
        try:
            for name, fault, warning in row_format.parse(_read_lines(file, n_whole)):
                before = places.get(name, Place(stop, stop, None, None))
                stop = file.tell()
                places[name] = Place(before.first, stop, fault, warning or before.warning)
        except (csv.Error, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            if not is_short:
                raise UserError(
                    f"{path} was changed by another program: write elsewhere, or give --overwrite"
                ) from None
    if is_short and places:
        stop = places.popitem()[1].first
    return places, stop


def _read_lines(file: IO[bytes], stop: int) -> Iterator[str]:
    """Yield the whole lines of a file from its position up to the byte `stop`."""
    while (line := file.readline(stop - file.tell())).endswith(b"\n"):
        yield _decode(line)


def is_new(path: Path) -> bool:
    """Return whether a table is absent, or has at most a header: its run was stopped before NAME.meta.json existed."""
    if not path.exists():
        return True
    header = get_format(path).header.encode()
    is_small = not meta_path(path).exists() and path.stat().st_size <= len(header)
    return is_small and header.startswith(path.read_bytes())


class RowFile:
    """Appends to a .csv or .jsonl file, all rows of a sound file at once.

    Args:
        path: the file.
        settings: the provenance of its rows.
        n_whole: its whole bytes, see `find_rows`; what comes after them is removed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], n_whole: int) -> None:
        self.path, self.settings, self.n_whole = path, settings, n_whole
        self.format = get_format(path)
        if n_whole:
            self._write_meta()  # before the file is cut: it must not count more bytes than there are
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the output
        self.file.truncate(n_whole)
        if not n_whole:
            self._append(self.format.header)

    def write(self, file: TaggedFile) -> None:
        """Append the rows of a sound file."""
        self._append(self.format.format_file(file))

    def close(self) -> None:
        """Flush to disk and close."""
        if not self.file.closed:
            with explain_write_errors(self.path):
                os.fsync(self.file.fileno())
            self.file.close()

    def _append(self, text: str) -> None:
        data = _encode(text)
        append_bytes(self.file, data)
        self.n_whole += len(data)
        self._write_meta()

    def _write_meta(self) -> None:
        # Renamed but not flushed to disk, for speed: after a power cut the file may be shorter than recorded.
        meta = meta_path(self.path)
        partial = meta.with_name(f".{meta.name}.partial")
        with explain_write_errors(meta):
            try:
                partial.write_text(json.dumps({"bytes": self.n_whole, "made_with": self.settings}), encoding="utf-8")
                os.replace(partial, meta)
            except OSError:
                partial.unlink(missing_ok=True)
                raise


class TagTable(Output):
    """A .csv, .jsonl or .parquet file of tags.

    Args:
        path: the target; its rows are kept.
        settings: the provenance of its rows.
        share: this process's share of the work.

    Raises:
        UserError: the target was made with other settings, was not written by this program, or is locked.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], share: Share) -> None:
        super().__init__(path, settings, share)
        parts = find_parts(path)
        self.is_direct = not _is_parquet(path) and share.world_size == 1 and not parts
        target = path if self.is_direct else path.with_name(f"{path.name}.part-{share}.jsonl")
        n_whole = {target: 0}
        for source in (path, *parts):
            places, n_whole[source] = find_rows(source, settings)
            self._note(places)
        self.rows = RowFile(target, self.settings, n_whole[target])

    def write(self, file: TaggedFile) -> None:
        """Add a file, unless the table holds it."""
        name = str(file.path)
        if name not in self.done:
            self.rows.write(file)
            self._note({name: Place(0, 0, file.fault, describe_warnings(file.warnings))})

    def close(self, paths: Iterable[Path]) -> bool:
        """Finish this process's share; the last process joins all parts, see `Output.close`."""
        self.rows.close()
        return super().close(paths)

    def join(self, paths: Iterable[Path]) -> None:
        """Convert the parts of all processes to the target, in the order of `paths`."""
        if self.is_direct:
            return
        found: dict[str, tuple[Path, Place]] = {}
        for part in find_parts(self.path):
            places, _ = find_rows(part, self.settings)
            self._note(places)
            found |= {name: (part, place) for name, place in places.items()}
        held, n_whole = find_rows(self.path, self.settings)
        order = dict.fromkeys([*map(str, paths), *found])
        files = (_read_file(name, *found[name]) for name in order if name in found and name not in held)
        if _is_parquet(self.path):
            _append_parquet(self.path, self.settings, files)
        else:
            rows = RowFile(self.path, self.settings, n_whole)
            for file in files:
                rows.write(file)
            rows.close()
        for leftover in find_leftovers(self.path):
            leftover.unlink()

    def _note(self, places: Mapping[str, Place]) -> None:
        self.done |= places.keys()
        self.faults |= {name: place.fault for name, place in places.items() if place.fault is not None}
        self.warnings |= {name: place.warning for name, place in places.items() if place.warning is not None}


def _read_file(name: str, part: Path, place: Place) -> TaggedFile:
    """Read a sound file's tags back from a part."""
    with open(part, "rb") as stream:
        stream.seek(place.first)
        text = _decode(stream.read(place.stop - place.first))
    tagged = TaggedFile(Path(name), fault=place.fault)
    for line in text.split("\n")[:-1]:  # splitlines would split at U+2028, too
        row = json.loads(line)
        tagged.warnings |= row.get("warnings", {})
        if "start" in row:
            tags = [(tag["label"], tag["probability"]) for tag in row["tags"]]
            tagged.windows.append(TaggedWindow(row["start"], row["end"], tags))
    return tagged


def _read_parquet(path: Path, settings: Mapping[str, Any]) -> dict[str, Place]:
    """Read which sound files a parquet file holds."""
    import pyarrow
    import pyarrow.parquet

    places: dict[str, Place] = {}
    if not path.exists():
        return places
    try:
        check_provenance(path, load_json(meta_path(path)), settings)
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := set(COLUMNS) - set(file.schema_arrow.names):
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            for batch in file.iter_batches(columns=["filename", "error", "warning"]):
                for row in batch.to_pylist():
                    places[unescape_name(row["filename"])] = Place(0, 0, row["error"], row["warning"])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} exists and cannot be added to ({error}): write elsewhere, or remove it") from error
    return places


def _append_parquet(path: Path, settings: Mapping[str, Any], files: Iterable[TaggedFile]) -> None:
    """Write a parquet file anew: its row groups, then the rows of `files` in groups of `GROUP`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = ("start", "end", "probability")
    schema = pa.schema([(name, pa.float64() if name in numbers else pa.string()) for name in COLUMNS])
    rows = (row for file in files for row in _table_rows(file))
    write_json(meta_path(path), settings)  # first: a table without it could not be added to
    with whole_file(path) as target, pq.ParquetWriter(target, schema) as writer:
        if path.exists():
            with pq.ParquetFile(path) as held:
                for number in range(held.num_row_groups):
                    writer.write_table(held.read_row_group(number).select(list(COLUMNS)).cast(schema))
        while group := list(islice(rows, GROUP)):
            writer.write_table(pa.table([list(column) for column in zip(*group, strict=True)], schema=schema))


def find_parts(path: Path) -> list[Path]:
    """Find the parts of a table that are not joined yet."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*-of-*.jsonl"))


def find_leftovers(path: Path) -> list[Path]:
    """Find the parts of a table and all that killed processes left of them; a part comes before its NAME.meta.json."""
    name = glob.escape(path.name)
    patterns = (f"{name}.part-*-of-*.jsonl.meta.json", f".{name}.part-*.partial")
    return [*find_parts(path), *(leftover for pattern in patterns for leftover in path.parent.glob(pattern))]


def get_format(path: Path) -> RowFormat:
    """Return the format of a .csv or .jsonl file."""
    return CSV if path.suffix.lower() == ".csv" else JSON_LINES


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def meta_path(path: Path) -> Path:
    """Return the path of NAME.meta.json."""
    return path.with_name(f"{path.name}.meta.json")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # tables of earlier versions have names as their bytes


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # a fault may name a file whose name is no text


def escape_name(name: str) -> str:
    r"""Write the bytes of a file's name that are not UTF-8 as \xNN, so that every table is valid text.

    A backslash that would be read as the beginning of such an escape is written as \x5c; any other name stays as it is.
    """
    return _LITERAL.sub(r"\\x5c", name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_printable(text: str) -> str:
    r"""Escape what a terminal would act on: control characters in names of files and labels."""
    plain = escape_name(text)
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in plain)


def unescape_name(name: str) -> str:
    """Return the name that `escape_name` was given."""
    return _ESCAPE.sub(lambda match: "\\" if match[1] == "5c" else chr(0xDC00 + int(match[1], 16)), name)
