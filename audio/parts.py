"""Parts of a sound file that are decoded one after the other, each like a file of its own."""

import io
import os
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import soundfile


class RawFormat(NamedTuple):
    """The format of samples in a part without a header.

    Attributes:
        sample_rate: in Hz.
        channels: interleaved.
        subtype: libsndfile's name of the encoding.
        endian: "LITTLE" or "BIG".
        frame_bytes: of one sample of all channels.
    """

    sample_rate: int
    channels: int
    subtype: str
    endian: str
    frame_bytes: int

    def open(self, source: BinaryIO | io.RawIOBase) -> soundfile.SoundFile:
        """Open samples of this format."""
        how = {"samplerate": self.sample_rate, "channels": self.channels, "subtype": self.subtype}
        return soundfile.SoundFile(source, format="RAW", endian=self.endian, **how)


@dataclass(frozen=True)
class Part:
    """Bytes of a file that are decoded on their own.

    Attributes:
        start: first byte.
        stop: end (exclusive); None: the whole file.
        raw: format of the samples, where they have no header.
        decoder: the one to try first, "libsndfile" or "ffmpeg".
        container: FFmpeg's name of it; detected when "".
        head: bytes that replace those at `start`.
        seconds: length by its own bytes, where it is known.
    """

    start: int = 0
    stop: int | None = None
    raw: RawFormat | None = None
    decoder: str = "libsndfile"
    container: str = ""
    head: bytes = b""
    seconds: float | None = None


@dataclass
class Contents:
    """The contents of a file.

    Attributes:
        parts: in order; one, whole, of most files.
        kind: "wav", "flac", "ogg", "mp3", "mp4"; "" where lengths were not checked.
        warnings: kind → a sentence without its subject.
    """

    parts: list[Part] = field(default_factory=lambda: [Part()])
    kind: str = ""
    warnings: dict[str, str] = field(default_factory=dict)


PLAIN_WAV, PLAIN_FLAC = Contents(kind="wav"), Contents(kind="flac")  # never changed


class Slice(io.RawIOBase):
    """Part of an open file as a file.

    Args:
        descriptor: of the file.
        start: first byte.
        stop: end (exclusive).
        head: bytes that replace the first ones.
    """

    name = ""  # decoders use it for detection

    def __init__(self, descriptor: int, start: int, stop: int, head: bytes = b"") -> None:
        self._descriptor, self._start, self._size, self._head = descriptor, start, stop - start, head
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        base = (0, self._position, self._size)[whence]
        self._position = max(base + offset, 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes; none only at the end."""
        left = max(self._size - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if self._position < len(self._head):
            data = self._head[self._position : self._position + size]
        else:
            data = os.pread(self._descriptor, size, self._start + self._position)
        self._position += len(data)
        return data

    read1 = read

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer; fewer bytes only at the end."""
        n_read = 0
        while n_read < len(buffer) and (data := self.read(len(buffer) - n_read)):
            buffer[n_read : n_read + len(data)] = data
            n_read += len(data)
        return n_read


def describe_cut(seconds: float | None = None, announced: float | None = None) -> str:
    """Return a sentence on a file that ends early."""
    text = "ends before the length that its header announces"
    return text if seconds is None or announced is None else f"{text} ({seconds:.2f} of {announced:.2f} s)"
