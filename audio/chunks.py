"""Chunked files (WAV, RF64, W64, AIFF, CAF) and AU: the length of the samples by the header and by the file.

Programs that write to a pipe, were killed, or exceed 4 GB leave a wrong length in the header, which decoders trust.
Formats: Microsoft's RIFF WAVE, EBU Tech 3306 (RF64), Sony's Wave64, Apple's AIFF and Core Audio
Format, Sun's AU.
"""

import errno
import os
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from audio.byte_stream import ByteStream
from audio.parts import PLAIN_WAV, Contents, Part, RawFormat, Slice, describe_cut
from audio.sample_formats import (
    AU_SUBTYPES,
    aiff_format,
    caf_format,
    describe_contradiction,
    is_consistent,
    rifx_format,
    wav_format,
)

# Lengths that programs write into a header when they write to a pipe.
UNKNOWN_LENGTHS = {0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF}
NEARLY_UNKNOWN = 0x7FFE0000  # some subtract the length of the header, or round it to blocks
# Chunks that may follow the samples, also with a wrong length.
TRAILING_CHUNKS = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"smpl", b"fact", b"PEAK", b"iXML", b"_PMX", b"JUNK"}
TRAILING_CHUNKS |= {b"junk", b"inst", b"afsp", b"cart", b"axml", b"plst", b"levl", b"umid", b"DISP", b"labl", b"note"}
TRAILING_CHUNKS |= {b"PAD ", b"FLLR", b"Fake", b"acid", b"strc", b"minf", b"elm1", b"regn", b"SAUR", b"chna", b"LGWV"}
TRAILING_CHUNKS |= {b"NAME", b"AUTH", b"ANNO", b"(c) ", b"COMT", b"MARK", b"INST", b"APPL", b"MIDI", b"AESD", b"SAXL"}
_MAX_TRAILER = 1 << 20  # bytes at the end in which chunks behind samples of unknown length are searched
_MAX_CHUNK = 1 << 16  # bytes kept of a header
_MAX_CHUNKS = 1000
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class ChunkLayout:
    """The layout of chunks in a kind of file.

    Attributes:
        kind: of the file.
        first: byte at which the first chunk begins.
        header: bytes of a chunk's header.
        parse: header → name of the chunk, and bytes of its content.
        align: chunks begin at multiples of this number of bytes.
        format_name: of the chunk with the format of the samples.
        data_name: of the chunk with the samples.
        skip: bytes of its content in front of the samples.
        read_format: content of the format chunk → format.
    """

    kind: str
    first: int
    header: int
    parse: Callable[[bytes], tuple[bytes, int]]
    align: int
    format_name: bytes
    data_name: bytes
    skip: int
    read_format: Callable[[bytes], RawFormat | None]


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        raw: format of the samples; None where they are compressed, or the header is incomplete.
        description: content of the chunk that describes them, if there is one.
        n_bytes: announced bytes of samples; 0 or less, or one of `UNKNOWN_LENGTHS`, where they are unknown.
        data: bytes of the header, without large chunks.
        layout: of the chunks behind the samples; None where there are none.
    """

    raw: RawFormat | None
    n_bytes: int
    data: bytes
    layout: ChunkLayout | None
    description: bytes = b""


def has_header(head: bytes) -> bool:
    """Return whether the first twelve bytes of a file or stream are those of a supported format."""
    return head[:4] == b".snd" or _choose_layout(head) is not None


def _choose_layout(head: bytes) -> ChunkLayout | None:
    """Return the layout of a file by its first twelve bytes; None for other formats (AVI, for example)."""
    if head[8:12] == b"WAVE" and head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX"):
        return RIFX_LAYOUT if head[:4] == b"RIFX" else WAV_LAYOUT
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return AIFF_LAYOUT
    return {b"riff": W64_LAYOUT, b"caff": CAF_LAYOUT}.get(head[:4])


def read_header(stream: ByteStream) -> Header | None:
    """Read a header up to the first sample; None where the stream ends within it."""
    layout = _choose_layout(stream.peek(12))
    if layout is None:
        return _read_au_header(stream)
    start, size64 = stream.position, 0
    kept = bytearray(stream.read(layout.first))
    raw: RawFormat | None = None
    description = b""
    for _ in range(_MAX_CHUNKS):
        head = stream.read(layout.header)
        if len(head) < layout.header:
            return None
        name, n_bytes = layout.parse(head)
        if name == layout.data_name:
            kept += head + stream.read(layout.skip)
            n_bytes = size64 if n_bytes == 0xFFFFFFFF and size64 else n_bytes - layout.skip
            return Header(raw, n_bytes, bytes(kept), layout, description)
        if n_bytes < 0:
            return None
        padded = n_bytes + -(stream.position - start + n_bytes) % layout.align
        body = stream.read(min(padded, _MAX_CHUNK))
        stream.skip(padded - len(body))
        if len(body) == padded:
            kept += head + body
        if name == layout.format_name:
            description = body[:n_bytes]
            raw = layout.read_format(description)
        elif name == b"ds64" and len(body) >= 16:
            (size64,) = struct.unpack("<Q", body[8:16])
    return None


def _read_au_header(stream: ByteStream) -> Header | None:
    data = stream.read(24)
    if len(data) < 24:
        return None
    start, n_bytes, encoding, rate, channels = struct.unpack(">5I", data[4:24])
    data += stream.read(min(max(start - 24, 0), _MAX_CHUNK))
    subtype, width = AU_SUBTYPES.get(encoding, ("", 0))
    raw = None
    if subtype and rate and 0 < channels < 1024 and len(data) == start:
        raw = RawFormat(rate, channels, subtype, "BIG", width * channels)
    return Header(raw, n_bytes, data, None)


def find_samples(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of a chunked file or an AU, by their announced length and by that of the file."""
    if head[36:40] == b"data" and head[8:16] == b"WAVEfmt " and head[:4] == b"RIFF":  # shortcut for most files
        n_bytes = int.from_bytes(head[40:44], "little")
        if n_bytes and 0 <= size - 44 - n_bytes <= n_bytes % 2 and is_consistent(head[20:36]):
            return PLAIN_WAV
    if not has_header(head[:12]):
        return Contents()
    stream = ByteStream(Slice(descriptor, 0, size))
    header = read_header(stream)
    start = stream.position
    if header is None:
        return Contents()  # left to the decoders
    if start >= size:
        return PLAIN_WAV
    contents = _find_parts(descriptor, size, start, header)
    if "truncated" not in contents.warnings and "repaired" not in contents.warnings:
        text = check_header(header)
        if text:
            contents = Contents(contents.parts, contents.kind, contents.warnings | {"inconsistent": text})
    return contents


