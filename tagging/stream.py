"""Tag sound while it comes in: a microphone, a socket, a recording that still grows.

The windows and what is said of them are those of the whole sound in a file; memory does not grow.
"""

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import soxr

from audio.io import UNKNOWN_LENGTHS
from common.errors import UserError
from tagging.engines import Engine
from tagging.files import TaggedWindow, Wanted, create_windows, tag_windows


class Encoding(NamedTuple):
    """How samples lie in a stream of bytes.

    Attributes:
        sample_rate: hertz.
        channels: interleaved.
        format: one of `FORMATS`.
    """

    sample_rate: int
    channels: int = 1
    format: str = "s16le"


# name -> (numpy type, bytes a sample, what is full scale, what is silence)
FORMATS: dict[str, tuple[str, int, float, float]] = {
    "u8": ("u1", 1, 128.0, 128.0),
    "s16le": ("<i2", 2, 32768.0, 0.0),
    "s24le": ("<i4", 3, 2147483648.0, 0.0),
    "s32le": ("<i4", 4, 2147483648.0, 0.0),
    "f32le": ("<f4", 4, 1.0, 0.0),
    "f64le": ("<f8", 8, 1.0, 0.0),
}
_WAV_FORMATS = {
    (1, 8): "u8",
    (1, 16): "s16le",
    (1, 24): "s24le",
    (1, 32): "s32le",
    (3, 32): "f32le",
    (3, 64): "f64le",
}
_LARGEST_FORMAT = 1 << 16  # bytes
_EXTENSIBLE = 0xFFFE  # the true format is then the first two bytes of the sub-format
# How files begin that are no stream of samples.
_FOREIGN = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3\x03": "MP3",
    b"ID3\x04": "MP3",
    b"FORM": "AIFF",
    b"RIFX": "big-endian wav",
    b"caff": "CAF",
    b"\x1aE\xdf\xa3": "Matroska",
}
_BEHIND_SAMPLES = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"smpl", b"fact", b"PEAK", b"iXML", b"_PMX", b"JUNK"}


