"""Uncompressed samples in a stream: raw ones, and those of WAV, Wave64, AIFF, CAF and AU, which may still grow.

Samples are yielded as they come. The length in the header may be older than the samples: they end where other chunks,
or zeros alone, are at the end of the stream.

S samples.
"""

import re
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np

from audio.byte_stream import ByteStream
from audio.chunks import FILE_MARKS, NEARLY_UNKNOWN, TRAILING_CHUNKS, UNKNOWN_LENGTHS, Header, count_rest, is_chunk_name
from audio.parts import RawFormat
from common.errors import UserError

_ZEROS = bytes(1 << 16)
_TRAILING_NAME = re.compile(b"|".join(re.escape(name) for name in sorted(TRAILING_CHUNKS)))


class Encoding(NamedTuple):
    """The encoding of samples without a header.

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


def raw_format(encoding: Encoding) -> RawFormat:
    """Return the raw format of an encoding.

    Raises:
        UserError: the encoding is not supported.
    """
    if encoding.format not in FORMATS:
        raise UserError(
            f"samples of format {encoding.format!r} are not supported; expected one of {', '.join(FORMATS)}"
        )
    subtype, width = FORMATS[encoding.format]
    return RawFormat(encoding.sample_rate, encoding.channels, subtype, "LITTLE", width * encoding.channels)


def decode_samples(pieces: Iterator[bytes], raw: RawFormat) -> Iterator[np.ndarray]:
    """Convert bytes to blocks of float32 (S, channels) with full scale 1.0; incomplete samples wait for the next."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        whole = len(data) // raw.frame_bytes * raw.frame_bytes
        data, rest = data[:whole], data[whole:]
        if data:
            with raw.open(BytesIO(data)) as file:
                yield file.read(dtype="float32", always_2d=True)


class SampleBytes:
    """The bytes of samples behind a header, without what follows them. Iterating, once, yields them as they come.

    Args:
        stream: to read from.
        header: was read from it.
        n_block: most bytes to wait for.

    Attributes:
        n_read: bytes of samples so far.
        n_missing: bytes that are missing at the end, by the header.
        is_followed: another file follows in the stream.
    """

    def __init__(self, stream: ByteStream, header: Header, n_block: int) -> None:
        self.stream, self.header, self.n_block = stream, header, n_block
        self.n_read = self.n_missing = 0
        self.is_followed = False

    def __iter__(self) -> Iterator[bytes]:
        for data in self._read_announced(self.header.n_bytes):
            self.n_read += len(data)
            yield data

    def _read_announced(self, n_bytes: int) -> Iterator[bytes]:
        if n_bytes <= 0 or n_bytes in UNKNOWN_LENGTHS:
            yield from self._read_to_end()
            return
        n_left = n_bytes
        while n_left and (data := self.stream.read1(min(n_left, self.n_block))):
            n_left -= len(data)
            yield data
        if not n_left:
            yield from self._read_behind(n_bytes)
        elif n_bytes < NEARLY_UNKNOWN:
            self.n_missing = n_left

    def _read_behind(self, n_bytes: int) -> Iterator[bytes]:
        """Yield samples behind the announced ones, of another chunk or because the file has grown."""
        layout = self.header.layout
        if layout is None:
            yield from self._read_grown()
            return
        padding = -(n_bytes + layout.skip) % layout.align
        for n_padding in dict.fromkeys((padding, 0)):  # some programs omit the padding
            head = self.stream.peek(n_padding + layout.header)[n_padding:]
            if len(head) < layout.header:
                return  # too few for a chunk
            if head[:4] in FILE_MARKS:
                self.stream.skip(n_padding)
                self.is_followed = True
                return
            name, n_behind = layout.parse(head)
            if name == layout.data_name:
                self.stream.skip(n_padding + layout.header + layout.skip)
                yield from self._read_announced(n_behind - layout.skip)
                return
            if name in TRAILING_CHUNKS and n_behind >= 0:
                self.stream.skip(n_padding + layout.header + n_behind)
                yield from self._read_behind(n_behind - layout.skip)
                return
            if is_chunk_name(name) and count_rest(self.stream, layout, n_padding) is not None:
                return
        yield from self._read_grown()

    def _read_grown(self) -> Iterator[bytes]:
        """Yield samples that the header does not count yet; zeros alone are space that a recorder has reserved."""
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
            yield from self._read_to_end()
            return

    def _read_to_end(self) -> Iterator[bytes]:
        """Yield everything but other chunks at the end of the stream."""
        layout = self.header.layout
        held = b""
        while more := self.stream.read1(self.n_block):
            data = held + more
            found = None if layout is None else _TRAILING_NAME.search(data)
            if found and layout is not None:
                self.stream.unread(data[found.start() :])
                if found.start():
                    yield data[: found.start()]
                if count_rest(self.stream, layout, names=TRAILING_CHUNKS) is not None:
                    return
                yield self.stream.read(1)
                held = b""
                continue
            n_given = (
                len(data) if layout is None else max(len(data) - 3, 0)
            )  # a chunk's name may be split between blocks
            if n_given:
                yield data[:n_given]
            held = data[n_given:]
        if held:
            yield held
