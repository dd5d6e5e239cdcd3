"""FLAC: consecutive streams in a file or a stream.

Format: RFC 9639.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from audio.byte_stream import ByteStream, Piece, StreamPieces
from audio.parts import PLAIN_FLAC, Contents, Part, Slice

_MAX_TOTAL = (1 << 36) - 1  # samples that a header can announce
_TAIL = 1 << 16  # bytes at the end in which the last frame is searched
_BLOCK_SIZES = {1: 192, **{i: 576 << (i - 2) for i in range(2, 6)}, **{i: 256 << (i - 8) for i in range(8, 16)}}
_FRAME_RATES = dict(enumerate((88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000), 1))
MARKER = b"fLaC\x00\x00\x00\x22"  # beginning of a stream, with its STREAMINFO
_BUFFER = 1 << 14  # bytes that a decoder may read ahead of the last frame
_BLOCK = 1 << 12


def find_flac(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the streams of a FLAC file without a length; of others, `find_rest` finds them after decoding."""
    if len(head) < 26 or head[4] & 0x7F:
        return Contents()
    if int.from_bytes(head[18:26], "big") & _MAX_TOTAL:
        return PLAIN_FLAC
    return Contents(find_streams(descriptor, 0, size), "flac")


class FlacFrame(NamedTuple):
    """The header of a frame: its rate, 0 where only the stream has it, first sample and number of samples."""

    rate: int
    start: int
    n_samples: int


def parse_frame(data: bytes, block_size: int) -> FlacFrame | None:
    """Parse the header of a frame; None for other bytes, whose checksum differs.

    Args:
        data: begins with it.
        block_size: of the stream, where all frames have one.
    """
    if len(data) < 16 or data[0] != 0xFF or data[1] & 0xFE != 0xF8:
        return None
    size_code, rate_code = data[2] >> 4, data[2] & 15
    n_more = max(8 - (data[4] ^ 0xFF).bit_length() - 1, 0)  # bytes of the number that follow its first, as in UTF-8
    if not size_code or rate_code == 15 or (n_more == 0 and data[4] & 0x80):
        return None
    number = data[4] & (0x7F >> (n_more + (n_more > 0)))
    for byte in data[5 : 5 + n_more]:
        number = number << 6 | byte & 0x3F
    end = 5 + n_more
    n_samples = _BLOCK_SIZES.get(size_code, 0)
    if size_code in (6, 7):
        n_samples = int.from_bytes(data[end : end + size_code - 5], "big") + 1
        end += size_code - 5
    rate = _FRAME_RATES.get(rate_code, 0)
    if rate_code >= 12:
        n_bytes = 1 if rate_code == 12 else 2
        rate = int.from_bytes(data[end : end + n_bytes], "big") * {12: 1000, 13: 1, 14: 10}[rate_code]
        end += n_bytes
    if len(data) <= end or _checksum(data[:end]) != data[end]:
        return None
    return FlacFrame(rate, number if data[1] & 1 else number * block_size, n_samples)


def _checksum(data: bytes) -> int:
    """Compute the CRC-8 of a frame's header, with the generator x^8 + x^2 + x + 1."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value


def describe_contradiction(descriptor: int, size: int) -> str | None:
    """Return a sentence where the frames of a single stream have another rate, or more samples, than its header."""
    head = os.pread(descriptor, 26, 0)
    if head[:4] != b"fLaC":  # behind a tag
        return None
    rate, total = int.from_bytes(head[18:21], "big") >> 4, int.from_bytes(head[18:26], "big") & _MAX_TOTAL
    first = max(size - _TAIL, len(MARKER))
    last = _find_last_frame(os.pread(descriptor, size - first, first), int.from_bytes(head[8:10], "big"))
    if last is None:
        return None
    if last.rate not in (0, rate):
        return f"has a header that contradicts its sound: it announces {rate} Hz, and its frames {last.rate} Hz"
    end = last.start + last.n_samples
    if end > total:
        return f"has a header that contradicts its sound: it announces {total} samples, and its frames {end}"
    return None


def _find_last_frame(tail: bytes, block_size: int) -> FlacFrame | None:
    """Find the last frame, which follows another one or begins the stream: other bytes may look like a frame."""
    last: FlacFrame | None = None
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        frame = parse_frame(tail[at : at + 20], block_size)
        if frame is None:
            continue
        if last is not None and frame.start + frame.n_samples == last.start and frame.rate == last.rate:
            return last
        if frame.start == 0:
            return frame
        last = frame
    return None


def find_rest(descriptor: int, position: int, size: int) -> list[Part]:
    """Find the streams behind the first one.

    Args:
        descriptor: of the file.
        position: end of what the decoder has read.
        size: of the file.
    """
    first = max(position - _BUFFER, len(MARKER))
    if first >= size:
        return []
    return [part for part in find_streams(descriptor, first, size) if part.start > first]


def find_streams(descriptor: int, first: int, size: int) -> list[Part]:
    """Find the streams from a byte on; bytes in front of the first marker are one, too."""
    starts: list[int] = []
    position = first
    for piece in FlacPieces(ByteStream(Slice(descriptor, first, size))):
        if piece.is_first:
            starts.append(position)
        position += len(piece.data)
    return [Part(*ends, decoder="ffmpeg", container="flac") for ends in pairwise([*starts, size])]


class FlacPieces(StreamPieces):
    """Consecutive FLAC streams; the decoder detects what is missing in them."""

    def __iter__(self) -> Iterator[Piece]:
        """Yield what is there, except the length of a marker."""
        held, is_first = b"", True
        while data := self.stream.read1(_BLOCK):
            held += data
            while (at := held.find(MARKER, 1)) > 0:
                yield Piece(held[:at], is_first)
                held, is_first = held[at:], True
            n_given = len(held) - len(MARKER)
            if n_given > 0:
                yield Piece(held[:n_given], is_first)
                held, is_first = held[n_given:], False
        if held:
            yield Piece(held, is_first)
