"""Reading tables of text: lists of sounds as spreadsheets, pandas, R and `find` write them, and no row lost.

A line is a row. What surrounds the fields is read by these rules:

- Encoding: UTF-8 (with or without a byte-order mark), or UTF-16 with one (Excel's "Unicode text"). Lines that are no
  UTF-8 are read as Windows-1252, Latin-1 where that has no character, and this is logged; see `audio.file_names`.
- Line ends: those of Unix, Windows or old Macs. Blank lines, and rows in which every field is empty, are left out.
- Quotation marks: a field is quoted when it begins with `"` and its closing `"` stands before a separator or the end
  of the line; `""` inside is one mark. Any other mark belongs to the value, so that a plain list may name `"a".wav`;
  so do those of a row that has all its columns only then.
  Fields that hold line breaks are read where every row then has all its columns, and fewer have so line by line.
- Columns: a shorter row has empty values at its end; a longer one is a fault unless what is too much is empty, or is
  left out and noted where the caller asks for it. A column without name and values is left out; two columns of one
  name are a fault.

Tables without oddities are read by PyArrow and compared in their number of lines; all others line by line.
"""

import codecs
import csv
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.csv

from audio.file_names import decode_name
from common.errors import Faults, UserError, some

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24  # every line must fit into one block of PyArrow
_MAX_LISTED = 20
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_UTF32 = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}


