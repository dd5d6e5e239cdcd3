"""Manifests: tables of clips (.tsv), and the spellings of clip names.

A clip is identified by its name: the path in the manifest's `filename` column. Published stores spell names in other
ways (without the folder, another extension, AudioSet's leading "Y"), so names are matched by their relative path first,
and by their stem where that is unambiguous.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from audio.audioset import is_segment_list, read_segments
from audio.file_names import is_text, locate
from audio.io import AUDIO_EXTENSIONS, FOREIGN_EXTENSIONS
from audio.tables import load_text, parse_table
from common.errors import UserError, did_you_mean

MAX_PART, MAX_PATH = 255, 4096  # bytes of names on all common file systems
_EXTENSIONS = AUDIO_EXTENSIONS | FOREIGN_EXTENSIONS
# "Y", an 11-character YouTube id, then nothing, or the start, or start and end of the segment in seconds.
_AUDIOSET_NAME = re.compile(r"Y([A-Za-z0-9_-]{11}(?:_\d+(?:\.\d+)?){0,2})")
# Columns of groups of clips, such as speakers, which a model would recognise in another list.
GROUP_COLUMNS = ("group", "speaker", "recording")


def read_manifest(
    path: str | Path,
    *,
    required: Sequence[str] = ("filename",),
    delimiter: str = "\t",
    filename_column: str = "filename",
    left_out: list[tuple[str, str]] | None = None,
) -> pd.DataFrame:
    r"""Read a table with one clip a row.

    Encodings, line ends, quotation marks and rows of another length are read by `audio.tables`. AudioSet's own
    lists of segments are read as lists of sounds, whatever the delimiter (`audio.audioset`).

    Args:
        path: a text file with a header line.
        required: columns that must be present; "filename" stands for `filename_column`.
        delimiter: between columns.
        filename_column: the file's column of names; it is named "filename" in the result.
        left_out: gets the text and the fault of each row that does not fit the header, while most do; None makes them
            errors, as suits tables that a program has written.

    Returns:
        The table, every value a string as it stands in the file, missing ones "".

    Raises:
        UserError: the file cannot be read, has no rows, lacks a column, or has rows that do not fit its header.
    """
    content = load_text(path)
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected a header line with a {filename_column!r} column")
    if is_segment_list(content):
        table, filename_column = read_segments(path, content), "filename"
    else:
        table = parse_table(path, content, delimiter, left_out)
    _check_columns(path, table, [filename_column if c == "filename" else c for c in required], delimiter)
    if table.empty:
        raise UserError(f"{path}: the table has a header but no rows")
    if filename_column != "filename" and filename_column in table:
        if "filename" in table:
            raise UserError(
                f"{path}: has a 'filename' column beside the expected {filename_column!r}; rename or remove one of them"
            )
        table = table.rename(columns={filename_column: "filename"})
    return table


def _check_columns(path: str | Path, table: pd.DataFrame, expected: Sequence[str], delimiter: str) -> None:
    missing = [column for column in expected if column not in table]
    if not missing:
        return
    columns = [str(column) for column in table.columns]
    sentence = f"{path}: found the columns {', '.join(map(repr, columns))}, expected {', '.join(map(repr, expected))}"
    sentence += "; missing " + ", ".join(f"{name!r}{did_you_mean(name, columns)}" for name in missing)
    if any("/" in column or _without_extension(column) != column for column in columns):
        sentence += f". The first line looks like a clip, not a header: add a line with {expected[0]!r} at the top"
    elif len(columns) == 1 and delimiter not in columns[0]:
        other = next((mark for mark in (",", "\t", ";", " ") if mark in columns[0]), None)
        if other:
            sentence += f". The header looks separated by {other!r}, and was read with {delimiter!r}"
    raise UserError(sentence)


def resolve(path: str, manifest: str | Path) -> Path:
    """Return the path on disk of a file in a manifest.

    An absolute path is unchanged; a relative one is searched in the manifest's folder first, then in the working
    directory. Names with another Unicode form on disk (NFC, NFD), or that are not UTF-8 there, are found.
    """
    beside = Path(manifest).parent / path  # an absolute `path` replaces the folder
    is_beside = os.path.exists(beside)  # not Path.exists, which raises for names that are too long
    if is_beside or path.isascii():
        return beside if is_beside else Path(path)
    return locate(beside) or locate(path) or Path(path)


def name_fault(name: str) -> str:
    """Return why a clip cannot have this name, in a sentence; "" where it can."""
    if "\n" in name or "\r" in name:
        return "the name has a line break, which lists of sounds do not support; rename the file"
    if "\0" in name:
        return "the name has a NUL character, which no file's name can have; correct the list"
    if not is_text(name):
        return "the name is not valid text (UTF-8); rename the file"
    longest = max(map(len, name.split("/"))) if len(name) > MAX_PART else 0
    if longest > MAX_PART or len(name) > MAX_PATH:  # in characters: names that are not UTF-8 on disk are longer here
        return (
            f"the name has {len(name)} characters, {longest} of them between two '/'; files have at most {MAX_PATH} "
            f"and {MAX_PART}; correct the list"
        )
    return ""


def normalise(name: str) -> str:
    """Return a clip's name as a plain path: "/" between folders, no "./"."""
    if "\\" in name or "//" in name or "/." in name or name[:1] == "." or name[-1:] == "/":
        return posixpath.normpath(name.replace("\\", "/"))
    return name


