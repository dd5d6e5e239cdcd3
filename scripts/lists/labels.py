"""Labels of the sounds of a folder: from folders, from patterns of names, or from a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from audio.audioset import find_segments, is_segment_table
from audio.labels import SEPARATOR
from audio.manifest import NameIndex, read_manifest
from audio.tables import load_text
from common.errors import UserError, did_you_mean, some
from scripts.lists.name_patterns import NamePattern, Proposal, choose_label, propose_labels
from scripts.lists.options import ListOptions
from scripts.lists.sound_folders import SoundFolder
from scripts.lists.splits import LIST_WORDS

FILENAME_COLUMNS = (
    *("filename", "file", "path", "fname", "file_name", "filepath", "file_path", "slice_file_name"),
    *("audio", "audio_file", "audio_path", "wav", "clip", "name"),
)
LABEL_COLUMNS = (
    *("labels", "label", "category", "class", "target", "class_name", "class_label", "event_label"),
    *("primary_label", "tags", "tag", "word"),
)
LABEL = "label"  # placeholder of patterns

_LINE_BREAKS = re.compile(r"[\r\n]+")


@dataclass
class Clips:
    """Sounds of a folder with their labels and other columns.

    Attributes:
        table: one row for each clip, sorted by `filename` (relative to the folder); `labels`, joined by ";", if there
            are any; and all columns of the pattern and the table. Every value is a string.
        source: of the labels, as text.
        notes: for the report.
    """

    table: pd.DataFrame
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def has_labels(self) -> bool:
        """Whether there is a column of labels."""
        return "labels" in self.table

    def keep(self, rows: pd.Series, why: str) -> None:
        """Keep the rows where `rows` is true; `why` describes the others in a note."""
        dropped = self.table["filename"][~rows].tolist()
        if dropped:
            self.notes.append(f"skipped: {why}: {len(dropped)} ({some(dropped, 3)})")
            self.table = self.table[rows].reset_index(drop=True)


def label_sounds(sounds: SoundFolder, options: ListOptions) -> Clips:
    """Find the labels and columns of the sounds of a folder.

    Raises:
        UserError: options that cannot be combined, a table or a pattern that matches no sound, or no labels.
    """
    pattern = NamePattern(options.pattern) if options.pattern else None
    has_label = pattern is not None and LABEL in pattern.columns
    level = options.label_level
    if level not in ("", "first", "last", "none") and not (level.isdecimal() and int(level) > 0):
        raise UserError(f"--label_level is {level!r}; expected first, last, a number such as 2, or none (no labels)")
    if has_label and (options.table or level):
        other = "--table" if options.table else "--label_level"
        raise UserError(f"labels come from the {{label}} of --pattern or from {other}: omit one of them")
    if options.table:
        if level not in ("", "none"):
            raise UserError("labels come from the folders (--label_level) or from --table: omit one of them")
        clips = _label_by_table(sounds, options)
    elif pattern is not None and not (has_label or level):
        raise UserError(
            f"--pattern {options.pattern!r} has no {{label}}; put it where the label is, or add --label_level first "
            "(labels from the folders), --label_level none (no labels) or --table"
        )
    elif has_label or level == "none":
        source = f"the pattern '{options.pattern}'" if has_label else "none"
        clips = Clips(pd.DataFrame({"filename": sounds.names}), source)
    else:
        clips, pattern = _label_by_folder_or_guess(sounds, level, pattern)
    if pattern is not None:
        _add_pattern_columns(clips, pattern)
    if clips.has_labels:
        if not options.table:
            _note_separators(clips)
        _clean_column(clips)
        _drop_unlabelled(clips, sounds)
    return clips


def clean_labels(cell: str, separator: str = ";") -> str:
    """Return the labels of a cell joined by ";", without spaces around them, each once."""
    parts = [part.strip() for whole in cell.split(";") for part in whole.split(separator)]
    return ";".join(dict.fromkeys(_LINE_BREAKS.sub(" ", part) for part in parts if part))


def _note_separators(clips: Clips) -> None:
    """Add a note on names of folders or files with the separator of labels, which are read as several labels."""
    cells = clips.table["labels"].value_counts(sort=False)
    several = [f"{cell!r} ({n} sounds: {clean_labels(cell)})" for cell, n in cells.items() if SEPARATOR in cell]
    if several:
        clips.notes.append(
            f"{SEPARATOR!r} separates the labels of a sound, so these names are several labels: {some(several)}; "
            "rename what is one label (for example with a comma), and make the lists again"
        )


def _clean_column(clips: Clips) -> None:
    cleaned = {cell: clean_labels(cell) for cell in sorted(set(clips.table["labels"]))}
    spellings: dict[str, list[str]] = {}
    for cell, labels in cleaned.items():
        spellings.setdefault(labels, []).append(cell)
    equal = [" and ".join(map(repr, cells)) for labels, cells in spellings.items() if len(cells) > 1 and labels]
    if equal:
        clips.notes.append(f"spaces around labels are ignored, so these are the same: {some(equal, 3)}")
    clips.table["labels"] = clips.table["labels"].map(cleaned).astype(str)


def _drop_unlabelled(clips: Clips, sounds: SoundFolder) -> None:
    labelled = clips.table["labels"] != ""
    if not labelled.any():
        raise UserError(f"{sounds.root}: none of its {len(clips.table)} sounds has a label (from {clips.source})")
    clips.keep(labelled, "sounds without a label")
    several = [cell for cell in clips.table["labels"] if ";" in cell]
    if several:
        clips.notes.append(f"sounds with several labels, joined by ';': {len(several)} (such as {several[0]!r})")


def _add_pattern_columns(clips: Clips, pattern: NamePattern) -> None:
    """Add the columns of a pattern; if labels come from it, sounds that do not match are dropped."""
    names = clips.table["filename"].tolist()
    found = [pattern.match(name) for name in names]
    misfits = [name for name, values in zip(names, found, strict=True) if values is None]
    if len(misfits) == len(names):
        raise UserError(
            f"--pattern {pattern.text!r} matches none of the {len(names)} names, such as {some(misfits[:2])}; {{name}} "
            'and {} stand for any text without "/"; a pattern with "/" is matched against the path below the folder'
        )
    clash = [column for column in pattern.columns if column in clips.table]
    if clash:
        raise UserError(f"--pattern {pattern.text!r}: the table has a column {clash[0]!r} already; use another name")
    for number, column in enumerate(pattern.columns):
        values = ["" if row is None else row[number] for row in found]
        clips.table["labels" if column == LABEL else column] = pd.Series(values, dtype=str)
    matches = [(name, values) for name, values in zip(names, found, strict=True) if values is not None]
    clips.notes.append(_describe_match(pattern, matches))
    if LABEL in pattern.columns:
        is_match = pd.Series([values is not None for values in found])
        clips.keep(is_match, "sounds whose names do not match the pattern")
    elif misfits:
        clips.notes.append(
            f"names that do not match the pattern, with empty columns: {len(misfits)} ({some(misfits, 3)})"
        )


def _describe_match(pattern: NamePattern, matches: Sequence[tuple[str, list[str]]]) -> str:
    """Return the columns of one name, preferably of one with another possible match."""
    ambiguous = (match for match in matches if pattern.match_other(match[0]) != match[1])
    name, values = next(ambiguous, matches[0])
    columns = ", ".join(f"{column} {value!r}" for column, value in zip(pattern.columns, values, strict=True))
    text = f"the pattern matches {name} with {columns}"
    other = pattern.match_other(name)
    if other is None or other == values:
        return text
    rows = zip(pattern.columns, other, values, strict=True)
    differing = ", ".join(f"{column} {longer!r}" for column, longer, value in rows if longer != value)
    return f"{text} ({differing} would match as well; {{:d}} for a whole number makes a pattern stricter)"


def _label_by_folder_or_guess(
    sounds: SoundFolder, level: str, pattern: NamePattern | None
) -> tuple[Clips, NamePattern | None]:
    table = pd.DataFrame({"filename": sounds.names})
    folders = [name.split("/")[:-1] for name in sounds.names]
    first = {parts[0] for parts in folders if parts}
    if not level:
        if len(first) < 2:
            return _label_by_guess(sounds, folders)
        if all(name.lower() in LIST_WORDS for name in first):
            raise UserError(
                f"{sounds.root}: its folders {some(sorted(first))} look like lists rather than labels; use "
                "--pattern '{split}/{label}/{}' for lists, or --label_level first for labels"
            )
    if level == "last":
        index, source = -1, "the last folder of each path"
    elif level in ("", "first"):
        index, source = 0, f"the first folder below {sounds.root}"
    else:
        index, source = int(level) - 1, f"folder number {level} below {sounds.root}"
    table["labels"] = pd.Series([parts[index] if parts and index < len(parts) else "" for parts in folders], dtype=str)
    clips = Clips(table, source)
    if not level and any(len(parts) > 1 for parts in folders):
        deepest = sorted({parts[-1] for parts in folders if parts})
        clips.notes.append(
            f"some sounds are in deeper folders; their label is the first folder ({len(first)} labels), --label_level "
            f"last would give {len(deepest)}, such as {some(deepest, 3)}"
        )
    return clips, pattern


def _label_by_guess(sounds: SoundFolder, folders: list[list[str]]) -> tuple[Clips, NamePattern]:
    """Guess the pattern of names, if folders give no labels and there is only one candidate.

    Raises:
        UserError: with the candidates, if there is none or several.
    """
    proposals = propose_labels(sounds.names)
    chosen = choose_label(proposals)
    why = "its sounds are in one folder" if any(folders) else "it has no subfolders"
    if chosen is None or any(len(parts) > 1 for parts in folders):
        raise UserError(_describe_missing_labels(sounds, folders, proposals, why))
    clips = Clips(
        pd.DataFrame({"filename": sounds.names}),
        f"the pattern '{chosen.pattern}', since {why} and {len(chosen.values)} values match",
    )
    return clips, NamePattern(chosen.pattern)


def _describe_missing_labels(sounds: SoundFolder, folders: list[list[str]], proposals: list[Proposal], why: str) -> str:
    text = f"{sounds.root}: its {len(sounds.names)} sounds have no labels, since {why}"
    if any(len(parts) > 1 for parts in folders):
        second = sorted({parts[1] for parts in folders if len(parts) > 1})
        text += f"; --label_level 2 would use the {len(second)} folders below it ({some(second, 3)})"
    elif proposals:
        text += f"; parts of their names with few values: {' or '.join(map(str, proposals))}"
    else:
        text += f", and no part of their names has few values (such as {some(sounds.names[:2])})"
    return (
        f"{text}; name the source of labels with --pattern '{{label}}_{{}}', --table TABLE.csv or --label_level, or "
        "use --label_level none for lists without labels"
    )


def _label_by_table(sounds: SoundFolder, options: ListOptions) -> Clips:
    path = options.table
    table = read_manifest(path, required=(), delimiter=find_delimiter(path))
    names = _choose_column(table, path, options.filename_column, FILENAME_COLUMNS, "filename_column", "file names")
    labels = ""
    if "none" not in (options.label_column, options.label_level):
        labels = _choose_column(
            table, path, options.label_column, LABEL_COLUMNS, "label_column", "labels", " (or none for no labels)"
        )
    listed_names = table[names].tolist()
    if is_segment_table(table):  # AudioSet's, with names of videos
        found = np.array(find_segments(table, sounds.names), dtype=np.int64)
    else:
        found = NameIndex(sounds.names).find_all(listed_names)
    missing = [name for name, row in zip(listed_names, found, strict=True) if row < 0]
    if len(missing) == len(listed_names):
        raise UserError(
            f"{path}: none of the {len(listed_names)} names in its column {names!r} is a sound in {sounds.root}; found "
            f"there {some(sounds.names[:2])}, expected {some(missing[:2])}"
        )
    clips = Clips(pd.DataFrame(), f"the column {labels!r} of {path} (names in {names!r})" if labels else "none")
    rows = table[found >= 0]
    columns = {"filename": [sounds.names[row] for row in found if row >= 0]}
    _note_differences(clips, path, sounds, missing, set(columns["filename"]))
    if labels:
        given = rows[labels].tolist()
        cleaned = {cell: clean_labels(cell, options.label_separator) for cell in set(given)}
        columns["labels"] = [cleaned[cell] for cell in given]
        clips.notes += _suggest_separator(set(given), set(cleaned.values()))
    for column in map(str, table.columns):
        if column not in (names, labels):
            new_name = f"{column}_in_table" if column in ("filename", "labels") else column
            columns[new_name] = [_LINE_BREAKS.sub(" ", cell) for cell in rows[column]]
    clips.table = _join_rows(pd.DataFrame(columns, dtype=str), clips).sort_values("filename", ignore_index=True)
    return clips


def find_delimiter(path: str) -> str:
    """Return the mark that separates the columns of a table: a tab, a comma or a semicolon."""
    header = load_text(path).partition(b"\n")[0].decode(errors="replace")
    return "\t" if "\t" in header else max(",;", key=header.count)


def _choose_column(
    table: pd.DataFrame, path: str, given: str, usual: Sequence[str], option: str, what: str, or_else: str = ""
) -> str:
    """Return the column given, or the first usual one of the table, in upper or lower case."""
    if given:
        if given not in table:
            read_manifest(path, required=(given,), delimiter=find_delimiter(path))  # raises, with the nearest name
        return given
    columns = {str(column).strip().lower(): str(column) for column in reversed(table.columns)}
    chosen = next((columns[name] for name in usual if name in columns), None)
    if chosen is None:
        nearest = next((near for name in usual if (near := did_you_mean(name, columns))), "")
        raise UserError(
            f"{path}: found the columns {some(map(repr, table.columns), 20)}, none of which is usual for {what} "
            f"({some(usual)}); give it with --{option}{or_else}{nearest}"
        )
    return chosen


def _note_differences(clips: Clips, path: str, sounds: SoundFolder, missing: list[str], named: set[str]) -> None:
    if missing:
        clips.notes.append(
            f"names of {path} that match no sound below {sounds.root}, or several: {len(missing)} ({some(missing, 3)})"
        )
    others = [name for name in sounds.names if name not in named]
    if others:
        clips.notes.append(f"skipped: sounds that are not in {path}: {len(others)} ({some(others, 3)})")


def _suggest_separator(given: set[str], labels: set[str]) -> list[str]:
    """Suggest commas as separator if there are fewer different parts than cells."""
    joined = {cell for cell in labels if re.search(r"[^,\s]\s*,\s*[^,\s]", cell)}
    parts = {part.strip() for cell in labels for part in re.split("[,;]", cell)}
    if not joined or len(parts) >= len(given):
        return []
    return [
        f"labels with a comma: {len(joined)} of {len(given)} (such as {min(joined)!r}); with --label_separator , "
        f"there would be {len(parts)}"
    ]


def _join_rows(table: pd.DataFrame, clips: Clips) -> pd.DataFrame:
    """Join the rows of each file: all labels, and the other columns of its first row."""
    unique = table.drop_duplicates("filename", ignore_index=True)
    if len(unique) == len(table):
        return table
    if "labels" in table:
        joined = table.groupby("filename", sort=False)["labels"].agg(lambda cells: clean_labels(";".join(cells)))
        unique["labels"] = unique["filename"].map(joined).astype(str)
    clips.notes.append(
        f"further rows of the table for the same sound: {len(table) - len(unique)}; labels are joined, other columns "
        "are those of its first row"
    )
    return unique
