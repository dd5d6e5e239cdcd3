"""Tag sound files or a stream: which classes are heard, window by window.

    python inference.py SOUND.wav FOLDER/ -m ced_mini -k 3 -c 10
    python inference.py FOLDER/ -m experiments/mine --output tags.csv --threshold 0.3 --hop 5
    python inference.py FOLDER/ -m experiments/mine --head birds --output tags.csv
    torchrun --nproc_per_node 2 inference.py FOLDER/ -m ced_tiny --output tags.parquet --embeddings embeddings.h5
    arecord -f S16_LE -r 16000 | python inference.py --stream -m ced_tiny -c 2 --hop 0.5
    curl -s https://a.radio/stream.mp3 | python inference.py --stream -m ced_tiny -c 2

Folders are searched with everything below them; any format that libsndfile or FFmpeg reads, any sample rate and
any length will do. What is written is written file by file: the same command, given again, does what is left. Files
that cannot be read, or are odd, are listed at the end; the exit status is 1 where some could not be read or have lost
sound (they are cut or damaged).
"""

import argparse
import math
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where decoders share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from audio.io import LOSSES, find_audio_files
from common.errors import UserError, print_user_errors
from common.numbers import read_merging
from common.parser import Parser
from tagging.engines import Engine, describe_head, open_engine
from tagging.files import Wanted
from tagging.parts import Share
from tagging.session import Session, lines, open_outputs
from tagging.stream import FORMATS, Encoding, StreamDecoder, StreamTagger


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
    add("--format", choices=("csv", "jsonl", "parquet", "audacity"), help="of --output (default: as its name ends)")
    add("--token_merging", type=read_merging, help="tokens merged away in each block (default: as the model says)")
    add("--embeddings", type=Path, metavar="OUT.h5", help="write embeddings of windows and their time steps")
    add("--plot", type=Path, metavar="FOLDER", help="draw each file's spectrogram with its tags over time")
    add("--overwrite", action="store_true", help="begin outputs anew instead of doing what is left")
    add("--quiet", action="store_true", help="do not print the tags of files")
    add("--engine", choices=("torch", "onnx"), help="default: onnx for .onnx files, else torch")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch_size", type=int, help="windows a batch (default: 8 on a CPU, 64 on a GPU)")
    add("--n_workers", type=int, default=2, help="decoding threads (default %(default)s)")
    add(
        "--stream", action="store_true", help="tag what comes in at standard input: sound of any format, or raw samples"
    )
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
        parser.error("--stream reads standard input and prints; it takes neither files nor outputs")
    tables = [path for path in options.sounds if path.suffix.lower() in (".tsv", ".csv", ".h5", ".hdf5")]
    if tables:
        parser.error(f"{tables[0]} is a list or a pack, which run.py evaluate takes; give sound files or folders")
    if options.embeddings is not None and options.embeddings.suffix not in (".h5", ".hdf5"):
        parser.error(f"--embeddings wants a name that ends in .h5, not {options.embeddings}")
    if not options.stream and not options.sounds:
        parser.error("which sounds? Give files or folders, or --stream")
    return options


def tag_stream(engine: Engine, options: argparse.Namespace, wanted: Wanted) -> bool:
    """Print tags of standard input as it comes; False where sound is missing in it."""
    raw = Encoding(options.rate or engine.sample_rate, options.channels or 1, options.encoding or "s16le")
    is_raw = any(value is not None for value in (options.rate, options.channels, options.encoding))
    decoder = StreamDecoder(sys.stdin.buffer, raw, is_raw=is_raw)
    tagger = StreamTagger(engine, wanted, chunk_seconds=options.chunk_length, hop_seconds=options.hop)
    try:
        for block, rate in decoder:
            for line in lines(tagger.push_block(block, rate)):
                print(line, flush=True)
    except KeyboardInterrupt:
        pass  # the usual end of a microphone
    for line in lines(tagger.finish()):
        print(line, flush=True)
    warnings = decoder.warnings | tagger.warnings
    if warnings:
        print(f"standard input {'; '.join(warnings.values())}", file=sys.stderr)
    return not LOSSES & warnings.keys()


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Tag what the command line names."""
    options = parse(arguments)
    paths = find_audio_files(options.sounds) if options.sounds else []
    top_k = options.topk or (None if options.threshold is not None else 3)
    wanted = Wanted(top_k, options.threshold, embeddings=options.embeddings is not None)
    chosen = {name: getattr(options, name) for name in ("engine", "weights", "device", "token_merging", "head")}
    engine = open_engine(options.model, **chosen)
    if not engine.labels and (options.embeddings is None or options.output or options.plot):
        raise UserError(
            f"{options.model} embeds sounds and has no classes to tag them with: give --head NAME (`run.py probe` "
            "trains heads), or ask for --embeddings OUT.h5 alone"
        )
    if options.stream:
        if not tag_stream(engine, options, wanted):
            sys.exit(1)
        return
    share = Share.of_torchrun()
    how = options.chunk_length, options.hop, options.batch_size or engine.batch_size, options.n_workers
    session = Session(engine, wanted, *how, share=share)
    session.check()
    outputs = open_outputs(
        paths,
        session.made_with(options.model, options.weights, options.token_merging) | describe_head(options.head),
        share,
        output=options.output,
        kind=options.format,
        embeddings=options.embeddings,
        plot=options.plot,
        overwrite=options.overwrite,
    )
    if not session.run(paths, outputs, options.quiet or not engine.labels):
        sys.exit(1)


if __name__ == "__main__":
    main()
