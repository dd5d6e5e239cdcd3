"""Ogg: the links of a file or a stream, and what is missing in them.

Streams may be chained: each link begins with pages that are marked as the beginning of a stream, and may have other
rates and channels. Pages have a number, a checksum and a granule position. Format: RFC 3533; granule positions of Opus:
RFC 7845.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from audio.byte_stream import ByteStream, Piece, StreamPieces
from audio.parts import Contents, Part, Slice

_HEADER = 27  # bytes
_MARK = re.compile(b"O")  # of "OggS", which may be split between blocks
_FIRST, _LAST = 2, 4  # bits of a page's type
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # zlib uses the opposite order of bits
_OPUS_RATE = 48000


class OggPage(NamedTuple):
    """A page with the fields of its header."""

    start: int  # byte of the stream
    data: bytes
    type: int
    granule_position: int
    serial: int
    number: int
    body: bytes  # its beginning
    is_complete: bool  # not cut at its end
    is_valid: bool  # and its checksum is right


@dataclass
class OggStream:
    """A logical stream of a link."""

    name: str = ""
    rate: int = 0
    n_skipped: int = 0
    number: int = 0
    granule_position: int = 0
    is_ended: bool = False


@dataclass
class OggLink:
    """Streams that begin together."""

    start: int
    stop: int = 0
    streams: dict[int, OggStream] = field(default_factory=dict)
    is_at_start: bool = True  # only first pages of streams so far

    def add(self, page: OggPage) -> int:
        """Add a page to its stream; return the number of pages that are missing in front of it."""
        self.stop = page.start + len(page.data)
        if page.type & _FIRST:
            self.streams[page.serial] = _begin_stream(page)
            return 0
        self.is_at_start = False
        stream = self.streams.get(page.serial)
        if stream is None:
            return 0
        n_missing = max(page.number - stream.number - 1, 0) if page.is_valid else 0
        stream.number = page.number
        if page.granule_position > 0:
            stream.granule_position = page.granule_position
        stream.is_ended |= bool(page.type & _LAST)
        return n_missing

    def find_sounds(self) -> list[OggStream]:
        """Return the streams of sound."""
        return [stream for stream in self.streams.values() if stream.name]


class OggPieces(StreamPieces):
    """The links of an Ogg stream, page by page.

    Args:
        stream: to read from.

    Attributes:
        link: the current one.
        warnings: kind → a sentence without its subject; complete at the end.
    """

    link: OggLink | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pages; bytes between them are skipped."""
        link = self.link
        n_lost = 0
        is_complete = True
        for page in read_pages(self.stream):
            is_first = link is None or (bool(page.type & _FIRST) and not link.is_at_start)
            if link is None or is_first:
                link = self.link = OggLink(page.start)
            n_lost += link.add(page) + (page.is_complete and not page.is_valid)
            is_complete = page.is_complete
            yield Piece(page.data, is_first)
        if link is not None and not (is_complete and all(stream.is_ended for stream in link.find_sounds())):
            self.warnings["truncated"] = "ends early: its last page, which is marked as the end, is missing"
        if n_lost:
            are = "is" if n_lost == 1 else "are"
            self.warnings["damaged"] = f"is damaged: {n_lost} of its pages {are} incomplete or missing"


def find_links(descriptor: int, size: int, head: bytes = b"") -> Contents:
    """Find the links of an Ogg file, each of which is decoded on its own."""
    pieces = OggPieces(ByteStream(Slice(descriptor, 0, size)))
    links = [pieces.link for piece in pieces if piece.is_first and pieces.link is not None]
    if not links or not links[0].streams:
        return Contents()  # it begins within a stream: left to the decoders
    parts = [_create_part(link) for link in links]
    if len(parts) == 1 and parts[0].decoder == "libsndfile":
        parts = [Part(seconds=parts[0].seconds)]
    return Contents(parts, "ogg", pieces.warnings)


def read_pages(stream: ByteStream) -> Iterator[OggPage]:
    """Read all pages; bytes between them are skipped."""
    while len(head := stream.peek(_HEADER)) == _HEADER:
        if head[:4] != b"OggS":
            stream.skip_to(_MARK)
            continue
        start = stream.position
        n_header = _HEADER + head[26]
        n_bytes = n_header + sum(stream.peek(n_header)[_HEADER:])
        data = stream.peek(n_bytes)
        is_complete = len(data) == n_bytes
        is_valid = is_complete and checksum(data) == int.from_bytes(data[22:26], "little")
        if not is_valid and is_complete and (found := data.find(b"OggS", 4)) > 0:
            data = data[:found]  # some of its bytes are missing
        stream.skip(len(data))
        yield OggPage(
            start,
            data,
            data[5],
            int.from_bytes(data[6:14], "little", signed=True),
            int.from_bytes(data[14:18], "little"),
            int.from_bytes(data[18:22], "little"),
            data[n_header : n_header + 64],
            is_complete,
            is_valid,
        )


def checksum(page: bytes) -> int:
    """Compute a page's CRC-32 with the generator 0x04c11db7."""
    mirrored = (page[:22] + b"\0\0\0\0" + page[26:]).translate(_REVERSED)
    value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(value.to_bytes(4, "little").translate(_REVERSED), "big")


def _begin_stream(page: OggPage) -> OggStream:
    """Read codec and sample rate from the first page of a stream."""
    body, stream = page.body, OggStream(number=page.number)
    if body[1:7] == b"vorbis":
        stream.name, stream.rate = "vorbis", int.from_bytes(body[12:16], "little")
    elif body[:8] == b"OpusHead":
        stream.name, stream.rate, stream.n_skipped = "opus", _OPUS_RATE, int.from_bytes(body[10:12], "little")
    elif body[1:5] == b"FLAC":
        stream.name, stream.rate = "flac", int.from_bytes(body[27:30], "big") >> 4
    elif body[:8] == b"Speex   ":
        stream.name, stream.rate = "speex", int.from_bytes(body[36:40], "little")
    return stream


def _create_part(link: OggLink) -> Part:
    sounds = link.find_sounds()
    if len(link.streams) != 1 or not sounds or sounds[0].name == "speex":
        return Part(link.start, link.stop, decoder="ffmpeg", container="ogg")
    (stream,) = sounds
    seconds = max(stream.granule_position - stream.n_skipped, 0) / stream.rate if stream.rate else None
    return Part(link.start, link.stop, container="ogg", seconds=seconds)
