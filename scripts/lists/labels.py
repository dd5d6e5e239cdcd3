"""Lists of clips: the labels that folders, names or a table give the sounds of a folder.

The lists themselves are manifests (`audio.manifest`): tab-separated, with the columns `filename` and `labels`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from audio.audioset import find_segments, is_segment_table
from audio.labels import SEPARATOR
from audio.manifest import NameIndex, read_manifest
from common.errors import UserError, did_you_mean, some
from scripts.lists.name_patterns import NamePattern, Proposal, choose_label, propose_labels
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
LABEL = "label"  # the placeholder of patterns

_LINE_BREAKS = re.compile(r"[\r\n]+")


@dataclass(frozen=True)
class LabelOptions:
    """Where the labels of a folder's sounds come from.

    Attributes:
        pattern: of names, see `scripts.lists.name_patterns`.
        table: path of a table (tsv or csv) with a header.
        filename_column: of the table; guessed where "".
        label_column: of the table; guessed where "", no labels where "none".
        label_separator: between the labels of a cell of the table; ";" separates in any case.
        label_level: which folder below the root is the label: "first", "last", a number from 1, or "none" for no
            labels; "" where it is not given.
    """

    pattern: str = ""
    table: str = ""
    filename_column: str = ""
    label_column: str = ""
    label_separator: str = ";"
    label_level: str = ""


@dataclass
class Clips:
    """Sounds of a folder and what is known of them.

    Attributes:
        table: a row a clip, sorted by `filename` (relative to the folder); `labels`, joined by ";", unless there are
            none; and all columns of the pattern and the table. Every value is a string.
        source: in words, where the labels come from.
        notes: sentences on what was left out or deserves a look.
        pattern: that gave columns, or None.
    """

    table: pd.DataFrame
    source: str
    notes: list[str] = field(default_factory=list)
    pattern: NamePattern | None = None

    @property
    def has_labels(self) -> bool:
        """Whether there is a column of labels."""
        return "labels" in self.table

    def keep(self, rows: pd.Series, why: str) -> None:
        """Drop all rows but those where `rows` holds, with a note: `why` says what the others are."""
        dropped = self.table["filename"][~rows].tolist()
        if dropped:
            self.notes.append(f"left out: {why}: {len(dropped)} ({some(dropped, 3)})")
            self.table = self.table[rows].reset_index(drop=True)


def label_sounds(sounds: SoundFolder, options: LabelOptions) -> Clips:
    """Give the sounds of a folder their labels and columns.

    Raises:
        UserError: options that do not go together, a table or a pattern that fits no sound, or no labels found.
    """
    pattern = NamePattern(options.pattern) if options.pattern else None
    has_label = pattern is not None and LABEL in pattern.columns
    level = options.label_level
    if level not in ("", "first", "last", "none") and not (level.isdecimal() and int(level) > 0):
        raise UserError(f"--label_level is {level!r}; wanted first, last, a number such as 2, or none (no labels)")
    if has_label and (options.table or level):
        other = "--table" if options.table else "--label_level"
        raise UserError(f"labels come from the {{label}} of --pattern or from {other}: leave one of them out")
    if options.table:
        if level not in ("", "none"):
            raise UserError("labels come from the folders (--label_level) or from --table: leave one of them out")
        clips = _label_by_table(sounds, options)
    elif pattern is not None and has_label:
        clips = Clips(pd.DataFrame({"filename": sounds.names}), f"the pattern '{pattern.text}'")
    elif pattern is not None and not level:
        raise UserError(
            f"--pattern {options.pattern!r} has no {{label}}; put it where the label is, or add --label_level first "
            "(labels from the folders), --label_level none (no labels) or --table"
        )
    elif level == "none":
        clips = Clips(pd.DataFrame({"filename": sounds.names}), "none")
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
    """Warn of names of folders or files that are read as several labels, since they hold the mark between labels."""
    cells = clips.table["labels"].value_counts(sort=False)
    held = [f"{cell!r} ({n} sounds: {clean_labels(cell)})" for cell, n in cells.items() if SEPARATOR in cell]
    if held:
        clips.notes.append(
            f"the mark {SEPARATOR!r} joins several labels of a sound, so these names give several: {some(held)}; "
            "rename what is one label (with a comma, say), and make the lists again"
        )


def _clean_column(clips: Clips) -> None:
    given = sorted(set(clips.table["labels"]))
    cleaned = {cell: clean_labels(cell) for cell in given}
    ways: dict[str, list[str]] = {}
    for cell, labels in cleaned.items():
        ways.setdefault(labels, []).append(cell)
    several = [" and ".join(map(repr, cells)) for labels, cells in ways.items() if len(cells) > 1 and labels]
    if several:
        clips.notes.append(f"spaces around labels do not count, so these are the same: {some(several, 3)}")
    clips.table["labels"] = clips.table["labels"].map(cleaned).astype(str)


def _drop_unlabelled(clips: Clips, sounds: SoundFolder) -> None:
    n_several = int(clips.table["labels"].str.contains(";", regex=False).sum())
    labelled = clips.table["labels"] != ""
    if not labelled.any():
        raise UserError(f"{sounds.root}: none of its {len(clips.table)} sounds has a label (from {clips.source})")
    clips.keep(labelled, "sounds without a label")
    if n_several:
        example = clips.table["labels"][clips.table["labels"].str.contains(";", regex=False)].iloc[0]
        clips.notes.append(f"sounds with several labels, joined by ';': {n_several} (such as {example!r})")


def _add_pattern_columns(clips: Clips, pattern: NamePattern) -> None:
    """Add the columns of a pattern; without labels of their own, sounds that do not fit are left out."""
    names = clips.table["filename"].tolist()
    found = [pattern.match(name) for name in names]
    misfits = [name for name, values in zip(names, found, strict=True) if values is None]
    if len(misfits) == len(names):
        raise UserError(
            f"--pattern {pattern.text!r} fits none of the {len(names)} names, such as {some(misfits[:2])}; {{name}} "
            'and {} stand for any text without "/"; a pattern with "/" is matched against the path below the folder'
        )
    clash = [column for column in pattern.columns if column in clips.table]
    if clash:
        raise UserError(f"--pattern {pattern.text!r}: the table has a column {clash[0]!r} already; take another name")
    for number, column in enumerate(pattern.columns):
        values = ["" if row is None else row[number] for row in found]
        clips.table["labels" if column == LABEL else column] = pd.Series(values, dtype=str)
    clips.pattern = pattern
    clips.notes.append(_describe_reading(pattern, names, found))
    if LABEL in pattern.columns:
        fits = pd.Series([values is not None for values in found])
        clips.keep(fits, "sounds whose names do not fit the pattern")
    elif misfits:
        clips.notes.append(
            f"names that do not fit the pattern, with empty columns: {len(misfits)} ({some(misfits, 3)})"
        )


def _describe_reading(pattern: NamePattern, names: Sequence[str], found: Sequence[list[str] | None]) -> str:
    """Return how a name is read: one that could be read otherwise where there is such."""
    example, other = -1, None
    for row, values in enumerate(found):
        if values is not None:
            example = row if example < 0 else example
            other = pattern.other_match(names[row])
            if other != values:
                example = row
                break
            other = None
    read = found[example]
    assert read is not None
    columns = ", ".join(f"{column} {value!r}" for column, value in zip(pattern.columns, read, strict=True))
    text = f"the pattern reads {names[example]} as {columns}"
    if other is None or other == read:
        return text
    longer = ", ".join(
        f"{column} {value!r}" for column, value, now in zip(pattern.columns, other, read, strict=True) if value != now
    )
    return f"{text} ({longer} would fit as well; {{:d}} for a whole number makes a pattern stricter)"


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
                f"{sounds.root}: its folders {some(sorted(first))} look like lists rather than labels; give --pattern "
                "'{split}/{label}/{}' to take them as such, or --label_level first if they are labels"
            )
    place = {"": 0, "first": 0, "last": -1}.get(level)
    place = int(level) - 1 if place is None else place
    table["labels"] = pd.Series([parts[place] if parts and place < len(parts) else "" for parts in folders], dtype=str)
    which = {"": "first", "first": "first", "last": "last"}.get(level)
    source = f"the {which} folder" if which else f"folder number {level}"
    clips = Clips(table, f"{source} below {sounds.root}" if which != "last" else "the last folder of each path")
    deepest = {parts[-1] for parts in folders if parts}
    if not level and any(len(parts) > 1 for parts in folders):
        clips.notes.append(
            f"some sounds lie deeper; their first folder is taken ({len(first)} labels), --label_level last would give "
            f"{len(deepest)}, such as {some(sorted(deepest), 3)}"
        )
    return clips, pattern


def _label_by_guess(sounds: SoundFolder, folders: list[list[str]]) -> tuple[Clips, NamePattern]:
    """Take a pattern of names that leaves no doubt, where folders give no labels; else say what was found."""
    proposals = propose_labels(sounds.names)
    chosen = choose_label(proposals)
    where = "its sounds lie in one folder" if any(folders) else "it has no subfolders"
    if chosen is None or any(len(parts) > 1 for parts in folders):
        raise UserError(_no_labels(sounds, folders, proposals, where))
    clips = Clips(
        pd.DataFrame({"filename": sounds.names}),
        f"the pattern '{chosen.pattern}', since {where} and {len(chosen.values)} values fit",
    )
    return clips, NamePattern(chosen.pattern)


def _no_labels(sounds: SoundFolder, folders: list[list[str]], proposals: list[Proposal], where: str) -> str:
    found = f"{sounds.root}: {where} that would give labels to its {len(sounds.names)} sounds"
    if any(len(parts) > 1 for parts in folders):
        second = sorted({parts[1] for parts in folders if len(parts) > 1})
        found += f"; --label_level 2 would take the {len(second)} folders below it ({some(second, 3)})"
    elif proposals:
        found += f"; parts of their names that take few values: {' or '.join(map(str, proposals))}"
    else:
        found += f", and no part of their names takes few values (such as {some(sounds.names[:2])})"
    return (
        f"{found}; say where labels are with --pattern '{{label}}_{{}}', --table TABLE.csv or --label_level, or give "
        "--label_level none for lists without labels"
    )


def _label_by_table(sounds: SoundFolder, options: LabelOptions) -> Clips:
    path = options.table
    table = read_manifest(path, required=(), delimiter=_find_delimiter(path))
    names = _choose_column(table, path, options.filename_column, FILENAME_COLUMNS, "filename_column", "file names")
    unlabelled = "none" in (options.label_column, options.label_level)
    labels = ""
    if not unlabelled:
        labels = _choose_column(
            table, path, options.label_column, LABEL_COLUMNS, "label_column", "labels", " (or none for no labels)"
        )
    listed = table[names].tolist()
    if is_segment_table(table):  # AudioSet's own, which names videos
        found = np.array(find_segments(table, sounds.names), dtype=np.int64)
    else:
        found = NameIndex(sounds.names).find_all(listed)
    missing = [name for name, row in zip(listed, found, strict=True) if row < 0]
    if len(missing) == len(listed):
        raise UserError(
            f"{path}: none of the {len(listed)} names in its column {names!r} is a sound in {sounds.root}; found there "
            f"{some(sounds.names[:2])}, wanted {some(missing[:2])}"
        )
    clips = Clips(pd.DataFrame(), f"the column {labels!r} of {path} (names in {names!r})" if labels else "none")
    known = table[found >= 0]
    columns = {"filename": [sounds.names[row] for row in found if row >= 0]}
    _note_differences(clips, path, sounds, missing, set(columns["filename"]))
    if labels:
        given = known[labels].tolist()
        cleaned = {cell: clean_labels(cell, options.label_separator) for cell in set(given)}
        columns["labels"] = [cleaned[cell] for cell in given]
        clips.notes += _suggest_separator(set(given), set(cleaned.values()))
    for column in map(str, table.columns):
        if column not in (names, labels):
            kept_as = f"{column}_in_table" if column in ("filename", "labels") else column
            columns[kept_as] = [_LINE_BREAKS.sub(" ", cell) for cell in known[column]]
    clips.table = _join_rows(pd.DataFrame(columns, dtype=str), clips).sort_values("filename", ignore_index=True)
    return clips


def _find_delimiter(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline()
    except OSError as error:
        what = (
            "there is no such table" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise UserError(f"{path}: {what}") from None
    return "\t" if "\t" in header else max(",;", key=header.count)


def _choose_column(
    table: pd.DataFrame, path: str, given: str, usual: Sequence[str], option: str, what: str, or_else: str = ""
) -> str:
    """Return the column given, or the first usual one that the table has, in any case."""
    if given:
        if given not in table:
            read_manifest(path, required=(given,), delimiter=_find_delimiter(path))  # raises, with the nearest name
        return given
    columns = {str(column).strip().lower(): str(column) for column in reversed(table.columns)}
    chosen = next((columns[name] for name in usual if name in columns), None)
    if chosen is None:
        nearest = next((near for name in usual if (near := did_you_mean(name, columns))), "")
        raise UserError(
            f"{path}: found the columns {some(map(repr, table.columns), 20)}, none of which is a usual one of {what} "
            f"({some(usual)}); name it with --{option}{or_else}{nearest}"
        )
    return chosen


def _note_differences(clips: Clips, path: str, sounds: SoundFolder, missing: list[str], named: set[str]) -> None:
    if missing:
        clips.notes.append(
            f"names of {path} that no sound below {sounds.root} has, or several have: {len(missing)} "
            f"({some(missing, 3)})"
        )
    others = [name for name in sounds.names if name not in named]
    if others:
        clips.notes.append(f"left out: sounds that {path} does not name: {len(others)} ({some(others, 3)})")


def _suggest_separator(given: set[str], labels: set[str]) -> list[str]:
    """Advise on labels that look joined by commas: there are fewer kinds of parts than of whole cells."""
    joined = {cell for cell in labels if re.search(r"[^,\s]\s*,\s*[^,\s]", cell)}
    parts = {part.strip() for cell in labels for part in re.split("[,;]", cell)}
    if not joined or len(parts) >= len(given):
        return []
    return [
        f"labels that hold a comma: {len(joined)} of {len(given)} (such as {min(joined)!r}); with --label_separator , "
        f"there would be {len(parts)}"
    ]


def _join_rows(table: pd.DataFrame, clips: Clips) -> pd.DataFrame:
    """Make one row of the rows of each file: their labels together, other columns as in the first."""
    if not table["filename"].duplicated().any():
        return table
    if "labels" in table:
        joined = table.groupby("filename", sort=False)["labels"].agg(lambda cells: clean_labels(";".join(cells)))
    once = table.drop_duplicates("filename", ignore_index=True)
    if "labels" in table:
        once["labels"] = once["filename"].map(joined).astype(str)
    clips.notes.append(
        f"rows of the table that name a sound again: {len(table) - len(once)}; labels are joined, other columns are "
        "those of its first row"
    )
    return once
