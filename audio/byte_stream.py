"""Bytes as they come: a pipe that can be looked into, and cut into parts that decoders read like files."""

import re
from collections.abc import Iterator
from io import RawIOBase
from typing import BinaryIO, NamedTuple

_BLOCK = 1 << 16  # bytes taken from a source at once, where it gives what is there


class ByteStream:
    """A source of bytes that is read forward only, with a look ahead.

    Args:
        source: a pipe, a socket's file, an open file.

    Attributes:
        position: bytes taken so far.
    """

    def __init__(self, source: BinaryIO | RawIOBase) -> None:
        self.source = source
        self.position = 0
        gives_what_is_there = hasattr(source, "read1")  # rather than wait for all that it could take
        self._read = source.read1 if gives_what_is_there else source.read  # type: ignore[union-attr]
        self._n_block = _BLOCK if gives_what_is_there else 0
        self._ahead, self._at = b"", 0  # what was read, and where in it the next byte lies

    def peek(self, n_bytes: int) -> bytes:
        """Wait for so many bytes and return them, without taking them; fewer at the end alone."""
        while (n_wanted := self._at + n_bytes - len(self._ahead)) > 0:
            more = self._read(max(n_wanted, self._n_block))
            if not more:
                break
            self._ahead, self._at = self._ahead[self._at :] + more, 0
        return self._ahead[self._at : self._at + n_bytes]

    def read1(self, n_bytes: int) -> bytes:
        """Take what is there, at most so many bytes; none at the end alone."""
        if self._at == len(self._ahead):
            self._ahead, self._at = self._read(n_bytes) or b"", 0
        data = self._ahead[self._at : self._at + n_bytes]
        self._at += len(data)
        self.position += len(data)
        return data

    def read(self, n_bytes: int) -> bytes:
        """Wait for so many bytes and take them; fewer at the end alone."""
        data = self.peek(n_bytes)
        self._at += len(data)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back in front of all others."""
        self._ahead, self._at = data + self._ahead[self._at :], 0
        self.position -= len(data)

    def skip(self, n_bytes: int) -> None:
        """Take so many bytes, and forget them."""
        while n_bytes > 0 and (data := self.read1(min(n_bytes, _BLOCK))):
            n_bytes -= len(data)

    def skip_to(self, pattern: re.Pattern[bytes]) -> int:
        """Pass over a byte and all behind it up to the next match, in what is there; return how many."""
        self.peek(1)
        found = pattern.search(self._ahead, self._at + 1)
        n_skipped = (found.start() if found else len(self._ahead)) - self._at
        self._at += n_skipped
        self.position += n_skipped
        return n_skipped

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


class StreamPieces:
    """A stream of parts that lie one behind the other. Iterating, once, gives the pieces of each as they come.

    Args:
        stream: to read from.

    Attributes:
        warnings: kind of oddity → a sentence without its subject; known at the end.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Iterator[Piece]:
        raise NotImplementedError


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
