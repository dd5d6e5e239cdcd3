"""FLAC files: their announced length, and what lies behind the first stream.

Format: RFC 9639.
"""

import os

from audio.parts import PLAIN_FLAC, Contents, Part

MARKER = b"fLaC\x00\x00\x00\x22"  # a stream begins, with its STREAMINFO
_BUFFER = 1 << 14  # bytes that a decoder may have read beyond the last frame
_BLOCK = 1 << 22


def find_flac(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the streams of a FLAC file whose length is not announced; else they are looked for once it is decoded."""
    if len(head) < 26 or head[4] & 0x7F:
        return Contents()
    if int.from_bytes(head[18:26], "big") & ((1 << 36) - 1):
        return PLAIN_FLAC
    return Contents(find_streams(descriptor, 0, size), "flac")


def find_rest(descriptor: int, position: int, size: int) -> list[Part]:
    """Find the streams behind the first one.

    Args:
        descriptor: of the file.
        position: up to which the decoder has read.
        size: of the file.
    """
    first = max(position - _BUFFER, len(MARKER))
    if first >= size:
        return []
    return [part for part in find_streams(descriptor, first, size) if part.start > first]


def find_streams(descriptor: int, first: int, size: int) -> list[Part]:
    """Find where streams begin from a byte on; what is in front of the first marker is one, too."""
    starts = [first]
    position = first
    while position < size:
        block = os.pread(descriptor, min(_BLOCK, size - position), position)
        at = block.find(MARKER)
        while at >= 0:
            if position + at > first:
                starts.append(position + at)
            at = block.find(MARKER, at + 1)
        if position + len(block) >= size or len(block) <= len(MARKER):
            break
        position += len(block) - len(MARKER) + 1
    stops = [*starts[1:], size]
    return [Part(*ends, decoder="ffmpeg", container="flac") for ends in zip(starts, stops, strict=True)]
