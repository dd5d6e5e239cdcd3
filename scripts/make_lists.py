r"""Make lists of sounds for training, validation and testing: train.tsv, valid.tsv, test.tsv.

    python scripts/make_lists.py my_sounds
    python scripts/make_lists.py my_sounds --pattern '{label}_{speaker}_{}.wav'
    python scripts/make_lists.py ESC-50-master --table ESC-50-master/meta/esc50.csv

Labels are the folders below FOLDER, or come from a pattern of names, or from a table. Every label has its share in each
list as far as groups (speakers, recordings) allow, which are never split, and neither are files of the same content.
The lists are tab-separated, with the columns `filename`, `labels` (joined by ";") and all others that are known, and
scripts/wavlist_to_hdf5.py packs them. The same names, labels and seed give the same lists.

In a pattern, {label} is the label, {speaker} or any other name a column, {} anything that is not needed. A name takes
as little of the text as fits, {} as much; with :d inside ({:d}, {take:d}) it is a whole number. A pattern with a "/" is
matched against the path below FOLDER, another one against the file's name; the extension may be left out. Columns
named group, speaker or recording are groups where --group is not given, split and fold are lists to keep.
"""

import shlex
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from common.errors import print_user_errors
from common.options import parse_arguments
from scripts.lists.groups import Groups, find_groups
from scripts.lists.labels import Clips, label_sounds
from scripts.lists.list_files import write_lists
from scripts.lists.name_patterns import suggest_groups
from scripts.lists.options import ListOptions
from scripts.lists.report import describe_folder, describe_lists, line
from scripts.lists.sound_folders import SoundFolder, find_identical, find_sounds
from scripts.lists.splits import Split, choose_split_column, draw_split, keep_published
from scripts.lists.stratification import random_order


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Make train.tsv, valid.tsv and test.tsv of the sounds below a folder, and print what was chosen."""
    options = parse_arguments(ListOptions, __doc__, arguments)
    sounds = find_sounds(options.folder)
    clips = label_sounds(sounds, options.labels)
    column = choose_split_column(clips.table, options.split_column)
    if column:
        clips.keep(clips.table[column] != "", f"sounds with nothing in the column {column!r}")
    same = find_identical(sounds) if options.compare_content else []
    groups = find_groups(clips.table, options.group, [[sounds.names[i] for i in rows] for rows in same])
    split = _split(clips, groups, column, options)
    written = _write(sounds, clips, split, groups, options)
    print("\n".join([*_describe(sounds, clips, split, groups, options), *written]))


def _split(clips: Clips, groups: Groups, column: str, options: ListOptions) -> Split:
    table = clips.table
    labels = table["labels"].tolist() if clips.has_labels else [""] * len(table)
    order = random_order(table["filename"].tolist(), options.seed)
    if not column:
        return draw_split(labels, groups.joined, options.split, order)
    split = keep_published(table[column], labels, groups.joined, options.split.valid, order)
    if options.given_shares:
        split.notes.append(
            f"{', '.join(options.given_shares)} not used where lists are given; --split_column none makes new ones"
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
    of_list = pd.Series(split.lists)
    lists = {f"{name}.tsv": table[of_list == name] for name in split.names}
    if split.folds is not None:
        lists["folds.tsv"] = table
    folder = Path(options.output)
    record = {
        "made_by": "scripts/make_lists.py",
        "folder": sounds.root,
        "labels": clips.source,
        "groups": groups.columns,
        "seed": options.seed,
        "clips": {name: len(rows) for name, rows in lists.items()},
    }
    removed = write_lists(folder, lists, record, options.overwrite)
    paths = [str(folder / name) for name in lists]
    pack = str(folder / "mine")
    lines = [line("written", ", ".join(paths))]
    if removed:
        lines.append(line("removed", f"{', '.join(map(str, removed))}, of earlier lists"))
    for number, path in enumerate(paths):
        lines.append(line("" if number else "next", shlex.join(["python", "scripts/wavlist_to_hdf5.py", path, pack])))
    return lines


def _describe(sounds: SoundFolder, clips: Clips, split: Split, groups: Groups, options: ListOptions) -> list[str]:
    lines = describe_folder(sounds, len(clips.table))
    lines.append(line("labels", f"from {clips.source}" if clips.has_labels else "none"))
    lines += [line("", note) for note in clips.notes]
    n_groups = (
        f"{len(set(groups.by_column.tolist())):,} by {' and '.join(groups.columns)}" if groups.columns else "none"
    )
    lines.append(line("groups", n_groups))
    lines += [line("", note) for note in groups.notes]
    drawn = f"stratified{', by folds' if options.split.folds else ''}, seed {options.seed}"
    lines.append(line("lists", "published" if split.published else drawn))
    lines += [line("", note) for note in split.notes]
    if not (groups.columns or split.published or options.group):
        cells = clips.table["labels"].unique() if clips.has_labels else []
        labels = {label for cell in cells for label in cell.split(";")}
        advice = suggest_groups(clips.table["filename"].tolist(), len(labels))
        lines += [line("advice", advice)] if advice else []
    return lines + describe_lists(clips.table, split, groups)


if __name__ == "__main__":
    main()
