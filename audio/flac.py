"""FLAC: consecutive streams in a file or a stream.

Format: RFC 9639.
"""

from collections.abc import Iterator
from itertools import pairwise

from audio.byte_stream import ByteStream, Piece, StreamPieces
from audio.parts import PLAIN_FLAC, Contents, Part, Slice

MARKER = b"fLaC\x00\x00\x00\x22"  # beginning of a stream, with its STREAMINFO
_BUFFER = 1 << 14  # bytes that a decoder may read ahead of the last frame
_BLOCK = 1 << 12


def find_flac(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the streams of a FLAC file without a length; of others, `find_rest` finds them after decoding."""
    if len(head) < 26 or head[4] & 0x7F:
        return Contents()
    if int.from_bytes(head[18:26], "big") & ((1 << 36) - 1):
        return PLAIN_FLAC
    return Contents(find_streams(descriptor, 0, size), "flac")


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
