r"""Pack a list of sound files into HDF5.

The list is a table with a header and a column `filename`; all other columns (labels ...) are kept. AudioSet's own
lists (balanced_train_segments.csv) are read as they are: put one beside or above the sounds. A plain list will do:

    find my_sounds -name '*.wav' | awk 'BEGIN{print "filename"}{print}' > my_sounds.tsv
    python scripts/wavlist_to_hdf5.py my_sounds.tsv data/my_sounds

writes data/my_sounds/hdf5/my_sounds_0.h5 ..., data/my_sounds/labels/my_sounds.tsv (for training) and
data/my_sounds/labels/my_sounds.report.json (what was packed, and what not, and why). Relative names are looked for
beside the list, then in the working directory. Sound of any format is mixed down to one channel and resampled.

All files are written in any case; the exit status is 1 if clips were skipped because they could not be read, or
packed incompletely (truncated, damaged).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from audio.limits import SoundLimits
from audio.manifest import read_manifest
from audio.pack import pack
from common.options import FileName, FolderName, Options, parse_arguments


class PackOptions(Options):
    """The options of wavlist_to_hdf5.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("list", "outdir")
    SHORT: ClassVar[Mapping[str, str]] = {"size_per_file": "s", "n_workers": "n", "delim": "d"}

    list: str  # table of sound files, tab-separated, with a header
    outdir: str  # folder to write to
    sample_rate: int = 16000  # of the pack, in Hz
    name: FileName | None = None  # of the pack; null = the list's, without extension
    size_per_file: int = 50_000  # clips a shard
    n_workers: int = 4  # decoding processes
    limits: dict[str, float] = Field({})  # of a sound file, see audio/limits.py: {clip_mb: 4000}
    duration: bool = False  # add a column `duration`, in seconds
    hdf5_dirname: FolderName = "hdf5"  # folder of the shards in OUTDIR
    index_dirname: FolderName = "labels"  # folder of the manifest in OUTDIR
    filename_column: str = "filename"  # column of names in LIST
    # with --layout published: keys are paths as listed, in place of base names (other layouts do so always)
    fullname: bool = False
    stereo: bool = False  # keep two channels (with --layout clips only)
    delim: str = "\t"  # between the columns of LIST
    dtype: Literal["int16"] = "int16"  # of the samples; shards hold no other
    # flat: fast to read; clips: one dataset a clip under its name as listed; published: one dataset a clip under its
    # base name, as CED's own tools read it
    layout: Literal["flat", "clips", "published"] = "flat"


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Pack the sounds of a list, and print the summary."""
    options = parse_arguments(PackOptions, __doc__, arguments)
    delimiter = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(options.delim, options.delim)
    left_out: list[tuple[str, str]] = []
    table = read_manifest(options.list, delimiter=delimiter, filename_column=options.filename_column, left_out=left_out)
    report = pack(
        table,
        options.list,
        options.outdir,
        options.name or Path(options.list).stem,
        sample_rate=options.sample_rate,
        layout=options.layout,
        fullname=options.fullname,
        stereo=options.stereo,
        size_per_file=options.size_per_file,
        n_workers=options.n_workers,
        limits=SoundLimits.from_mapping(options.limits),
        add_duration=options.duration,
        hdf5_folder=options.hdf5_dirname,
        index_folder=options.index_dirname,
        left_out=left_out,
    )
    print(report.summary())
    print("written     " + "\n            ".join(report.files))
    if not report.is_complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
