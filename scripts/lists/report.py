"""The report of make_lists.py: the sounds, the choices, a table of labels, and warnings."""

import pandas as pd

from audio.labels import describe_lookalikes
from audio.selection import Selection
from common.columns import align_columns
from common.errors import some
from scripts.lists.groups import Groups
from scripts.lists.sound_folders import SoundFolder
from scripts.lists.splits import Split, count_split_groups

_MAX_ROWS = 30
_MAX_FOLD_COLUMNS = 10
_TITLE_WIDTH = 12


def escape_text(text: str) -> str:
    """Replace control characters and bytes that are not UTF-8 by escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_lines(title: str, *texts: str) -> list[str]:
    """Return lines of the report, with a title in the first column of the first."""
    return [f"{'' if number else title:<{_TITLE_WIDTH}}{escape_text(text)}" for number, text in enumerate(texts)]


def describe_folder(sounds: SoundFolder, n_clips: int) -> list[str]:
    """Describe the sounds of a folder, and the files that cannot be in a list."""
    notes = [f"{len(sounds.names):,} sounds below {sounds.root}, {n_clips:,} of them in the lists"]
    if sounds.not_utf8:
        text = f"names that are not UTF-8 on disk, read as Windows-1252: {len(sounds.not_utf8):,}"
        notes.append(f"{text} ({some(sounds.not_utf8, 3)})")
    lines = format_lines("found", *notes)
    for text in sounds.describe_skipped():
        lines += format_lines("skipped", text)
    return lines


def describe_selection(selection: Selection, ontology: str | None) -> list[str]:
    """Return the sentences on the clips that were chosen by their labels."""
    by_kind = sum(selection.n_by_kind.values())
    kinds = f"counted by {ontology}: {by_kind:,}" if ontology else "not counted: there is no ontology (--ontology)"
    lines = format_lines("selected", f"{len(selection.rows):,} clips", f"clips of kinds of a label {kinds}")
    rows = [("", "in the list", "by a kind", "selected")]
    for label, n in selection.n_chosen.items():
        n_by_kind = f"{selection.n_by_kind[label]:,}" if label in selection.n_by_kind else ""
        rows.append((escape_text(label), f"{selection.n_found[label]:,}", n_by_kind, f"{n:,}"))
    return [*lines, "", align_columns(rows, "<>"), ""]


def describe_lists(table: pd.DataFrame, split: Split, groups: Groups) -> list[str]:
    """Return the table of labels and the warnings."""
    parts, names = split.lists, split.names
    if split.folds is not None and len(set(split.folds)) <= _MAX_FOLD_COLUMNS:
        parts = [f"fold {fold}" for fold in split.folds]
        names = sorted(set(parts), key=lambda part: (len(part), part))
    labels = table["labels"].str.split(";") if "labels" in table else [["(no labels)"]] * len(table)
    clips = pd.DataFrame({"label": labels, "part": parts, "group": groups.joined})
    rows = clips.explode("label")
    counts = pd.crosstab(rows["label"], rows["part"]).reindex(columns=names, fill_value=0)
    counts["all"] = counts.sum(axis=1)
    counts = counts.sort_index().sort_values("all", ascending=False, kind="stable")
    if groups.columns or groups.identical:
        counts["groups"] = rows.groupby("label")["group"].nunique()
    lines = ["", _format_counts(counts, clips, names), ""]
    for warning in _collect_warnings(counts, names, split, groups):
        lines += format_lines("warning", warning)
    return lines


def _format_counts(counts: pd.DataFrame, clips: pd.DataFrame, names: list[str]) -> str:
    shown = counts if len(counts) <= _MAX_ROWS else counts[: _MAX_ROWS - 1]
    columns = [*names, *(["groups"] if "groups" in counts else [])]
    rows = [["label", *columns]]
    rows += [[escape_text(label), *map(str, row)] for label, *row in shown[columns].itertuples(name=None)]
    rest = counts[len(shown) :]
    if len(rest):
        sums = [str(rest[name].sum()) for name in names]
        rows.append([f"{len(rest):,} labels more", *sums, *([""] if "groups" in counts else [])])
    sizes = [int((clips["part"] == name).sum()) for name in names]
    rows.append(["clips", *map(str, [*sizes, *([clips["group"].nunique()] if "groups" in counts else [])])])
    return align_columns(rows, "<>")


def _collect_warnings(counts: pd.DataFrame, names: list[str], split: Split, groups: Groups) -> list[str]:
    part = "fold" if split.folds else "list"
    warnings = []
    absent = counts[(counts[names] == 0).any(axis=1)]
    if len(absent):
        entries = [
            f"{label} (clips {row['all']}"
            + (f", groups {row['groups']}" if "groups" in counts else "")
            + f", none in {' and '.join(name for name in names if not row[name])})"
            for label, row in absent[::-1].iterrows()
        ]
        warnings.append(f"labels with too few clips or groups to be in every {part}: {len(absent)}; {some(entries, 6)}")
    if lookalikes := describe_lookalikes(counts["all"].to_dict()):
        warnings.append(lookalikes)
    if split.published:
        warnings += _find_leaks(split, groups, part)
    return warnings


def _find_leaks(split: Split, groups: Groups, part: str) -> list[str]:
    parts = split.folds or split.lists
    warnings = []
    if groups.columns and (n_split := count_split_groups(groups.by_column, parts)):
        n_groups = len(set(groups.by_column.tolist()))
        columns = " and ".join(groups.columns)
        warnings.append(f"{n_split:,} of {n_groups:,} groups (by {columns}) are in more than one published {part}")
    n_sets = sum(len({parts[row] for row in rows}) > 1 for rows in groups.identical)
    if n_sets:
        warnings.append(f"{n_sets:,} sets of identical files are in more than one published {part}")
    return warnings
