"""Uncompressed samples in a stream: raw ones, and those of WAV, Wave64, AIFF, CAF and AU, which may still grow.

Nothing is waited for: samples are given as they come. Behind the length that a header announces nothing ends but where
chunks of something else, or nothing but zeros, lie at the end of the stream: a header may be older than the samples.

S samples.
"""

import re
import struct
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import soundfile

from audio.byte_stream import ByteStream
from audio.chunks import (
    AIFF_LAYOUT,
    AU_SUBTYPES,
    CAF_LAYOUT,
    FILE_MARKS,
    NEARLY_UNKNOWN,
    RIFX_LAYOUT,
    TRAILING_CHUNKS,
    UNKNOWN_LENGTHS,
    W64_LAYOUT,
    WAV_LAYOUT,
    ChunkLayout,
    is_chunk_name,
)
from audio.parts import RawFormat
from common.errors import UserError

_LARGEST_CHUNK = 1 << 16  # bytes kept of a header
_LARGEST_TRAILER = 1 << 20  # bytes that are waited for to see whether the stream ends with them
_ZEROS = bytes(1 << 16)
_TRAILING_NAME = re.compile(b"|".join(re.escape(name) for name in sorted(TRAILING_CHUNKS)))


class Encoding(NamedTuple):
    """How samples lie in a stream of bytes without a header.

    Attributes:
        sample_rate: hertz.
        channels: interleaved.
        format: one of `FORMATS`.
    """

    sample_rate: int
    channels: int = 1
    format: str = "s16le"


# name -> libsndfile's name, bytes a sample
FORMATS: dict[str, tuple[str, int]] = {
    "u8": ("PCM_U8", 1),
    "s16le": ("PCM_16", 2),
    "s24le": ("PCM_24", 3),
    "s32le": ("PCM_32", 4),
    "f32le": ("FLOAT", 4),
    "f64le": ("DOUBLE", 8),
}
# libsndfile's name -> numpy type, what is full scale, what is silence
_TYPES: dict[str, tuple[str, float, float]] = {
    "PCM_U8": ("u1", 128.0, 128.0),
    "PCM_S8": ("i1", 128.0, 0.0),
    "PCM_16": ("i2", 32768.0, 0.0),
    "PCM_24": ("i4", 2147483648.0, 0.0),
    "PCM_32": ("i4", 2147483648.0, 0.0),
    "FLOAT": ("f4", 1.0, 0.0),
    "DOUBLE": ("f8", 1.0, 0.0),
}


def raw_format(encoding: Encoding) -> RawFormat:
    """Return how samples lie.

    Raises:
        UserError: an encoding that is not known here.
    """
    if encoding.format not in FORMATS:
        raise UserError(f"samples of format {encoding.format!r} are not known; wanted one of {', '.join(FORMATS)}")
    subtype, width = FORMATS[encoding.format]
    return RawFormat(encoding.sample_rate, encoding.channels, subtype, "LITTLE", width * encoding.channels)


