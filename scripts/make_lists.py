r"""Make lists of sounds for training, validation and testing: train.tsv, valid.tsv, test.tsv.

    python scripts/make_lists.py my_sounds
    python scripts/make_lists.py my_sounds --pattern '{label}_{speaker}_{}.wav'
    python scripts/make_lists.py ESC-50-master --table ESC-50-master/meta/esc50.csv
    python scripts/make_lists.py my_sounds --labels Dog "Baby cry" --negatives 500

Labels are the folders below FOLDER, or come from a pattern of names, or from a table. Lists are stratified by label;
groups (speakers, recordings) and files of the same content are never split. The lists are tab-separated, with the
columns `filename`, `labels` (joined by ";") and all other columns of the pattern or the table, and are packed by
scripts/wavlist_to_hdf5.py. The same names, labels and seed give the same lists.

In a pattern, {label} is the label, {speaker} or any other name a column, and {} is ignored. A name matches as little
text as possible, {} as much as possible; with :d inside ({:d}, {take:d}) it is a whole number. A pattern with a "/" is
matched against the path below FOLDER, others against the file's name; the extension may be omitted. Columns named
group, speaker or recording are the default groups, columns named split or fold are published lists, which are kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import shlex
from dataclasses import asdict

import pandas as pd

from audio.selection import compute_order, select_clips
from common.errors import UserError
from common.options import parse_arguments
from scripts.lists.groups import Groups, find_groups
from scripts.lists.labels import Clips, label_sounds
from scripts.lists.list_files import write_lists
from scripts.lists.name_patterns import suggest_groups
from scripts.lists.options import ListOptions
from scripts.lists.report import describe_folder, describe_lists, describe_selection, format_lines
from scripts.lists.sound_folders import SoundFolder, find_identical, find_sounds
from scripts.lists.splits import Split, choose_split_column, draw_split, keep_published


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Make train.tsv, valid.tsv and test.tsv of the sounds below a folder, and print what was chosen."""
    options = parse_arguments(ListOptions, __doc__, arguments)
    sounds = find_sounds(options.folder)
    clips = label_sounds(sounds, options)
    selected = _select(clips, options) if options.selects else []
    column = choose_split_column(clips.table, options.split_column)
    if column:
        clips.keep(clips.table[column] != "", f"sounds with nothing in the column {column!r}")
    same = find_identical(sounds) if options.compare_content else []
    groups = find_groups(clips.table, options.group, [[sounds.names[i] for i in rows] for rows in same])
    split = _split(clips, groups, column, options)
    written = _write(sounds, clips, split, groups, options)
    print("\n".join([*_describe(sounds, clips, split, groups, options, selected), *written]))


def _select(clips: Clips, options: ListOptions) -> list[str]:
    """Keep the clips of some labels, and others as negatives; return lines of the report."""
    if not clips.has_labels:
        raise UserError("--labels, --min_clips and --balanced choose clips by their labels, and there are none")
    list_path = options.table or options.folder
    selection = select_clips(clips.table, options.selection, options.read_ontology(list_path))
    clips.table = selection.take(clips.table)
    return describe_selection(selection, options.find_ontology(list_path))


def _split(clips: Clips, groups: Groups, column: str, options: ListOptions) -> Split:
    table = clips.table
    labels = table["labels"].tolist() if clips.has_labels else [""] * len(table)
    order = compute_order(table["filename"].tolist(), options.seed)
    if not column:
        return draw_split(labels, groups.joined, options, order)
    split = keep_published(table[column], labels, groups.joined, options.valid, order)
    if options.given_shares:
        split.notes.append(
            f"{', '.join(options.given_shares)} not used for published lists; --split_column none makes new ones"
        )
    return split


def _write(sounds: SoundFolder, clips: Clips, split: Split, groups: Groups, options: ListOptions) -> list[str]:
    """Write the lists; return the last lines of the report."""
    table = clips.table.copy()
    table["filename"] = [sounds.path(name) for name in table["filename"]]
    if split.folds is not None:
        if "fold" in table and table["fold"].tolist() != split.folds:
            table = table.rename(columns={"fold": "fold_in_table"})
        table["fold"] = split.folds
    list_column = pd.Series(split.lists)
    lists = {f"{name}.tsv": table[list_column == name] for name in split.names}
    if split.folds is not None:
        lists["folds.tsv"] = table
    folder = Path(options.output)
    record = {
        "made_by": "scripts/make_lists.py",
        "folder": sounds.root,
        "labels": clips.source,
        "groups": groups.columns,
        "seed": options.seed,
        "selection": asdict(options.selection) if options.selects else None,
        "clips": {name: len(rows) for name, rows in lists.items()},
    }
    removed = write_lists(folder, lists, record, options.overwrite)
    paths = [str(folder / name) for name in lists]
    lines = format_lines("written", ", ".join(paths))
    if removed:
        lines += format_lines("removed", f"{', '.join(map(str, removed))}, of earlier lists")
    pack = ["python", "scripts/wavlist_to_hdf5.py"]
    return lines + format_lines("next", *(shlex.join([*pack, path, str(folder / "mine")]) for path in paths))


def _describe(
    sounds: SoundFolder, clips: Clips, split: Split, groups: Groups, options: ListOptions, selected: list[str]
) -> list[str]:
    lines = describe_folder(sounds, len(clips.table)) + selected
    lines += format_lines("labels", f"from {clips.source}" if clips.has_labels else "none", *clips.notes)
    n_groups = f"{len(set(groups.by_column.tolist())):,} by {' and '.join(groups.columns)}"
    lines += format_lines("groups", n_groups if groups.columns else "none", *groups.notes)
    drawn = f"stratified{', by folds' if options.folds else ''}, seed {options.seed}"
    lines += format_lines("lists", "published" if split.published else drawn, *split.notes)
    if not (groups.columns or split.published or options.group):
        cells = clips.table["labels"].unique() if clips.has_labels else []
        labels = {label for cell in cells for label in cell.split(";")}
        if advice := suggest_groups(clips.table["filename"].tolist(), len(labels)):
            lines += format_lines("advice", advice)
    return lines + describe_lists(clips.table, split, groups)


if __name__ == "__main__":
    main()
