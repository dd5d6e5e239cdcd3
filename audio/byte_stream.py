"""Streams of bytes with a look-ahead, and their parts, which decoders read like files."""

import re
from collections.abc import Iterator
from io import RawIOBase
from typing import BinaryIO, NamedTuple

_BLOCK = 1 << 16  # bytes read from a source at once, where it supports read1


class ByteStream:
    """A source of bytes that is read forward only, with a look-ahead.

    Args:
        source: a pipe, a socket's file, an open file.

    Attributes:
        position: bytes read so far.
    """

    def __init__(self, source: BinaryIO | RawIOBase) -> None:
        self.source = source
        self.position = 0
        has_read1 = hasattr(source, "read1")  # which returns what is there, instead of waiting for all bytes
        self._read = source.read1 if has_read1 else source.read  # type: ignore[union-attr]
        self._n_block = _BLOCK if has_read1 else 0
        self._ahead, self._at = b"", 0  # bytes read ahead, and the index of the next one

    def peek(self, n_bytes: int) -> bytes:
        """Wait for `n_bytes` and return them without consuming them; fewer only at the end."""
        while (n_needed := self._at + n_bytes - len(self._ahead)) > 0:
            more = self._read(max(n_needed, self._n_block))
            if not more:
                break
            self._ahead, self._at = self._ahead[self._at :] + more, 0
        return self._ahead[self._at : self._at + n_bytes]

    def read1(self, n_bytes: int) -> bytes:
        """Read what is there, at most `n_bytes`; none only at the end."""
        if self._at == len(self._ahead):
            self._ahead, self._at = self._read(n_bytes) or b"", 0
        data = self._ahead[self._at : self._at + n_bytes]
        self._at += len(data)
        self.position += len(data)
        return data

    def read(self, n_bytes: int) -> bytes:
        """Wait for `n_bytes` and read them; fewer only at the end."""
        data = self.peek(n_bytes)
        self._at += len(data)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back at the front."""
        self._ahead, self._at = data + self._ahead[self._at :], 0
        self.position -= len(data)

    def skip(self, n_bytes: int) -> None:
        """Skip `n_bytes`."""
        while n_bytes > 0 and (data := self.read1(min(n_bytes, _BLOCK))):
            n_bytes -= len(data)

    def skip_to(self, pattern: re.Pattern[bytes]) -> int:
        """Skip at least a byte up to the next match in the bytes that are there; return the number skipped."""
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
        data: at least one byte.
        is_first: a part begins with them.
    """

    data: bytes
    is_first: bool = False


class StreamPieces:
    """A stream of consecutive parts. Iterating, once, yields the pieces of each as they come.

    Args:
        stream: to read from.

    Attributes:
        warnings: kind → a sentence without its subject; complete at the end.
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
        pieces: the following pieces of the stream.

    Attributes:
        following: the first piece of the next part, set at the end of this one.
    """

    def __init__(self, first: Piece, pieces: Iterator[Piece]) -> None:
        self._held, self._pieces = first.data, pieces
        self._is_ended = False
        self.following: Piece | None = None

    def read1(self, n_bytes: int) -> bytes:
        """Read what is there, at most `n_bytes`; none only at the end."""
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
    """Yield the parts of a stream one after the other; the unread rest of one is skipped."""
    first = next(pieces, None)
    while first is not None:
        part = StreamPart(first, pieces)
        yield part
        while part.read1(1 << 16):
            pass
        first = part.following
