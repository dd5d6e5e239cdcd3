"""Tag with exported files that take spectrograms, which another library than our front-end computes.

Shared by onnx_inference_with_kaldi.py and onnx_inference_with_torchaudio.py.

Letters: S samples, F mel bands, T frames.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from audio.io import AudioBlocks, AudioReadError, find_audio_files
from common.errors import UserError
from common.options import Options, parse_arguments
from tagging.files import TaggedWindow, TagOptions, create_windows, cut_windows
from tagging.onnx_engine import OnnxEngine
from tagging.session import format_windows

# (waveform (S,), settings of CED's front-end) -> mel bands in decibels (F,T)
Features = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]


class MelFileOptions(Options):
    """The options of onnx_inference_with_kaldi.py and onnx_inference_with_torchaudio.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("wavs",)
    SHORT: ClassVar[Mapping[str, str]] = {"model": "m", "topk": "k"}

    wavs: list[Path] = Field(min_length=1)  # sound files or folders
    model: Path  # an .onnx file of export_onnx.py
    chunk: float = Field(5.0, gt=0)  # seconds tagged at a time
    topk: int = Field(3, ge=1)  # labels of each chunk


def open_for_features(path: Path) -> OnnxEngine:
    """Open an exported file that takes the spectrograms of CED's front-end.

    Raises:
        UserError: it takes waveforms, or other spectrograms.
    """
    engine = OnnxEngine(path, n_threads=1)
    if engine.takes != "feats":
        raise UserError(f"{path} takes waveforms and contains its front-end; export without --waveform")
    if engine.front_end["class"] != "CedMel":
        raise UserError(f"{path} takes spectrograms of {engine.front_end['class']}; only CED's are supported here")
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
        engine: computes the probabilities.
        features: computes the spectrogram of a chunk.
        path: any sound file.
        chunk_seconds: length of a chunk.
        warnings: updated at the end with those of the file, see `audio.io.AudioBlocks`.

    Raises:
        AudioReadError: the file cannot be read.
    """
    from models.argument_checks import restore_front_end

    settings = restore_front_end(engine.front_end).description
    rate = engine.sample_rate
    blocks = AudioBlocks(path, rate)
    for start, chunk in cut_windows(blocks, create_windows(engine, chunk_seconds, None)):
        mel = features(chunk, settings)
        yield start / rate, (start + len(chunk)) / rate, engine.predict_spectrogram(mel[None])[0]
    if warnings is not None:
        warnings.update(blocks.warnings)


def report(
    engine: OnnxEngine, features: Features, paths: Sequence[Path], chunk_seconds: float, top_k: int
) -> Iterator[str]:
    """Format the tags of sound files as lines of text: a file's name, then its chunks with their best labels.

    Raises:
        UserError: at the end, with every file that cannot be read.
    """
    files = find_audio_files(paths)
    faults: list[str] = []
    for path in files:
        yield str(path)
        warnings: dict[str, str] = {}
        try:
            for start, end, probabilities in tag_chunks(engine, features, path, chunk_seconds, warnings):
                tags = TagOptions(top_k).select(probabilities, engine.labels)
                yield from format_windows([TaggedWindow(start, end, tags)])
        except AudioReadError as error:
            faults.append(str(error))
            yield f"  cannot be read: {error.reason}"
        yield from (f"  {kind}: {sentence}" for kind, sentence in warnings.items())
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UserError(f"{len(faults)} of {len(files)} sound files could not be tagged:{listed}")


def run(description: str, features: Features, arguments: Sequence[str] | None) -> None:
    """Tag the files of a command line and print their tags.

    Raises:
        UserError: the model or a sound file cannot be read; the other files are tagged.
    """
    options = parse_arguments(MelFileOptions, description, arguments)
    for line in report(open_for_features(options.model), features, options.wavs, options.chunk, options.topk):
        print(line, flush=True)
