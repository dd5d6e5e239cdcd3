"""Tag sound files or a stream: the most probable classes, window by window.

    python inference.py SOUND.wav FOLDER/ -m ced_mini -k 3 -c 10
    python inference.py FOLDER/ -m experiments/mine --output tags.csv --threshold 0.3 --hop 5
    python inference.py FOLDER/ -m experiments/mine --head birds --output tags.csv
    torchrun --nproc_per_node 2 inference.py FOLDER/ -m ced_tiny --output tags.parquet --embeddings embeddings.h5
    arecord -f S16_LE -r 16000 | python inference.py --stream -m ced_tiny -c 2 --hop 0.5
    curl -s https://a.radio/stream.mp3 | python inference.py --stream -m ced_tiny -c 2

Folders are searched recursively; every format of libsndfile and FFmpeg, every sample rate and every length is
supported. Outputs are written file by file: the same command, given again, does what remains. Files with faults or
warnings are listed at the end; the exit status is 1 where some could not be read or have lost sound (they are truncated
or damaged).
"""

import argparse
import math
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: spinning threads make tagging ten times slower where decoders share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from audio.io import find_audio_files
from audio.streams import FORMATS
from common.errors import print_user_errors
from common.numbers import read_merging
from common.parser import Parser
from tagging.engines import open_engine
from tagging.files import TagOptions
from tagging.parts import Share
from tagging.session import Session, check_labels, open_outputs
from tagging.stream import tag_stream


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Tag sound files, or a stream, window by window.")
    add = parser.add_argument
    add("sounds", nargs="*", type=Path, metavar="FILE_OR_FOLDER")
    add(
        "-m",
        "--model",
        default="ced_mini",
        help="a model's name, a checkpoint, a run's or Hugging Face folder, an .onnx file (default %(default)s)",
    )
    add("--weights", help="file or address with the weights of the model named by -m")
    add("--head", help="tag with this head on the model's embeddings: a name in heads/, a published one, or a file")
    add("-k", "--topk", type=int, help="labels of each window (default 3, or all above --threshold)")
    add("-c", "--chunk_length", type=float, default=10.0, help="of a window, in seconds (default %(default)s)")
    add("--hop", type=float, help="seconds from window to window (default: the chunk length)")
    add("--threshold", type=float, help="only labels of this probability; neighbouring windows become one event")
    add("--output", type=Path, help="write tags to this .csv, .jsonl or .parquet, or folder of label tracks")
    add("--format", choices=("csv", "jsonl", "parquet", "audacity"), help="of --output (default: its extension)")
    add("--token_merging", type=read_merging, help="tokens merged in each block (default: the model's own setting)")
    add("--embeddings", type=Path, metavar="OUT.h5", help="write embeddings of windows and their time steps")
    add("--plot", type=Path, metavar="FOLDER", help="draw each file's spectrogram with its tags over time")
    add("--overwrite", action="store_true", help="remove existing outputs instead of doing what remains")
    add("--quiet", action="store_true", help="do not print the tags of files")
    add("--engine", choices=("torch", "onnx"), help="default: onnx for .onnx files, else torch")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch_size", type=int, help="windows a batch (default: 8 on a CPU, 64 on a GPU)")
    add("--n_workers", type=int, default=2, help="decoding threads (default %(default)s)")
    add("--stream", action="store_true", help="tag standard input: sound of any format, or raw samples")
    add("--rate", type=int, help="of raw samples, in hertz (default: the model's)")
    add("--channels", type=int, help="of raw samples (default 1)")
    add("--encoding", choices=tuple(FORMATS), help="of raw samples (default s16le)")
    options = parser.parse_args(arguments)
    for name in ("topk", "chunk_length", "hop", "batch_size", "n_workers", "rate", "channels"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0, and a number, not {value}")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        parser.error(f"--threshold is a probability, 0 to 1, not {options.threshold}")
    if options.stream and (options.sounds or options.output or options.embeddings or options.plot):
        parser.error("--stream reads standard input and prints; files and outputs are not supported with it")
    tables = [path for path in options.sounds if path.suffix.lower() in (".tsv", ".csv", ".h5", ".hdf5")]
    if tables:
        parser.error(f"{tables[0]} is a list or a pack, for run.py evaluate; give sound files or folders")
    if options.embeddings is not None and options.embeddings.suffix not in (".h5", ".hdf5"):
        parser.error(f"--embeddings expects a name that ends in .h5, not {options.embeddings}")
    if not options.stream and not options.sounds:
        parser.error("no sounds: give files or folders, or --stream")
    if options.topk is None and options.threshold is None:
        options.topk = 3
    return options


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Tag the sounds or the stream of the command line."""
    options = parse(arguments)
    paths = find_audio_files(options.sounds) if options.sounds else []
    chosen = {name: getattr(options, name) for name in ("engine", "weights", "device", "token_merging", "head")}
    engine = open_engine(options.model, **chosen)
    if options.embeddings is None or options.output or options.plot:
        check_labels(engine, options.model)
    tag_options = TagOptions(options.topk, options.threshold, embeddings=options.embeddings is not None)
    times = options.chunk_length, options.hop
    if options.stream:
        raw = {name: getattr(options, name) for name in ("rate", "channels", "encoding")}
        is_complete = tag_stream(sys.stdin.buffer, engine, tag_options, *times, **raw)
    else:
        share = Share.from_torchrun()
        session = Session(engine, tag_options, *times, options.batch_size, options.n_workers, share)
        session.check()
        outputs = open_outputs(
            paths,
            session.get_provenance(options.model, options.weights, options.token_merging, options.head),
            share,
            output=options.output,
            output_format=options.format,
            embeddings=options.embeddings,
            plot=options.plot,
            overwrite=options.overwrite,
        )
        is_complete = session.run(paths, outputs, options.quiet)
    if not is_complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
