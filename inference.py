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

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

# Before torch loads OpenMP: spinning threads make tagging ten times slower where decoders share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pydantic import Field

from audio.io import find_audio_files
from audio.isolation import start_processes
from audio.limits import SoundLimits
from common.interrupts import note_when_stopped
from common.options import MergingOption, ModelOptions, parse_arguments
from tagging.engines import open_engine
from tagging.files import TagOptions
from tagging.parts import Share
from tagging.session import Session, check_labels, open_outputs
from tagging.stream import tag_stream

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class InferenceOptions(ModelOptions):
    """The options of inference.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("sounds",)
    SHORT: ClassVar[Mapping[str, str]] = {"model": "m", "topk": "k", "chunk_length": "c"}

    sounds: list[Path] = Field([])  # files or folders
    topk: _Count | None = None  # labels of each window; null = 3, or all above --threshold
    chunk_length: _Positive = 10.0  # length of a window in seconds
    hop: _Positive | None = None  # seconds from window to window; null = the chunk length
    # only labels of at least this probability; neighbouring windows become one event
    threshold: float | None = Field(None, ge=0, le=1)
    output: Path | None = None  # a .csv, .jsonl or .parquet file for the tags, or a folder of label tracks
    format: Literal["csv", "jsonl", "parquet", "audacity"] | None = None  # of --output; null = from its extension
    token_merging: MergingOption = None  # tokens merged in each block; null = the model's own setting
    embeddings: Path | None = None  # a .h5 file for embeddings of windows and their time steps
    plot: Path | None = None  # folder for pictures: each file's spectrogram with its tags over time
    overwrite: bool = False  # remove existing outputs instead of doing what remains
    quiet: bool = False  # do not print the tags of files
    engine: Literal["torch", "onnx"] | None = None  # null = onnx for .onnx files, else torch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model
    batch_size: _Count | None = None  # windows a batch; null = 8 on a CPU, 64 on a GPU
    n_workers: _Count = 2  # decoding processes
    limits: dict[str, float] = Field({})  # of a sound file, see audio/limits.py: {stall_seconds: 300}
    stream: bool = False  # tag standard input: sound of any format, or raw samples
    rate: _Count | None = None  # of raw samples, in hertz; null = the model's
    channels: _Count | None = None  # of raw samples; null = 1
    encoding: Literal["u8", "s16le", "s24le", "s32le", "f32le", "f64le"] | None = None  # of raw samples; null = s16le

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of options that cannot be given together."""
        if self.stream and (self.sounds or self.output or self.embeddings or self.plot):
            yield "--stream reads standard input and prints; files and outputs are not supported with it"
        tables = [path for path in self.sounds if path.suffix.lower() in (".tsv", ".csv", ".h5", ".hdf5")]
        if tables:
            yield f"{tables[0]} is a list or a pack, for run.py evaluate; give sound files or folders"
        if self.embeddings is not None and self.embeddings.suffix not in (".h5", ".hdf5"):
            yield f"--embeddings expects a name that ends in .h5, not {self.embeddings}"
        if not self.stream and not self.sounds:
            yield "no sounds: give files or folders, or --stream"


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Tag the sounds or the stream of the command line."""
    options = parse_arguments(InferenceOptions, __doc__, arguments)
    limits = SoundLimits.from_mapping(options.limits)
    paths = find_audio_files(options.sounds) if options.sounds else []
    start_processes(min(options.n_workers, len(paths)))  # while the model is loaded
    chosen = {name: getattr(options, name) for name in ("engine", "weights", "device", "token_merging", "head")}
    engine = open_engine(options.model, **chosen)
    if options.embeddings is None or options.output or options.plot:
        check_labels(engine, options.model)
    top_k = options.topk or (3 if options.threshold is None else None)
    tag_options = TagOptions(top_k, options.threshold, embeddings=options.embeddings is not None)
    times = options.chunk_length, options.hop
    if options.stream:
        raw = {name: getattr(options, name) for name in ("rate", "channels", "encoding")}
        is_complete = tag_stream(sys.stdin.buffer, engine, tag_options, *times, **raw)
    else:
        share = Share.from_torchrun()
        session = Session(engine, tag_options, *times, options.batch_size, options.n_workers, share, limits)
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
            limits=limits,
        )
        kept = "nothing is written" if options.quiet or not engine.labels else "the tags so far are printed"
        if outputs:
            kept = "the outputs hold all finished files, and the same command tags the others"
        with note_when_stopped(kept):
            is_complete = session.run(paths, outputs, options.quiet)
    if not is_complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