def decode_samples(pieces: Iterator[bytes], raw: RawFormat) -> Iterator[np.ndarray]:
    """Turn bytes into blocks of float32 (S, channels) with full scale 1.0; what is no whole sample waits for more."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        whole = len(data) // raw.frame_bytes * raw.frame_bytes
        data, rest = data[:whole], data[whole:]
        if data:
            yield _to_floats(data, raw).reshape(-1, raw.channels)


def _to_floats(data: bytes, raw: RawFormat) -> np.ndarray:
    if raw.subtype in ("ULAW", "ALAW"):
        return _logarithmic(raw.subtype)[np.frombuffer(data, np.uint8)]
    kind, full_scale, silence = _TYPES[raw.subtype]
    order = "<" if raw.endian == "LITTLE" else ">"
    if raw.subtype == "PCM_24":  # into the upper three bytes of four
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, slice(1, 4) if order == "<" else slice(0, 3)] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = padded.view(f"{order}i4")[:, 0]
    else:
        samples = np.frombuffer(data, f"{order}{kind}")
    if full_scale == 1.0:
        return samples.astype(np.float32)
    return ((samples.astype(np.float64) - silence) / full_scale).astype(np.float32)


@cache
def _logarithmic(subtype: str) -> np.ndarray:
    """The value of each byte, float32 (256,)."""
    how = {"samplerate": 8000, "channels": 1, "format": "RAW", "subtype": subtype}
    return soundfile.read(BytesIO(bytes(range(256))), dtype="float32", **how)[0]


class Header(NamedTuple):
    """What is in front of the samples.

    Attributes:
        raw: how these lie; None where they are compressed, or the header says too little.
        n_bytes: of samples, as the header has it; 0 or less, or one of `UNKNOWN_LENGTHS`, where it does not know.
        data: its own bytes, without chunks that are large.
        layout: of the chunks behind the samples; None where there are none.
    """

    raw: RawFormat | None
    n_bytes: int
    data: bytes
    layout: ChunkLayout | None


def choose_layout(head: bytes) -> ChunkLayout | None:
    """Return how chunks lie in a stream that begins with these twelve bytes; None of any other stream."""
    if head[8:12] == b"WAVE" and head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX"):
        return RIFX_LAYOUT if head[:4] == b"RIFX" else WAV_LAYOUT
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return AIFF_LAYOUT
    return {b"riff": W64_LAYOUT, b"caff": CAF_LAYOUT}.get(head[:4])


def read_header(stream: ByteStream, layout: ChunkLayout) -> Header | None:
    """Take a header up to the first sample; None where the stream ends within it."""
    kept = bytearray(stream.read(layout.first))
    position, size64 = layout.first, 0
    raw: RawFormat | None = None
    while len(head := stream.read(layout.header)) == layout.header:
        name, n_bytes = layout.parse(head)
        position += layout.header
        if name == layout.data_name:
            kept += head + stream.read(layout.skip)
            n_bytes = size64 if n_bytes == 0xFFFFFFFF and size64 else n_bytes - layout.skip
            return Header(raw, n_bytes, bytes(kept), layout)
        if n_bytes < 0:
            return None
        padded = n_bytes + -(position + n_bytes) % layout.align
        position += padded
        body = stream.read(min(padded, _LARGEST_CHUNK))
        stream.skip(padded - len(body))
        if len(body) == padded:
            kept += head + body
        if name == layout.format_name:
            raw = layout.read_format(body[:n_bytes])
        elif name == b"ds64" and len(body) >= 16:
            (size64,) = struct.unpack("<Q", body[8:16])
    return None


def read_au_header(stream: ByteStream) -> Header | None:
    """Take the header of an AU up to the first sample; None where the stream ends within it."""
    data = stream.read(24)
    if len(data) < 24:
        return None
    start, n_bytes, encoding, rate, channels = struct.unpack(">5I", data[4:24])
    data += stream.read(min(max(start - 24, 0), _LARGEST_CHUNK))
    subtype, width = AU_SUBTYPES.get(encoding, ("", 0))
    raw = None
    if subtype and rate and 0 < channels < 1024 and len(data) == start:
        raw = RawFormat(rate, channels, subtype, "BIG", width * channels)
    return Header(raw, n_bytes, data, None)


class SampleBytes:
    """The bytes of samples behind a header, without what lies behind them. Iterating, once, gives them as they come.

    Args:
        stream: to read from.
        header: that was read from it.
        n_block: bytes to wait for at most.

    Attributes:
        n_read: bytes of samples so far.
        n_missing: bytes that are missing at the end, by the header.
        is_followed: the stream holds another file behind this one.
    """

    def __init__(self, stream: ByteStream, header: Header, n_block: int) -> None:
        self.stream, self.header, self.n_block = stream, header, n_block
        self.n_read = self.n_missing = 0
        self.is_followed = False

    def __iter__(self) -> Iterator[bytes]:
        for data in self._announced(self.header.n_bytes):
            self.n_read += len(data)
            yield data

    def _announced(self, n_bytes: int) -> Iterator[bytes]:
        if n_bytes <= 0 or n_bytes in UNKNOWN_LENGTHS:
            yield from self._open_ended()
            return
        n_left = n_bytes
        while n_left and (data := self.stream.read1(min(n_left, self.n_block))):
            n_left -= len(data)
            yield data
        if not n_left:
            yield from self._behind(n_bytes)
        elif n_bytes < NEARLY_UNKNOWN:
            self.n_missing = n_left

    def _behind(self, n_bytes: int) -> Iterator[bytes]:
        """Give samples that lie behind the announced ones, of another chunk or because the file has grown."""
        layout = self.header.layout
        if layout is None:
            yield from self._grown()
            return
        padding = -(n_bytes + layout.skip) % layout.align
        for n_padding in dict.fromkeys((padding, 0)):  # some leave the padding out
            head = self.stream.peek(n_padding + layout.header)[n_padding:]
            if len(head) < layout.header:
                return  # a header does not fit
            if head[:4] in FILE_MARKS:
                self.stream.skip(n_padding)
                self.is_followed = True
                return
            name, n_behind = layout.parse(head)
            if name == layout.data_name:
                self.stream.skip(n_padding + layout.header + layout.skip)
                yield from self._announced(n_behind - layout.skip)
                return
            if name in TRAILING_CHUNKS and n_behind >= 0:
                self.stream.skip(n_padding + layout.header + n_behind)
                yield from self._behind(n_behind - layout.skip)
                return
            if is_chunk_name(name) and self._is_last(n_padding, layout):
                return
        yield from self._grown()

    def _grown(self) -> Iterator[bytes]:
        """Give samples that the header does not know of yet; zeros alone are space that a recorder has kept ready."""
        tag = self.stream.peek(129)
        if (tag[:3] == b"TAG" and len(tag) == 128) or tag[:8] == b"APETAGEX":
            return
        n_zeros = 0
        while data := self.stream.read1(self.n_block):
            if data.count(0) == len(data):
                n_zeros += len(data)
                continue
            for start in range(0, n_zeros, len(_ZEROS)):
                yield _ZEROS[: n_zeros - start]
            self.stream.unread(data)
            yield from self._open_ended()
            return

    def _open_ended(self) -> Iterator[bytes]:
        """Give everything but chunks of something else at the end of the stream."""
        layout = self.header.layout
        held = b""
        while more := self.stream.read1(self.n_block):
            data = held + more
            found = None if layout is None else _TRAILING_NAME.search(data)
            if found and layout is not None:
                self.stream.unread(data[found.start() :])
                if found.start():
                    yield data[: found.start()]
                if self._is_last(0, layout, TRAILING_CHUNKS):
                    return
                yield self.stream.read(1)
                held = b""
                continue
            n_given = len(data) if layout is None else max(len(data) - 3, 0)  # a name may be cut in two
            if n_given:
                yield data[:n_given]
            held = data[n_given:]
        if held:
            yield held

    def _is_last(self, position: int, layout: ChunkLayout, names: set[bytes] | None = None) -> bool:
        """Whether the stream ends with chunks that begin so many bytes ahead; of these names only, if there are any."""
        while position < _LARGEST_TRAILER:
            head = self.stream.peek(position + layout.header)[position:]
            if len(head) < layout.header:
                return True
            name, n_bytes = layout.parse(head)
            if not (is_chunk_name(name) if names is None else name in names) or not 0 <= n_bytes < _LARGEST_TRAILER:
                return False
            end = position + layout.header + n_bytes
            if len(self.stream.peek(end)) < end:
                return False
            position = end + -n_bytes % layout.align
        return False