def load_text(path: str | Path) -> bytes:
    r"""Return the content of a text file as UTF-8 with "\n" between lines, without a byte-order mark.

    Raises:
        UserError: there is no such file, it cannot be read, or it is no text.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder; expected a list of sounds: `python scripts/make_lists.py {path}` makes lists of it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a table ({error.strerror or error})") from None
    encoding = next((name for mark, name in (_UTF32 | _UTF16).items() if content.startswith(mark)), None)
    if encoding:
        try:
            content = content.decode(encoding).encode("utf-8")
        except UnicodeError as error:
            raise UserError(
                f"{path}: begins as {encoding.upper()} and is not so throughout ({error}); save it as text in UTF-8"
            ) from None
    content = content.removeprefix(codecs.BOM_UTF8)
    # A NUL here and there is an odd name (or a damaged one), which is left out later.
    if content[:4096].count(0) > len(content[:4096]) // 64 or content.startswith(b"PK\x03\x04"):
        raise UserError(
            f"{path}: is no text in UTF-8 but a spreadsheet, UTF-16 without a byte-order mark or some other kind of "
            "file; save it as text: tab-separated or CSV, in UTF-8"
        )
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")
        if b"\n" not in content:  # as old Macs end lines
            content = content.replace(b"\r", b"\n")
    return _as_utf8(path, content)


def _as_utf8(path: str | Path, content: bytes) -> bytes:
    if content.isascii():
        return content
    try:
        content.decode("utf-8")
        return content
    except UnicodeDecodeError:
        pass
    lines, legacy = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        text = decode_name(line)
        lines.append(text)
        if text.encode("utf-8") != line:
            legacy.append(number)
    logger.warning(
        "%s: %d lines are not valid UTF-8, and are read as Windows-1252 (Latin-1), such as line %d: %r; files are "
        "found under the names that these bytes are; save the list as UTF-8 if a name looks wrong",
        path, len(legacy), legacy[0], lines[legacy[0] - 1],
    )  # fmt: skip
    return "\n".join(lines).encode("utf-8")


def parse_table(
    path: str | Path, content: bytes, delimiter: str, left_out: list[tuple[str, str]] | None = None
) -> pd.DataFrame:
    """Return the rows of a table below its header, every value a string as it stands in the file, missing ones "".

    Args:
        path: for sentences.
        content: of the file, see `load_text`.
        delimiter: between columns: one character.
        left_out: gets the text and the fault of each row that cannot be read, while most can; None makes them errors.
            With it, what looks like a separator in a table of one column belongs to the value.

    Raises:
        UserError: every row that has more fields than the header, two columns of one name, a quotation mark that leaves
            rows in doubt, or a separator that can be none.
    """
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\n\r':
        raise UserError(f"{path}: the separator is {delimiter!r}; expected one character, such as a tab or a comma")
    content = content.rstrip(b"\n")
    table = _read_regular(content, delimiter)
    if table is None:
        table = _read_carefully(path, content, delimiter, left_out)
    return _drop_empty(table)


# --- Regular tables ---


def _read_regular(content: bytes, delimiter: str) -> pd.DataFrame | None:
    """Read a table in which every line is a row with all its fields; None where one is not."""
    if b"\r" in content:
        return None
    quoted = b'"' in content
    if quoted:
        content = _quote_properly(content, delimiter)
    head, _, body = content.partition(b"\n")
    columns = _split(head.decode("utf-8"), delimiter)[0]
    if not body or not head.strip() or not _are_usable(columns):
        return None
    names = [str(number) for number in range(len(columns))]
    try:
        found = pyarrow.csv.read_csv(
            io.BytesIO(body),
            read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.large_string()), strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid:  # a row with more fields, or fewer
        return None
    if found.num_rows != body.count(b"\n") + 1:  # blank lines
        return None
    table = found.combine_chunks().to_pandas()
    table.columns = pd.Index(_name_columns(columns), dtype=str)
    return table


def _quote_properly(content: bytes, delimiter: str) -> bytes:
    """Rewrite lines with quotation marks so that these enclose fields, and are doubled inside, and nothing else."""
    text = np.frombuffer(content, np.uint8)
    marks, breaks = np.flatnonzero(text == ord('"')), np.flatnonzero(text == ord("\n"))
    lines = np.searchsorted(breaks, marks)
    if _enclose_fields(text, marks, lines, delimiter):
        return content
    parts, done = [], 0
    for line in np.unique(lines).tolist():
        start = int(breaks[line - 1]) + 1 if line else 0
        end = int(breaks[line]) if line < len(breaks) else len(content)
        fields, _ = _split(content[start:end].decode("utf-8"), delimiter)
        rewritten = delimiter.join('"' + field.replace('"', '""') + '"' for field in fields)
        parts += [content[done:start], rewritten.encode("utf-8")]
        done = end
    return b"".join([*parts, content[done:]])


def _enclose_fields(text: np.ndarray, marks: np.ndarray, lines: np.ndarray, delimiter: str) -> bool:
    """Whether every quotation mark opens or closes a field, in turn, on one line."""
    if len(marks) % 2:
        return False
    opening, closing = marks[::2], marks[1::2]
    edges = (ord(delimiter), ord("\n"))
    before, after = text[np.maximum(opening - 1, 0)], text[np.minimum(closing + 1, len(text) - 1)]
    opens = (opening == 0) | np.isin(before, edges)
    closes = (closing == len(text) - 1) | np.isin(after, edges)
    return bool(opens.all() and closes.all() and (lines[::2] == lines[1::2]).all())


# --- Any table, line by line ---


def _read_carefully(
    path: str | Path, content: bytes, delimiter: str, left_out: list[tuple[str, str]] | None = None
) -> pd.DataFrame:
    lines = content.decode("utf-8").split("\n")
    head = next((number for number, line in enumerate(lines) if line.strip()), None)
    if head is None:
        return pd.DataFrame()
    columns, _ = _split(lines[head], delimiter)
    values: list[str] = []  # of all rows one after the other: two million small lists would take thrice the time
    longer: list[tuple[int, list[str]]] = []
    shorter, unclosed, returns = [], [], []
    places: dict[int, int] = {}  # line → the row it became, of those that may be left out
    width = len(columns)
    for number, line in enumerate(lines[head + 1 :], head + 2):
        if not line:
            continue
        if '"' in line:
            fields, is_open = _split(line, delimiter)
            if len(fields) < width == line.count(delimiter) + 1:
                fields = line.split(delimiter)
            elif is_open:
                unclosed.append(number)
        else:
            fields = line.split(delimiter)
        if "\r" in line:
            returns.append(number)
            places[number] = len(values) // width
        if len(fields) < width:
            shorter.append(number)
            fields += [""] * (width - len(fields))
        elif len(fields) > width:
            if any(fields[width:]):
                longer.append((number, fields))
                places[number] = len(values) // width
            fields = fields[:width]
        values += fields
    if unclosed and (longer or shorter):
        values = _read_line_breaks(path, "\n".join(lines[head:]), delimiter, width, unclosed[0], longer, shorter)
    elif left_out is not None and 2 * len(places) < len(values) // width:
        values = _leave_out(values, width, delimiter, lines, places, dict(longer), left_out)
        returns = []
    else:
        _refuse_longer(path, longer, columns, delimiter, len(values) // width)
    if returns:
        raise UserError(
            f"{path}: line {returns[0]}{f' and {len(returns) - 1} more' if returns[1:] else ''} has a carriage return "
            f"inside ({lines[returns[0] - 1]!r}), which no name or label in a list can hold; rename that file, or save "
            "the list with line ends of one kind"
        )
    _refuse_duplicates(path, columns)
    names = enumerate(_name_columns(columns))
    return pd.DataFrame({name: pd.Series(values[number::width], dtype=str) for number, name in names})


def _leave_out(
    values: list[str],
    width: int,
    delimiter: str,
    lines: Sequence[str],
    places: dict[int, int],
    longer: dict[int, list[str]],
    left_out: list[tuple[str, str]],
) -> list[str]:
    """Return the values without the rows in `places`, which are noted; names of a plain list get their separators."""
    gone = set()
    for number, row in places.items():
        line = lines[number - 1]
        if width == 1 and "\r" not in line:
            values[row] = delimiter.join(longer[number])
            continue
        gone.add(row)
        found = f"has {len(longer[number])} fields, expected {width}" if number in longer else "has a carriage return"
        left_out.append((line, f'line {number} {found}; rename the file, or put "..." around its name'))
    if not gone:
        return values
    return [value for place, value in enumerate(values) if place // width not in gone]


def _split(line: str, delimiter: str) -> tuple[list[str], bool]:
    """Return the fields of a line, and whether one of them begins with a quotation mark that is not closed."""
    if '"' not in line:
        return line.split(delimiter), False
    quoted = _quoted_field(delimiter)
    fields, is_open, place = [], False, 0
    while True:
        if found := quoted.match(line, place):
            fields.append(found[1].replace('""', '"'))
            place = found.end()
        else:
            end = line.find(delimiter, place)
            end = len(line) if end < 0 else end
            fields.append(line[place:end])
            is_open = is_open or line[place : place + 1] == '"'
            place = end
        if place == len(line):
            return fields, is_open
        place += 1


def _quoted_field(delimiter: str) -> re.Pattern[str]:
    return re.compile(rf'"((?:[^"]|"")*+)"(?={re.escape(delimiter)}|\Z)')


def _read_line_breaks(
    path: str | Path,
    text: str,
    delimiter: str,
    width: int,
    unclosed: int,
    longer: Sequence[tuple[int, list[str]]],
    shorter: Sequence[int],
) -> list[str]:
    """Return the values of a table whose quoted fields hold line breaks, where that gives every row its columns."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row][1:]
        if width > 1 and all(len(row) == width for row in rows):
            logger.info("%s: %d rows; quoted fields of some hold line breaks", path, len(rows))
            return [value for row in rows for value in row]
    except csv.Error:
        pass
    number = min([number for number, _ in longer] + list(shorter))
    raise UserError(
        f"{path}: line {unclosed} has a quotation mark at the start of a field, which no mark before a separator or "
        f"the end of the line closes, and line {number} does not have {width} fields, so rows are in doubt; expected "
        '"..." around a whole field with "" for a mark inside it, or a separator in every row'
    )