def compose(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), whether "é" is one character in it or two (NFD, as on macOS)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _base(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def _folder(path: str) -> str:
    return path[: max(path.rfind("/"), 0)]


def _without_extension(name: str) -> str:
    """Strip a known audio extension only: in "-0DdlOuIFUI_50.000" the dot belongs to the name."""
    stem, _, extension = name.rpartition(".")
    return stem if stem and f".{extension.lower()}" in _EXTENSIONS else name


def _key(base: str) -> str:
    """Return the loosest spelling of a name without its folder."""
    stem = _without_extension(base)
    found = _AUDIOSET_NAME.fullmatch(stem) if stem[:1] == "Y" else None
    return found[1] if found else stem


def spellings(name: str) -> list[str]:
    """Return the spellings of a clip's name from exact to loose, each once.

    The relative path; the same in Unicode's composed form; without its folder; without a known audio extension; without
    the "Y" that AudioSet downloads have before the 11-character YouTube id.
    """
    path = normalise(name)
    base = _base(compose(path))
    return list(dict.fromkeys([path, compose(path), base, _without_extension(base), _key(base)]))


class NameIndex:
    """Finds clips by name among names that may be spelt otherwise.

    The same relative path always wins, then the same in Unicode's composed form. Else a name with the same loosest
    spelling (see `spellings`) is taken when it is the only one, or when the folders single it out. Where folders
    disagree ("a/x.wav" for "b/x.wav") the stem counts only if no two names share a stem; two candidates that nothing
    distinguishes do not match.

    Args:
        names: the names to find; of equal ones the first is found.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._given = self._paths = [normalise(name) for name in names]
        self._exact: dict[str, int] = {}
        for position, path in enumerate(self._given):
            self._exact.setdefault(path, position)
        self._is_plain = all(map(str.isascii, self._given))
        if not self._is_plain:
            self._paths = [compose(path) for path in self._given]
            for position, (path, given) in enumerate(zip(self._paths, self._given, strict=True)):
                if path is not given:
                    self._exact.setdefault(path, position)

    def __len__(self) -> int:
        return len(self._paths)

    @cached_property
    def _loose(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        """The first name of each loosest spelling, and all names of those that several have."""
        first: dict[str, int] = {}
        several: dict[str, list[int]] = {}
        # Two spellings of a name have one position: it counts once.
        distinct = self._exact.values() if self._is_plain else dict.fromkeys(self._exact.values())
        for position in distinct:
            key = _key(_base(self._paths[position]))
            if first.setdefault(key, position) != position:
                several.setdefault(key, [first[key]]).append(position)
        return first, several

    def find(self, name: str) -> int:
        """Return the position of `name`, or -1."""
        return self._find(normalise(name), stems_identify=True)

    def find_all(self, names: Iterable[str]) -> np.ndarray:
        """Return the positions of many names, int64, -1 where missing.

        Knowing them all, this is stricter than `find` on each: where two different names would be given the same clip,
        it goes to the one that spells it exactly, or to none.
        """
        expected = [normalise(name) for name in names]
        found = np.array([self._exact.get(path, -1) for path in expected], dtype=np.int64)
        if (found >= 0).all():
            return found
        distinct = set(expected)
        stems_identify = len({_key(_base(compose(path))) for path in distinct}) == len(distinct)
        positions = {path: self._find(path, stems_identify) for path in distinct}
        claims = Counter(positions.values())
        for path, position in positions.items():
            if claims[position] > 1 and path != self._given[position]:
                positions[path] = -1
        return np.array([positions[path] for path in expected], dtype=np.int64)

    def _find(self, path: str, stems_identify: bool) -> int:
        if path in self._exact:
            return self._exact[path]
        path = compose(path)
        if path in self._exact:
            return self._exact[path]
        first, several = self._loose
        folder, base = _folder(path), _base(path)
        key = _key(base)
        if key in several:
            return self._choose(folder, base, several[key])
        position = first.get(key, -1)
        if position < 0 or (stems_identify and not several) or _agree(folder, _folder(self._paths[position])):
            return position
        return -1

    def _choose(self, folder: str, base: str, candidates: list[int]) -> int:
        """Return which of several names with one stem the folders, then the spelling, single out; else -1."""
        folders = {position: _folder(self._paths[position]) for position in candidates}
        agreeing = [position for position in candidates if _agree(folder, folders[position])]
        deepest = max((_depth(folder, folders[position]) for position in agreeing), default=0)
        if deepest == 0 and len(set(folders.values())) > 1:
            return -1
        nearest = [position for position in agreeing if _depth(folder, folders[position]) == deepest]
        for spelling in (str, _without_extension, _key):
            same = [position for position in nearest if spelling(_base(self._paths[position])) == spelling(base)]
            if same:
                return same[0] if len(same) == 1 else -1
        return -1


def _agree(one: str, other: str) -> bool:
    """Whether one folder can be the end of the other: "balanced" and "data/balanced", "" and any."""
    return f"/{one}".endswith(f"/{other}" if other else "") or f"/{other}".endswith(f"/{one}" if one else "")


def _depth(one: str, other: str) -> float:
    """Return how many trailing folders two agreeing paths share; infinite when they are the same."""
    if one == other:
        return float("inf")
    shorter = min(one, other, key=len)
    return len(shorter.split("/")) if shorter else 0
