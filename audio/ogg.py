"""Ogg files: their links, and what is missing in them.

Streams may be chained: each link begins with pages that are marked as the beginning of a stream, and may have other
rates and channels. Pages carry a number, a checksum, and the place in the stream. Format: RFC 3533; the place in Opus
streams: RFC 7845.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from audio.parts import Contents, Part

PAGE_HEADER = 27  # bytes
_LARGEST_PAGE = PAGE_HEADER + 255 + 255 * 255
_BLOCK = 1 << 20
_CONTINUED, FIRST_PAGE, _LAST = 1, 2, 4  # bits of a page's type
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # zlib has the bits the other way round
_OPUS_RATE = 48000


class OggPage(NamedTuple):
    """What a page's header says, and where the page lies."""

    start: int
    stop: int  # of the header's word; beyond the end of a file that is cut
    type: int
    place: int
    serial: int
    number: int
    body: bytes
    is_whole: bool


@dataclass
class OggStream:
    """A logical stream of a link."""

    name: str = ""
    rate: int = 0
    n_skipped: int = 0
    number: int = 0
    first_place: int | None = None
    place: int = 0
    is_ended: bool = False


@dataclass
class OggLink:
    """Streams that begin together."""

    start: int
    stop: int = 0
    streams: dict[int, OggStream] = field(default_factory=dict)
    n_lost: int = 0  # pages
    in_front: bool = True  # of the first page that begins no stream


def find_links(descriptor: int, size: int, head: bytes = b"") -> Contents:
    """Find the links of an Ogg file, each of which is decoded on its own."""
    links: list[OggLink] = []
    is_cut = False
    for page in _pages(descriptor, size):
        if page.type & FIRST_PAGE and (not links or not links[-1].in_front):
            links.append(OggLink(page.start))
        if not links:
            return Contents()  # it begins in the middle of a stream: the decoders may find something
        link = links[-1]
        link.stop = min(page.stop, size)
        is_cut = page.stop > size
        link.n_lost += not page.is_whole and not is_cut
        if page.type & FIRST_PAGE:
            link.streams[page.serial] = begin_stream(page)
        else:
            link.in_front = False
            add_page(link, page)
    if not links:
        return Contents()
    parts = [_part(link) for link in links]
    if len(parts) == 1 and parts[0].decoder == "libsndfile":
        parts = [Part(seconds=parts[0].seconds)]
    contents = Contents(parts, "ogg")
    open_ended = [i for i, link in enumerate(links) if not all(stream.is_ended for stream in sounds_of(link))]
    if is_cut or len(links) - 1 in open_ended:
        contents.warnings["truncated"] = "ends early: its last page is missing, which would be marked as the end"
    n_lost = sum(link.n_lost for link in links)
    if n_lost:
        contents.warnings["damaged"] = f"is damaged: {n_lost} of its pages {'is' if n_lost == 1 else 'are'} not whole"
    return contents


def _pages(descriptor: int, size: int) -> Iterator[OggPage]:
    """Yield every page; bytes that belong to none are passed over."""
    position, base, block = 0, 0, b""
    while position + PAGE_HEADER <= size:
        if position + _LARGEST_PAGE > base + len(block) < size or position < base:
            base, block = position, os.pread(descriptor, min(_BLOCK, size - position), position)
        at = position - base
        if block[at : at + 4] != b"OggS":
            found = block.find(b"OggS", at)
            if found < 0:
                position = max(base + len(block) - 3, position + 1)
                if len(block) < _BLOCK:
                    return
            else:
                position = base + found
            continue
        n_segments = block[at + 26]
        lacing = block[at + PAGE_HEADER : at + PAGE_HEADER + n_segments]
        n_body = PAGE_HEADER + n_segments + sum(lacing)
        data = block[at : at + n_body]
        is_whole = len(data) == n_body and checksum(data) == int.from_bytes(data[22:26], "little")
        if not is_whole and len(data) == n_body and block.find(b"OggS", at + 4, at + n_body) >= 0:
            n_body = block.find(b"OggS", at + 4, at + n_body) - at  # bytes are missing
        yield OggPage(
            position,
            position + n_body,
            data[5],
            int.from_bytes(data[6:14], "little", signed=True),
            int.from_bytes(data[14:18], "little"),
            int.from_bytes(data[18:22], "little"),
            data[PAGE_HEADER + n_segments : PAGE_HEADER + n_segments + 64],
            is_whole,
        )
        position += n_body


def checksum(page: bytes) -> int:
    """CRC-32 with the generator 0x04c11db7, as pages carry it."""
    mirrored = (page[:22] + b"\0\0\0\0" + page[26:]).translate(_REVERSED)
    value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(value.to_bytes(4, "little").translate(_REVERSED), "big")


def begin_stream(page: OggPage) -> OggStream:
    """Read what a stream is from its first page."""
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


def add_page(link: OggLink, page: OggPage) -> None:
    """Note a page that begins no stream in that of its stream."""
    stream = link.streams.get(page.serial)
    if stream is None:
        return
    if page.number > stream.number + 1 and page.is_whole:
        link.n_lost += page.number - stream.number - 1
    stream.number = page.number
    if page.place > 0:
        stream.place = page.place
    stream.is_ended |= bool(page.type & _LAST)


def sounds_of(link: OggLink) -> list[OggStream]:
    """Return the streams that hold sound."""
    return [stream for stream in link.streams.values() if stream.name]


def _part(link: OggLink) -> Part:
    sounds = sounds_of(link)
    if len(link.streams) != 1 or not sounds or sounds[0].name == "speex":
        return Part(link.start, link.stop, decoder="ffmpeg", container="ogg")
    (stream,) = sounds
    seconds = max(stream.place - stream.n_skipped, 0) / stream.rate if stream.rate else None
    return Part(link.start, link.stop, container="ogg", seconds=seconds)