def check_header(header: Header) -> str | None:
    """Return a sentence on numbers in a header that contradict each other; None where they do not."""
    if header.layout is None:
        return None
    n_skipped = int.from_bytes(header.data[-8:-4], "big") if header.layout is AIFF_LAYOUT else 0  # of SSND
    return describe_contradiction(header.layout.kind, header.description, header.n_bytes - n_skipped)


def _find_parts(descriptor: int, size: int, start: int, header: Header) -> Contents:
    """Find the samples of a file by its header."""
    raw, n_bytes, layout = header.raw, header.n_bytes, header.layout
    if layout is None:  # the samples end with the file
        return PLAIN_WAV if raw is None else _choose_length(start, size - start, header)
    more, is_end = _find_behind(descriptor, size, start, n_bytes, layout)
    if n_bytes > 0 and is_end:
        if not more:
            return PLAIN_WAV
        frame = raw.frame_bytes if raw else 1
        parts = [_create_part(start, start + n_bytes // frame * frame, header)]
        for first, stop in more:  # a second chunk of samples, or a second file
            is_file = os.pread(descriptor, 4, first) in FILE_MARKS
            parts.append(Part(first, stop) if is_file else _create_part(first, stop, header))
        return Contents(parts, "wav")
    return _choose_length(start, _length_without_trailing(descriptor, size, start, layout), header)


FILE_MARKS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff", b"caff")


def _choose_length(start: int, held: int, header: Header) -> Contents:
    """Return the samples to decode where their announced length may not be that of the file.

    Args:
        start: first byte of the samples.
        held: bytes of samples in the file.
        header: of the file.
    """
    raw, announced = header.raw, header.n_bytes
    is_unknown = announced <= 0 or announced in UNKNOWN_LENGTHS or (announced >= NEARLY_UNKNOWN and announced > held)
    frame = raw.frame_bytes if raw else 1
    if 0 <= announced - held < frame and announced > 0:
        return PLAIN_WAV
    part = _create_part(start, start + held // frame * frame, header)
    seconds: tuple[float, float] | None = None
    if raw is not None:
        seconds = held // frame / raw.sample_rate, announced // frame / raw.sample_rate
    elif not part.head or (is_unknown and announced > 0):
        return PLAIN_WAV
    if is_unknown:
        return Contents([part], "wav")
    if announced > held:
        return Contents([part], "wav", warnings={"truncated": describe_cut(*seconds or ())})
    holds, lengths = ("", "") if seconds is None else (f" ({n:.2f} s)" for n in seconds)
    sentence = f"announces less sound in its header{lengths} than it has{holds}; all of it was read"
    return Contents([part], "wav", warnings={"repaired": sentence})


def _create_part(start: int, stop: int, header: Header) -> Part:
    """Return a part of samples: raw, or with a repaired header where their format is unknown."""
    if header.raw is not None:
        return Part(start, stop, header.raw)
    return Part(0, stop, head=_patch_header(header, start, stop - start))


def _find_behind(
    descriptor: int, size: int, start: int, n_bytes: int, layout: ChunkLayout
) -> tuple[list[tuple[int, int]], bool]:
    """Read what follows the announced end of the samples.

    Returns:
        Further samples or whole files there, first byte and end; and whether everything there was recognised, so that
        the announced end is the true one.
    """
    stop = start + n_bytes
    if stop >= size:
        return [], stop == size
    if n_bytes <= 0:
        return [], False
    for end in dict.fromkeys((stop + -stop % layout.align, stop)):  # some programs omit the padding
        more: list[tuple[int, int]] = []
        position, is_recognised = end, size - end < layout.header
        for name, body, n_body in _walk_chunks(descriptor, layout, end):
            if name in FILE_MARKS:
                more.append((body - layout.header, size))
                position = size
                break
            if not is_chunk_name(name) or (body + n_body > size + layout.align and name not in TRAILING_CHUNKS):
                break
            if name == layout.data_name and n_body > layout.skip:
                more.append((body + layout.skip, min(body + n_body, size)))
            position = body + n_body
        if is_recognised or size - position < layout.header:
            return more, True
    return [], _is_padding(descriptor, stop, size)


def is_chunk_name(name: bytes) -> bool:
    """Return whether four bytes may be the name of a chunk."""
    return len(name) == 4 and all(0x20 <= letter < 0x7F for letter in name)


def _is_padding(descriptor: int, start: int, stop: int) -> bool:
    """Whether bytes are an ID3v1 or APE tag, or all zero: space that a recorder has reserved."""
    first = os.pread(descriptor, 8, start)
    if (first[:3] == b"TAG" and stop - start == 128) or first == b"APETAGEX":
        return True
    while start < stop:
        try:  # skip holes of a sparse file
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return True
        block = os.pread(descriptor, max(min(len(_ZEROS), stop - start), 0), start)
        if block != _ZEROS[: len(block)]:
            return False
        if not block:
            return True
        start += len(block)
    return True


def _length_without_trailing(descriptor: int, size: int, start: int, layout: ChunkLayout) -> int:
    """Return the bytes of samples where only other chunks may follow them."""
    first = max(start, size - _MAX_TRAILER)
    tail = os.pread(descriptor, size - first, first)
    best = size
    for name in TRAILING_CHUNKS:
        at = tail.find(name)
        while at >= 0:
            position = first + at
            behind = ByteStream(Slice(descriptor, position, size))
            is_aligned = position % 2 == 0 or layout.align == 1
            if position < best and is_aligned and count_rest(behind, layout, names=TRAILING_CHUNKS) == 0:
                best = position
            at = tail.find(name, at + 1)
    if best == size and size - start > 128 and tail[-128:-125] == b"TAG":
        best = size - 128
    return best - start


def count_rest(
    stream: ByteStream, layout: ChunkLayout, position: int = 0, names: Collection[bytes] | None = None
) -> int | None:
    """Look ahead to the end of a stream that ends with chunks.

    Args:
        stream: is not consumed.
        layout: of the chunks.
        position: bytes ahead at which the first one begins.
        names: allowed names; None: any.

    Returns:
        Bytes behind the last chunk, too few for another one; None where the stream does not end with chunks.
    """
    while position < _MAX_TRAILER:
        head = stream.peek(position + layout.header)[position:]
        if len(head) < layout.header:
            return len(head)
        name, n_bytes = layout.parse(head)
        if not (is_chunk_name(name) if names is None else name in names) or not 0 <= n_bytes < _MAX_TRAILER:
            return None
        end = position + layout.header + n_bytes
        if len(stream.peek(end)) < end:
            return None
        position = end + -n_bytes % layout.align
    return None


def _walk_chunks(descriptor: int, layout: ChunkLayout, position: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and length of each chunk."""
    for _ in range(_MAX_CHUNKS):
        raw = os.pread(descriptor, layout.header, position)
        if len(raw) < layout.header:
            return
        name, n_bytes = layout.parse(raw)
        yield name, position + layout.header, n_bytes
        if n_bytes < 0:
            return
        position += layout.header + n_bytes
        position += -position % layout.align


def _patch_header(header: Header, start: int, n_bytes: int) -> bytes:
    """Return a header with the true length of the samples; empty where it cannot be represented."""
    layout, head = header.layout, header.data
    order = {"wav": "<", "rifx": ">", "aiff": ">"}.get(layout.kind if layout else "")
    if layout is None or order is None or n_bytes + layout.skip >= 1 << 32:
        return b""
    if len(head) < start or head[:4] in (b"RF64", b"BW64"):
        return b""
    patched = bytearray(head)
    struct.pack_into(f"{order}I", patched, 4, min(start + n_bytes - 8, 0xFFFFFFFF))
    struct.pack_into(f"{order}I", patched, start - layout.skip - 4, n_bytes + layout.skip)
    return bytes(patched)


def _parse_riff(data: bytes) -> tuple[bytes, int]:
    return data[:4], int.from_bytes(data[4:8], "little")


def _parse_iff(data: bytes) -> tuple[bytes, int]:
    return data[:4], int.from_bytes(data[4:8], "big")


def _parse_w64(data: bytes) -> tuple[bytes, int]:
    return data[:4], int.from_bytes(data[16:24], "little") - 24


def _parse_caf(data: bytes) -> tuple[bytes, int]:
    return data[:4], int.from_bytes(data[4:12], "big", signed=True)


WAV_LAYOUT = ChunkLayout("wav", 12, 8, _parse_riff, 2, b"fmt ", b"data", 0, wav_format)
RIFX_LAYOUT = ChunkLayout("rifx", 12, 8, _parse_iff, 2, b"fmt ", b"data", 0, rifx_format)
W64_LAYOUT = ChunkLayout("w64", 40, 24, _parse_w64, 8, b"fmt ", b"data", 0, wav_format)
AIFF_LAYOUT = ChunkLayout("aiff", 12, 8, _parse_iff, 2, b"COMM", b"SSND", 8, aiff_format)
CAF_LAYOUT = ChunkLayout("caf", 8, 12, _parse_caf, 1, b"desc", b"data", 4, caf_format)
