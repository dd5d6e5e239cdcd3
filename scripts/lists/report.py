"""What make_lists.py prints: what was found, what was decided, a table of labels, warnings."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from audio.labels import describe_lookalikes
from common.columns import align_columns
from common.errors import some
from scripts.lists.groups import Groups
from scripts.lists.sound_folders import SoundFolder, count_extensions
from scripts.lists.splits import Split, count_crossing

_MOST_ROWS = 30
_MOST_FOLDS_SHOWN = 10
_HEAD = 12


def printable(text: str) -> str:
    """Return text that a terminal can show: control characters and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(head: str, text: str) -> str:
    """Return a line of the report."""
    return f"{head:<{_HEAD}}{printable(text)}"


def describe_folder(sounds: SoundFolder, n_clips: int) -> list[str]:
    """Say what a folder holds, and what of it cannot be in a list."""
    lines = [line("found", f"{len(sounds.names):,} sounds below {sounds.root}, {n_clips:,} of them in the lists")]
    if sounds.not_sounds:
        lines.append(line("left out", f"files that are no sounds: {count_extensions(sounds.not_sounds)}"))
    if sounds.foreign:
        formats = count_extensions(sounds.foreign)
        lines.append(line("left out", f"sounds that cannot be decoded: {formats}; convert them to .flac"))
    if sounds.not_utf8:
        text = f"names that are no UTF-8 on disk, as Windows-1252 reads them: {len(sounds.not_utf8):,}"
        lines.append(line("", f"{text} ({some(sounds.not_utf8, 3)})"))
    for names, what in (
        (sounds.empty, "empty files"),
        (sounds.unlistable, "files with names that no list can hold (a line break, or two names that read alike)"),
        (sounds.broken_links, "broken links"),
        (sounds.repeated_links, "links to folders that are listed under another name"),
    ):
        if names:
            lines.append(line("left out", f"{what}: {len(names):,} ({some(names, 3)})"))
    return lines


class LabelCounts:
    """Clips and groups of each label, and clips in each part (list or fold).

    Args:
        labels: of each clip, joined by ";"; "" is counted as the label "(all)" where there are no labels.
        parts: the list or fold of each clip.
        groups: of each clip.

    Attributes:
        clips: label → part → number.
        groups: label → number of groups.
        names: the labels, the most frequent first.
    """

    def __init__(self, labels: Sequence[str], parts: Sequence[str], groups: Groups) -> None:
        self.clips: dict[str, Counter[str]] = {}
        for (cell, part), n in Counter(zip(labels, parts, strict=True)).items():
            for label in cell.split(";"):
                self.clips.setdefault(label, Counter())[part] += n
        self.groups = {label: counts.total() for label, counts in self.clips.items()}
        if groups.columns or groups.identical:
            of_label: dict[str, set[int]] = {}
            for cell, group in set(zip(labels, groups.joined.tolist(), strict=True)):
                for label in cell.split(";"):
                    of_label.setdefault(label, set()).add(group)
            self.groups = {label: len(found) for label, found in of_label.items()}
        self.names = sorted(self.clips, key=lambda label: (-self.clips[label].total(), label))


def describe_lists(table: pd.DataFrame, split: Split, groups: Groups) -> list[str]:
    """Return the table of labels and the warnings."""
    labels = table["labels"].tolist() if "labels" in table else ["(no labels)"] * len(table)
    parts, names = split.lists, split.names
    if split.folds is not None and len(set(split.folds)) <= _MOST_FOLDS_SHOWN:
        parts = [f"fold {fold}" for fold in split.folds]
        names = list(dict.fromkeys(f"fold {fold}" for fold in sorted(set(split.folds), key=lambda f: (len(f), f))))
    counts = LabelCounts(labels, parts, groups)
    lines = ["", *_lay_out(counts, names, parts, groups), ""]
    lines += [line("warning", text) for text in _warn(counts, names, split, groups)]
    return lines


def _lay_out(counts: LabelCounts, names: list[str], parts: list[str], groups: Groups) -> list[str]:
    grouped = bool(groups.columns or groups.identical)
    rows = [["label", *names, *(["groups"] if grouped else [])]]
    shown = counts.names if len(counts.names) <= _MOST_ROWS else counts.names[: _MOST_ROWS - 1]
    for label in shown:
        rows.append([label, *(str(counts.clips[label][name]) for name in names)])
        if grouped:
            rows[-1].append(str(counts.groups[label]))
    rest = counts.names[len(shown) :]
    if rest:
        summed = [str(sum(counts.clips[label][name] for label in rest)) for name in names]
        rows.append([f"{len(rest):,} labels more", *summed, *([""] if grouped else [])])
    of_part = Counter(parts)
    all_groups = [str(len(set(groups.joined.tolist())))] if grouped else []
    rows.append(["clips", *(str(of_part[name]) for name in names), *all_groups])
    cells = [[printable(row[0]), *row[1:]] for row in rows]
    return align_columns(cells, others=">")


def _warn(counts: LabelCounts, names: list[str], split: Split, groups: Groups) -> list[str]:
    warnings = []
    absent = [label for label in counts.names if any(not counts.clips[label][name] for name in names)]
    if absent:
        grouped = bool(groups.columns or groups.identical)
        entries = [
            f"{label} (clips {counts.clips[label].total()}"
            + (f", groups {counts.groups[label]}" if grouped else "")
            + f", none in {' and '.join(name for name in names if not counts.clips[label][name])})"
            for label in reversed(absent)
        ]
        what = "fold" if split.folds else "list"
        warnings.append(f"labels with too few clips or groups to be in every {what}: {len(absent)}; {some(entries, 6)}")
    counted = {label: counts.clips[label].total() for label in counts.names}
    warnings += [lookalikes] if (lookalikes := describe_lookalikes(counted)) else []
    if split.published:
        warnings += _warn_of_leaks(split, groups)
    return warnings


def _warn_of_leaks(split: Split, groups: Groups) -> list[str]:
    parts = split.folds or split.lists
    warnings = []
    where = "fold" if split.folds else "list"
    if groups.columns and (n_crossing := count_crossing(groups.by_column, parts)):
        n_groups = len(set(groups.by_column.tolist()))
        by = " and ".join(groups.columns)
        warnings.append(f"{n_crossing:,} of {n_groups:,} groups (by {by}) are in more than one published {where}")
    n_sets = sum(len({parts[row] for row in rows}) > 1 for rows in groups.identical)
    if n_sets:
        warnings.append(f"{n_sets:,} sets of identical files are in more than one published {where}")
    return warnings