def _refuse_longer(
    path: str | Path, longer: Sequence[tuple[int, list[str]]], columns: Sequence[str], delimiter: str, n_rows: int
) -> None:
    if not longer:
        return
    mark = {"\t": "tab", ",": "comma", ";": "semicolon", " ": "space"}.get(delimiter, repr(delimiter))
    advice = "several labels of a clip are one field, joined by ';', and a field with a " + mark + ' inside is "quoted"'
    if len(longer) == n_rows and {len(fields) for _, fields in longer} == {len(columns) + 1}:
        advice = (
            "every row has one field more than the header: does the header lack the name of a column? Else " + advice
        )
    faults = Faults(f"{path} ({advice})", _MAX_LISTED)
    for number, fields in longer:
        found = f"found {len(fields)} fields ({some(map(repr, fields), 6)})"
        faults.add(f"line {number}: {found}, expected {len(columns)} ({some(columns, 6)})")
    faults.raise_if_any()


def _are_usable(columns: Sequence[str]) -> bool:
    named = [name for name in map(str.strip, columns) if name]
    return len(set(named)) == len(named)


def _refuse_duplicates(path: str | Path, columns: Sequence[str]) -> None:
    places: dict[str, list[int]] = {}
    for number, name in enumerate(map(str.strip, columns), 1):
        places.setdefault(name, []).append(number)
    twice = [f"{name!r} (columns {some(map(str, p))})" for name, p in places.items() if name and len(p) > 1]
    if twice:
        raise UserError(f"{path}: its header has the same name more than once: {some(twice)}; rename or remove one")


def _name_columns(columns: Sequence[str]) -> list[str]:
    return [name.strip() or f"Unnamed: {number}" for number, name in enumerate(columns)]


def _drop_empty(table: pd.DataFrame) -> pd.DataFrame:
    """Drop columns without name and values, as spreadsheets leave behind, and rows without any value."""
    unnamed = [name for name in table.columns if name.startswith("Unnamed: ") and (table[name] == "").all()]
    if unnamed:
        table = table.drop(columns=unnamed)
    if table.shape[1] and (empty := _is_blank(table.iloc[:, 0])).any():
        for name in table.columns[1:]:
            empty &= _is_blank(table[name])
        if empty.any():
            table = table[~empty].reset_index(drop=True)
    return table


def _is_blank(column: pd.Series) -> pd.Series:
    return column.str.strip() == ""
