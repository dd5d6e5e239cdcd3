r"""Pack a list of sound files into HDF5.

The list is a table with a header and a column `filename`; all other columns (labels ...) are kept. AudioSet's own
lists (balanced_train_segments.csv) are read as they are: put one beside or above the sounds. A plain list will do:

    find my_sounds -name '*.wav' | awk 'BEGIN{print "filename"}{print}' > my_sounds.tsv
    python scripts/wavlist_to_hdf5.py my_sounds.tsv data/my_sounds

writes data/my_sounds/hdf5/my_sounds_0.h5 ..., data/my_sounds/labels/my_sounds.tsv (give this one to training) and
data/my_sounds/labels/my_sounds.report.json (what was packed, and what not, and why). Relative names are looked for
beside the list, then in the working directory. Sound of any format is mixed down to one channel and resampled.

All files are written in any case; the exit status is 1 where clips were left out because they could not be read, or
packed with sound missing (truncated, damaged).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from audio.manifest import read_manifest
from audio.pack import PACK_LAYOUTS, pack
from common.errors import UserError, print_user_errors
from common.parser import Parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", metavar="LIST", help="table of sound files, tab-separated, with a header")
    parser.add_argument("output", metavar="OUTDIR", help="folder to write to")
    parser.add_argument("--sample_rate", type=int, default=16000, help="of the pack, in Hz (default: 16000)")
    parser.add_argument("--name", help="of the pack (default: the list's, without extension)")
    parser.add_argument("-s", "--size_per_file", type=int, default=50_000, help="clips a shard (default: 50000)")
    parser.add_argument("-n", "--n_workers", type=int, default=4, help="decoding processes (default: 4)")
    parser.add_argument("--duration", action="store_true", help="add a column 'duration', in seconds")
    parser.add_argument("--hdf5_dirname", default="hdf5", help="folder of the shards in OUTDIR (default: hdf5)")
    parser.add_argument("--index_dirname", default="labels", help="folder of the manifest in OUTDIR (default: labels)")
    parser.add_argument("--filename_column", default="filename", help="column of names in LIST (default: filename)")
    parser.add_argument(
        "--fullname",
        action="store_true",
        help="with --layout published: keys are paths as listed, in place of base names (other layouts do so always)",
    )
    parser.add_argument("--stereo", action="store_true", help="keep two channels (with --layout clips only)")
    parser.add_argument("-d", "--delim", default="\t", help="between the columns of LIST (default: tab)")
    parser.add_argument("--dtype", default="int16", help="int16 is the only one (default: int16)")
    parser.add_argument(
        "--layout",
        choices=PACK_LAYOUTS,
        default="flat",
        help="flat: fast to read; clips: one dataset a clip under its name as listed; published: one dataset a clip "
        "under its base name, as CED's own tools read it (default: flat)",
    )
    return parser


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, pack, and print the summary."""
    options = _parser().parse_args(arguments)
    if options.dtype != "int16":
        raise UserError(
            f"--dtype {options.dtype}: shards hold int16 only, to which every format is converted; leave the option out"
        )
    delimiter = {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(options.delim, options.delim)
    table = read_manifest(options.list, delimiter=delimiter, filename_column=options.filename_column)
    report = pack(
        table,
        options.list,
        options.output,
        options.name or Path(options.list).stem,
        sample_rate=options.sample_rate,
        layout=options.layout,
        fullname=options.fullname,
        stereo=options.stereo,
        size_per_file=options.size_per_file,
        n_workers=options.n_workers,
        add_duration=options.duration,
        hdf5_folder=options.hdf5_dirname,
        index_folder=options.index_dirname,
    )
    print(report.summary())
    print("written     " + "\n            ".join(report.files))
    if not report.is_complete:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