class StreamTagger:
    """Tags a stream: push samples, get the windows that they complete.

        tagger = StreamTagger(open_engine("ced_tiny"), chunk_seconds=2.0, hop_seconds=0.5, sample_rate=48000)
        for block in microphone:
            for window in tagger.push(block):
                print(window.start, window.tags)

    Args:
        engine: computes.
        wanted: what to keep of a window, by default its three best labels.
        chunk_seconds: length of a window.
        hop_seconds: from one window's start to the next; `chunk_seconds` when None.
        sample_rate: of what is pushed, in hertz; the engine's when None.

    Raises:
        UserError: windows too long for the engine.
    """

    def __init__(
        self,
        engine: Engine,
        wanted: Wanted | None = None,
        *,
        chunk_seconds: float = 10.0,
        hop_seconds: float | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.engine = engine
        self.wanted = wanted or Wanted()
        self._windows = create_windows(engine, chunk_seconds, hop_seconds)
        self._finished = False
        self._resampler = None
        if sample_rate is not None and sample_rate != engine.sample_rate:
            self._resampler = soxr.ResampleStream(sample_rate, engine.sample_rate, 1, dtype="float32", quality="HQ")

    @property
    def seconds(self) -> float:
        """How much sound has come, as far as it is resampled."""
        return self._windows.n_received / self.engine.sample_rate

    def push(self, samples: np.ndarray) -> list[TaggedWindow]:
        """Take the next samples, float (S,) or (S, channels) with full scale 1.0, and tag the windows they complete.

        Raises:
            UserError: samples that are whole or not finite numbers, or that come after `finish`.
        """
        if self._finished:
            raise UserError("the stream was finished; make another StreamTagger for another sound")
        if not np.issubdtype(np.asarray(samples).dtype, np.floating):
            raise UserError(f"samples are {np.asarray(samples).dtype}; wanted floats with full scale 1.0")
        samples = np.asarray(samples, np.float32)
        if not np.isfinite(samples).all():
            raise UserError(f"the stream has samples that are not finite numbers after {self.seconds:.2f} s")
        if samples.ndim == 2:
            samples = samples.mean(axis=1)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        return self._tagged(self._windows.push(samples))

    def finish(self) -> list[TaggedWindow]:
        """Tag what remains at the end of the stream; once."""
        windows: list[TaggedWindow] = []
        if self._finished:
            return windows
        self._finished = True
        if self._resampler is not None:
            rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            windows = self._tagged(self._windows.push(rest))
        return windows + self._tagged(self._windows.finish())

    def _tagged(self, cuts: Iterator[tuple[int, np.ndarray]]) -> list[TaggedWindow]:
        tagged = []
        rate = self.engine.sample_rate
        for start, samples in cuts:
            window = TaggedWindow(start / rate, (start + len(samples)) / rate)
            tag_windows(self.engine, [samples], [window], self.wanted)
            tagged.append(window)
        return tagged


def read_stream(source: BinaryIO, raw: Encoding, block_seconds: float = 0.1) -> tuple[Encoding, Iterator[np.ndarray]]:
    """Read samples from a stream of bytes as they come.

    Args:
        source: raw samples, or a wav file from its beginning, which may still grow: behind the length in its header
            nothing ends but at a chunk of something else.
        raw: the encoding of a stream that does not begin with a wav header.
        block_seconds: how much to wait for at once.

    Returns:
        The encoding, and the blocks, float32 (S, channels) with full scale 1.0, until the stream ends.

    Raises:
        UserError: an encoding that is not known here, or a header that breaks off or is that of another kind of file.
    """
    if raw.format not in FORMATS:
        raise UserError(f"samples of format {raw.format!r} are not known; wanted one of {', '.join(FORMATS)}")
    head = _read(source, 4)
    if head in _FOREIGN:
        raise UserError(
            f"the stream is a file of format {_FOREIGN[head]}; wanted a wav or raw samples: decode it beforehand "
            "(`ffmpeg -i - -f wav -`, say), or give the file itself"
        )
    if head not in (b"RIFF", b"RF64"):
        return raw, _blocks(_reader(source), raw, head, block_seconds)
    encoding, n_bytes = _wav_header(source)
    return encoding, _blocks(_WavSamples(source, n_bytes).read, encoding, b"", block_seconds)


def _reader(source: BinaryIO) -> Callable[[int], bytes]:
    """Give a function that waits for some bytes and reads what is there, rather than wait for all it could take."""
    return getattr(source, "read1", source.read)


class _WavSamples:
    """The bytes behind a wav's header without the chunks that some programs write behind the samples.

    Args:
        source: from the first sample on.
        n_bytes: of samples, as the header has it, which it may not know or not know yet.
    """

    def __init__(self, source: BinaryIO, n_bytes: int) -> None:
        self.source, self.padding = source, n_bytes % 2
        self.n_left: int | None = None if n_bytes in UNKNOWN_LENGTHS else n_bytes

    def read(self, n: int, /) -> bytes:
        """Read at most so many bytes; none at the end alone."""
        if self.n_left is None:
            return _reader(self.source)(n)
        if self.n_left > 0:
            data = _reader(self.source)(min(n, self.n_left))
            self.n_left -= len(data)
            return data
        data = self.source.read(self.padding + 8)
        if data[self.padding : self.padding + 4] in _BEHIND_SAMPLES:
            return b""
        self.n_left = None  # the file has grown
        return data if len(data) > self.padding else b""


def _blocks(
    read: Callable[[int], bytes], encoding: Encoding, head: bytes, block_seconds: float
) -> Iterator[np.ndarray]:
    kind, width, full_scale, silence = FORMATS[encoding.format]
    frame = width * encoding.channels
    n_bytes = max(round(block_seconds * encoding.sample_rate), 1) * frame
    rest, more = head, b"not yet read"
    while more:
        more = read(max(n_bytes - len(rest), 1))
        data = rest + more
        whole = len(data) // frame * frame
        data, rest = data[:whole], data[whole:]
        if whole == 0:
            continue
        if width == 3:  # into the upper three bytes of four
            padded = np.zeros((whole // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = padded.view("<i4")[:, 0]
        else:
            samples = np.frombuffer(data, kind)
        yield ((samples.astype(np.float64) - silence) / full_scale).astype(np.float32).reshape(-1, encoding.channels)


def _wav_header(source: BinaryIO) -> tuple[Encoding, int]:
    """Read a wav header up to the first sample: how samples lie, and how many bytes of them it announces."""
    _read(source, 4)  # length of the file
    encoding = None
    if _read(source, 4) != b"WAVE":
        raise UserError("the stream begins with RIFF, but it is no wav file")
    while True:
        kind, size = struct.unpack("<4sI", _read(source, 8))
        if kind == b"data":
            break
        body = _read(source, min(size + size % 2, _LARGEST_FORMAT))
        for left in range(size + size % 2 - len(body), 0, -_LARGEST_FORMAT):
            _read(source, min(left, _LARGEST_FORMAT))  # of a chunk that nobody asks for
        if kind == b"fmt ":
            if len(body) < 16:
                raise UserError("the wav in the stream says too little of its format")
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if tag == _EXTENSIBLE and len(body) >= 26:
                tag = struct.unpack("<H", body[24:26])[0]
            if (tag, bits) not in _WAV_FORMATS or channels < 1 or rate < 1:
                raise UserError(
                    f"the wav in the stream holds samples of format {tag} with {bits} bits; wanted PCM of 8, 16, 24 or "
                    "32 bits, or floating point"
                )
            encoding = Encoding(rate, channels, _WAV_FORMATS[tag, bits])
    if encoding is None:
        raise UserError("the wav in the stream has no format before its samples")
    return encoding, size


def _read(source: BinaryIO, n_bytes: int) -> bytes:
    """Read exactly so many bytes of a header; fewer than four may be a whole raw stream."""
    data = b""
    while len(data) < n_bytes and (more := source.read(n_bytes - len(data))):
        data += more
    if len(data) < n_bytes and n_bytes != 4:
        raise UserError("the wav in the stream ends within its header")
    return data
