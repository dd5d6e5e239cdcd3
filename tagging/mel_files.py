"""Tagging by exported files that take spectrograms, with the features of another program than PyTorch's front-end.

What onnx_inference_with_kaldi.py and onnx_inference_with_torchaudio.py share.

Letters: S samples, F mel bands, T frames.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio.io import AudioBlocks, AudioReadError, find_audio_files
from common.errors import UserError
from common.parser import Parser
from tagging.files import TaggedWindow, Wanted, create_windows, cut
from tagging.onnx_engine import OnnxEngine
from tagging.session import lines

# (waveform (S,), settings of CED's front-end) -> mel bands in decibels (F,T)
Features = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line of either program."""
    parser = Parser(description=description)
    parser.add_argument("wavs", nargs="+", type=Path, metavar="WAV", help="sound files or folders")
    parser.add_argument("-m", "--model", type=Path, required=True, help="an .onnx file of export_onnx.py")
    parser.add_argument("--chunk", type=float, default=5.0, help="seconds tagged at a time (default %(default)s)")
    parser.add_argument("-k", "--topk", type=int, default=3, help="labels of each chunk (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("chunk", "topk"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, not {getattr(options, name)}")
    return options


def open_for_features(path: Path) -> OnnxEngine:
    """Open an exported file that takes the spectrograms of CED's front-end.

    Raises:
        UserError: it takes waveforms, or other spectrograms.
    """
    engine = OnnxEngine(path, n_threads=1)
    if engine.takes != "feats":
        raise UserError(f"{path} takes waveforms and has its front-end inside; export without --waveform")
    if engine.front_end["class"] != "CedMel":
        raise UserError(f"{path} takes spectrograms of {engine.front_end['class']}; only CED's can be computed here")
    return engine


def tag_chunks(
    engine: OnnxEngine,
    features: Features,
    path: Path,
    chunk_seconds: float,
    warnings: dict[str, str] | None = None,
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Tag a sound file chunk by chunk: start and end in seconds, probabilities (C,).

    Args:
        engine: computes.
        features: of the samples of a chunk.
        path: any sound file.
        chunk_seconds: length of a chunk.
        warnings: gets at the end what is odd about the file, see `audio.io.AudioBlocks`.

    Raises:
        AudioReadError: the file cannot be read.
    """
    from models.frontends import build_front_end

    settings = build_front_end(engine.front_end).description
    rate = engine.sample_rate
    blocks = AudioBlocks(path, rate)
    for start, chunk in cut(blocks, create_windows(engine, chunk_seconds, None)):
        mel = features(chunk, settings)
        yield start / rate, (start + len(chunk)) / rate, engine.predict_spectrogram(mel[None])[0]
    if warnings is not None:
        warnings.update(blocks.warnings)


def report(
    engine: OnnxEngine, features: Features, paths: Sequence[Path], chunk_seconds: float, top_k: int
) -> Iterator[str]:
    """Lay out the tags of sound files as lines of text: a file's name, then its chunks with their best labels.

    Raises:
        UserError: at the end, naming every file that cannot be read.
    """
    files = find_audio_files(paths)
    faults: list[str] = []
    for path in files:
        yield str(path)
        odd: dict[str, str] = {}
        try:
            for start, end, probabilities in tag_chunks(engine, features, path, chunk_seconds, odd):
                yield from lines([TaggedWindow(start, end, Wanted(top_k).tags(probabilities, engine.labels))])
        except AudioReadError as error:
            faults.append(str(error))
            yield f"  cannot be read: {error.reason}"
        yield from (f"  {kind}: {sentence}" for kind, sentence in odd.items())
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UserError(f"{len(faults)} of {len(files)} sound files could not be tagged:{listed}")


def run(description: str, features: Features, arguments: Sequence[str] | None) -> None:
    """Tag what the command line names, and print it.

    Raises:
        UserError: the model or a sound file cannot be used; the other files are tagged.
    """
    options = parse(description, arguments)
    for line in report(open_for_features(options.model), features, options.wavs, options.chunk, options.topk):
        print(line, flush=True)
