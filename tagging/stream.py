"""Tag streams of sound: a microphone, a socket, a recording that still grows.

The windows and their tags are those of the whole sound in a file; memory does not grow.
"""

import signal
import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from audio.io import LOSSES, Converter, describe_joined, describe_opposite
from audio.streams import Encoding, StreamDecoder
from common.errors import UserError
from common.interrupts import StopSignal
from tagging.base import Engine
from tagging.engines import TorchEngine
from tagging.files import TaggedWindow, TagOptions, create_windows, tag_windows
from tagging.session import format_windows
from tagging.windows import StateWindows, Windows


class StreamTagger:
    """Tags a stream: push samples, get the windows that they complete.

        tagger = StreamTagger(open_engine("ced_tiny"), chunk_seconds=2.0, hop_seconds=0.5, sample_rate=48000)
        for block in microphone:
            for window in tagger.push(block):
                print(window.start, window.tags)

    Stereo is mixed down a second at a time (see `audio.channels.Downmixer`), so that its windows come up to a second
    later than those of one channel.

    Args:
        engine: computes the probabilities.
        options: what to keep of a window, by default its three best labels.
        chunk_seconds: length of a window.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        sample_rate: of the samples pushed, in hertz; the engine's when None.

    Raises:
        UserError: windows too long for the engine.
    """

    def __init__(
        self,
        engine: Engine,
        options: TagOptions | None = None,
        *,
        chunk_seconds: float = 10.0,
        hop_seconds: float | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.engine = engine
        self.options = options or TagOptions()
        self.sample_rate = sample_rate or engine.sample_rate
        self._windows: Windows | StateWindows = create_windows(engine, chunk_seconds, hop_seconds)
        if isinstance(engine, TorchEngine) and engine.has_state and not self.options.embeddings:
            self._windows = StateWindows(self._windows, engine.open_sound)
        self._finished = False
        self._converter: Converter | None = None
        self._shapes: dict[tuple[int, int], None] = {}  # sample rates and channels so far; a dict keeps their order
        self._n_opposite = self._n_mixed = 0.0  # seconds

    @property
    def seconds(self) -> float:
        """Seconds of sound so far, as far as it is mixed down and resampled."""
        return self._windows.n_received / self.engine.sample_rate

    @property
    def warnings(self) -> dict[str, str]:
        """Warnings so far, kind → sentence: "joined" and "out_of_phase", see `audio.io.AudioBlocks`."""
        warnings = {}
        if len(self._shapes) > 1:
            warnings["joined"] = describe_joined(list(self._shapes), self.engine.sample_rate)
        mixer = None if self._converter is None else self._converter.mixer
        n_opposite, n_mixed = self._n_opposite, self._n_mixed
        if mixer is not None and self._converter is not None:
            n_opposite += mixer.n_opposite / self._converter.rate
            n_mixed += mixer.n_samples / self._converter.rate
        if n_opposite:
            warnings["out_of_phase"] = describe_opposite(n_opposite, n_mixed)
        return warnings

    def push(self, samples: np.ndarray, sample_rate: int | None = None) -> list[TaggedWindow]:
        """Add samples and tag the windows that they complete.

        Args:
            samples: floats (S,) or (S, channels) with full scale 1.0; the number of channels may change.
            sample_rate: in hertz, by default that of the stream; it may change.

        Raises:
            UserError: samples that are integers or not finite, have the channels first, or come after `finish`.
        """
        samples = np.asarray(samples)
        if not np.issubdtype(samples.dtype, np.floating):
            raise UserError(f"samples are {samples.dtype}; expected floats with full scale 1.0")
        if samples.ndim not in (1, 2):
            raise UserError(f"samples have shape {samples.shape}; expected (S,) or (S, channels)")
        block = samples.astype(np.float32, copy=False).reshape(len(samples), -1) if samples.size else None
        if block is None:
            return self.push_block(np.zeros((0, 1), np.float32), 0)
        channels_so_far = {n_channels for _, n_channels in self._shapes}
        if block.shape[1] > len(block) and block.shape[1] not in channels_so_far:
            raise UserError(
                f"samples have shape {samples.shape}, more channels than samples; expected (S,) or (S, channels): "
                "transpose them, or push at least as many samples as there are channels"
            )
        return self.push_block(block, sample_rate or self.sample_rate)

    def push_block(self, block: np.ndarray, sample_rate: int) -> list[TaggedWindow]:
        """Add a block of `StreamDecoder`, float32 (S, channels), and tag the windows that it completes.

        Raises:
            UserError: samples that are not finite, or come after `finish`.
        """
        if self._finished:
            raise UserError("the stream is finished; create another StreamTagger for another sound")
        if not len(block):
            return []
        if not np.isfinite(block).all():
            raise UserError(f"the stream has samples that are not finite numbers after {self.seconds:.2f} s")
        shape = sample_rate, block.shape[1]
        windows = []
        if self._converter is None or shape != (self._converter.rate, self._converter.n_channels):
            windows = self._flush()
            self._shapes[shape] = None
            self._converter = Converter(*shape, self.engine.sample_rate, None)
        return windows + self._push(self._converter.push(block, False))

    def finish(self) -> list[TaggedWindow]:
        """Tag what remains at the end of the stream; nothing the second time."""
        if self._finished:
            return []
        windows = self._flush()
        self._finished = True
        if isinstance(self._windows, StateWindows):
            return windows + self._select(self._windows.finish())
        return windows + self._tag(self._windows.finish())

    def _flush(self) -> list[TaggedWindow]:
        """Tag what mixing down and resampling still hold, before samples of another rate or other channels."""
        if self._converter is None:
            return []
        converter, self._converter = self._converter, None
        rest = converter.push(np.zeros((0, converter.n_channels), np.float32), True)
        if converter.mixer is not None:
            self._n_opposite += converter.mixer.n_opposite / converter.rate
            self._n_mixed += converter.mixer.n_samples / converter.rate
        return self._push(rest)

    def _push(self, samples: np.ndarray) -> list[TaggedWindow]:
        """Add samples (S,) at the engine's rate and tag the windows that they complete."""
        if isinstance(self._windows, StateWindows):
            return self._select(self._windows.push(samples))
        return self._tag(self._windows.push(samples))

    def _tag(self, cuts: Iterator[tuple[int, np.ndarray]]) -> list[TaggedWindow]:
        """Tag windows, given by first sample and samples."""
        tagged = []
        rate = self.engine.sample_rate
        for start, samples in cuts:
            window = TaggedWindow(start / rate, (start + len(samples)) / rate)
            tag_windows(self.engine, [samples], [window], self.options)
            tagged.append(window)
        return tagged

    def _select(self, computed: Iterator[tuple[int, int, np.ndarray]]) -> list[TaggedWindow]:
        """Select the tags of windows, given by first sample, number of samples and probabilities."""
        rate, labels = self.engine.sample_rate, self.engine.labels
        return [
            TaggedWindow(start / rate, (start + n_samples) / rate, self.options.select(row, labels))
            for start, n_samples, row in computed
        ]


def tag_stream(
    stream: BinaryIO,
    engine: Engine,
    options: TagOptions,
    chunk_seconds: float,
    hop_seconds: float | None,
    *,
    rate: int | None = None,
    channels: int | None = None,
    encoding: str | None = None,
) -> bool:
    """Print the tags of a stream while it is read; Ctrl-C ends it.

    Args:
        stream: sound of any format; raw samples where one of rate, channels and encoding is given.
        engine: computes the probabilities.
        options: what to keep of a window.
        chunk_seconds: length of a window.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        rate: of raw samples in hertz; by default the engine's.
        channels: of raw samples; by default 1.
        encoding: of raw samples, a key of `audio.streams.FORMATS`; by default s16le.

    Returns:
        Whether no sound is missing.
    """
    stop: KeyboardInterrupt | None = None
    is_raw = any(value is not None for value in (rate, channels, encoding))
    raw = Encoding(rate or engine.sample_rate, channels or 1, encoding or "s16le")
    decoder = StreamDecoder(stream, raw, is_raw=is_raw)
    tagger = StreamTagger(engine, options, chunk_seconds=chunk_seconds, hop_seconds=hop_seconds)
    try:
        for block, block_rate in decoder:
            for line in format_windows(tagger.push_block(block, block_rate)):
                print(line, flush=True)
    except KeyboardInterrupt as error:  # the usual end of a microphone
        stop = error
    for line in format_windows(tagger.finish()):
        print(line, flush=True)
    warnings = decoder.warnings | tagger.warnings
    if isinstance(stop, StopSignal) and stop.number != signal.SIGINT:
        stop.add_note("the tags of all sound so far are printed")
        raise stop
    if warnings:
        print(f"standard input {'; '.join(warnings.values())}", file=sys.stderr)
    return not LOSSES & warnings.keys()
