"""Bytes as they come: a pipe that can be looked into, and cut into parts that decoders read like files."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple


class ByteStream:
    """A source of bytes that is read forward only, with a look ahead.

    Args:
        source: a pipe, a socket's file, an open file.
    """

    def __init__(self, source: BinaryIO) -> None:
        self.source = source
        self._read = getattr(source, "read1", source.read)  # what is there, rather than wait for all it could take
        self._ahead = b""

    def peek(self, n_bytes: int) -> bytes:
        """Wait for so many bytes and return them, without taking them; fewer at the end alone."""
        while len(self._ahead) < n_bytes and (more := self._read(n_bytes - len(self._ahead))):
            self._ahead += more
        return self._ahead[:n_bytes]

    def read1(self, n_bytes: int) -> bytes:
        """Take what is there, at most so many bytes; none at the end alone."""
        if not self._ahead:
            return self._read(n_bytes) or b""
        data, self._ahead = self._ahead[:n_bytes], self._ahead[n_bytes:]
        return data

    def read(self, n_bytes: int) -> bytes:
        """Wait for so many bytes and take them; fewer at the end alone."""
        data = self.peek(n_bytes)
        self._ahead = self._ahead[n_bytes:]
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back in front of all others."""
        self._ahead = data + self._ahead

    def skip(self, n_bytes: int) -> None:
        """Take so many bytes, and forget them."""
        while n_bytes > 0 and (data := self.read1(min(n_bytes, 1 << 16))):
            n_bytes -= len(data)

    def seekable(self) -> bool:
        """Return False."""
        return False


class Piece(NamedTuple):
    """Bytes of a stream.

    Attributes:
        data: at least one.
        is_first: a part begins with them.
    """

    data: bytes
    is_first: bool = False


class StreamPart:
    """A part of a stream, read like a file of its own, forward only.

    Args:
        first: its first piece.
        pieces: what follows in the stream.

    Attributes:
        following: the first piece of the next part, known once this one is read to its end.
    """

    def __init__(self, first: Piece, pieces: Iterator[Piece]) -> None:
        self._held, self._pieces = first.data, pieces
        self._is_ended = False
        self.following: Piece | None = None

    def read1(self, n_bytes: int) -> bytes:
        """Take what is there, at most so many bytes; none at the end alone."""
        if not self._held and not self._is_ended:
            piece = next(self._pieces, None)
            self._is_ended = piece is None or piece.is_first
            if self._is_ended:
                self.following = piece
            elif piece is not None:
                self._held = piece.data
        data, self._held = self._held[:n_bytes], self._held[n_bytes:]
        return data

    read = read1

    def seekable(self) -> bool:
        """Return False."""
        return False


def split_parts(pieces: Iterator[Piece]) -> Iterator[StreamPart]:
    """Give the parts of a stream one after the other; what is not read of one is passed over."""
    first = next(pieces, None)
    while first is not None:
        part = StreamPart(first, pieces)
        yield part
        while part.read1(1 << 16):
            pass
        first = part.following
