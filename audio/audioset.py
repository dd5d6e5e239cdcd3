"""AudioSet's own lists and class identifiers.

`balanced_train_segments.csv` and its relatives name segments of videos: comment lines that begin with "#", then
`YTID, start_seconds, end_seconds, positive_labels`, the last one a quoted list of class identifiers ("MIDs", such as
/m/09x0r) with commas. They are read as lists of sounds: `filename` is the sound of that segment below the list's own
folder, under any of the names that downloads of AudioSet have; `labels` are the MIDs, joined by ";".

A MID is a class as well as its display name is: either is found by the other (`other_name`).
"""

import csv
import functools
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
import pyarrow.csv

from audio.io import AUDIO_EXTENSIONS, FOREIGN_EXTENSIONS, find_audio_files
from common.errors import Faults, UserError

logger = logging.getLogger(__name__)

COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
LABEL_TABLE = Path(__file__).resolve().parent.parent / "resources" / "class_labels_indices.csv"

_HEADER = re.compile(
    rb"\A(?:#[^\n]*\n)*#?\s*YTID\s*,\s*start_seconds\s*,\s*end_seconds\s*,\s*positive_labels\s*(?:\n|\Z)"
)
# A "Y" that downloads have before the video's id of 11 characters; start, or start and end, in seconds or milliseconds.
_SOUND = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?")
_NUMBER = r"\d+(?:\.\d+)?"
_MAX_LISTED = 20


@functools.cache
def _other_names() -> dict[str, str]:
    with open(LABEL_TABLE, newline="", encoding="utf-8") as file:
        pairs = [(row[1], row[2]) for row in list(csv.reader(file))[1:]]
    return dict(pairs) | {name: mid for mid, name in pairs}


def other_name(label: str) -> str | None:
    """Return the display name of a MID, or the MID of a display name; None for what AudioSet's table does not hold."""
    return _other_names().get(label)


def display_name(label: str) -> str:
    """Return the display name of a MID of AudioSet's table, any other label as it is."""
    return _other_names().get(label, label) if label.startswith("/") else label


def is_segment_list(content: bytes) -> bool:
    """Whether the content of a file is a list of segments as AudioSet publishes them."""
    return _HEADER.match(content) is not None


def read_segments(path: str | Path, content: bytes) -> pd.DataFrame:
    """Read one of AudioSet's lists of segments as a list of sounds.

    Args:
        path: of the list; sounds are looked for below its folder.
        content: of the file.

    Returns:
        A row a segment: `filename`, relative to the list's folder where the sound was found, else YID_START.wav;
        `labels`, MIDs joined by ";"; `ytid`, `start_seconds`, `end_seconds`, as they stand in the list.

    Raises:
        UserError: lines that are no segments.
    """
    header = _HEADER.match(content)
    start = header.end() if header else 0
    table = _read_regular(content[start:])
    if table is None:
        table = _read_lines(path, content[start:], content[:start].count(b"\n"))
    folder = Path(path).parent
    try:
        sounds = [file.relative_to(folder).as_posix() for file in find_audio_files([folder])]
    except UserError:
        sounds = []
    names = "Y" + table["ytid"] + "_" + table["start_seconds"] + ".wav"
    found = np.array(find_segments(table, sounds), dtype=np.int64)
    there = np.flatnonzero(found >= 0)
    names.iloc[there] = [sounds[place] for place in found[there]]
    logger.info(
        "%s: AudioSet's list of %d segments; %d of them have a sound below %s",
        path, len(table), len(there), folder.resolve(),
    )  # fmt: skip
    table.insert(0, "filename", names)
    return table


def _read_regular(body: bytes) -> pd.DataFrame | None:
    """Read lines that are all segments with a quoted list, as published; None where one is not."""
    names = ["ytid", "start_seconds", "end_seconds", "labels"]
    lines = body.rstrip(b"\n").replace(b", ", b",")
    try:
        found = pyarrow.csv.read_csv(
            io.BytesIO(lines),
            read_options=pyarrow.csv.ReadOptions(column_names=names),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.large_string()), strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid:
        return None
    is_number = [pyarrow.compute.match_substring_regex(found[name], f"^{_NUMBER}$") for name in names[1:3]]
    if found.num_rows != lines.count(b"\n") + 1 or not all(pyarrow.compute.all(mask).as_py() for mask in is_number):
        return None
    for name, odd in (("ytid", r"^#|\s"), ("labels", r'["\s]')):
        if pyarrow.compute.any(pyarrow.compute.match_substring_regex(found[name], odd)).as_py():
            return None
    found = found.set_column(3, "labels", pyarrow.compute.replace_substring(found["labels"], ",", ";"))
    return found.combine_chunks().to_pandas().astype(str)


def _read_lines(path: str | Path, body: bytes, n_above: int) -> pd.DataFrame:
    """Read segments line by line; `n_above` lines are above `body`."""
    rows, faults = [], Faults(str(path), _MAX_LISTED)
    for number, line in enumerate(body.decode("utf-8").split("\n"), n_above + 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split(",", 3)]
        if len(fields) == 4 and _is_number(fields[1]) and _is_number(fields[2]):
            fields[3] = ";".join(mid.strip() for mid in fields[3].strip('"').split(","))
            rows.append(fields)
            continue
        faults.add(f'line {number}: found {line!r}, expected {", ".join(COLUMNS)} with the last one in "quotes"')
    faults.raise_if_any()
    return pd.DataFrame(rows, columns=["ytid", "start_seconds", "end_seconds", "labels"], dtype=str)


def is_segment_table(table: pd.DataFrame) -> bool:
    """Whether a table was read by `read_segments`."""
    return {"filename", "ytid", "start_seconds", "end_seconds"} <= set(table.columns)


def find_segments(table: pd.DataFrame, sounds: Sequence[str]) -> list[int]:
    """Return for each segment the position of its sound in `sounds`, -1 where there is none.

    The names that are known: the id, with or without "Y" before it, with nothing, the start, or start and end behind
    it, each after "_" and in seconds ("30", "30.000") or milliseconds ("30000"); any extension of sound. Of several the
    one with most details of the segment is taken, then the first.
    """
    of_id: dict[str, list[tuple[int, list[float]]]] = {}
    for place, name in enumerate(sounds):
        stem, _, extension = name.rpartition("/")[2].rpartition(".")
        if f".{extension.lower()}" not in AUDIO_EXTENSIONS | FOREIGN_EXTENSIONS:
            stem = name.rpartition("/")[2]
        if found := _SOUND.fullmatch(stem):
            of_id.setdefault(found[1], []).append((place, [float(text) for text in found.groups()[1:] if text]))
    if not of_id:
        return [-1] * len(table)
    result = []
    for ytid, start, end in zip(table["ytid"], table["start_seconds"], table["end_seconds"], strict=True):
        best, most = -1, -1
        if ytid in of_id:
            span = [float(start), float(end)]
            for place, times in of_id[ytid]:
                if len(times) > most and _agree(times, span):
                    best, most = place, len(times)
        result.append(best)
    return result


def _agree(times: list[float], span: list[float]) -> bool:
    return any(times == [scale * time for time in span[: len(times)]] for scale in (1, 1000))


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text) is not None
