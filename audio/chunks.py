"""Chunked files (WAV, RF64, W64, AIFF, CAF) and AU: how long the samples are by the header, and by the file.

Programs that write to a pipe, were killed, or passed 4 GB leave a length in the header that is not that of the samples.
Decoders trust it. Formats: Microsoft's RIFF WAVE, EBU Tech 3306 (RF64), Sony's Wave64, Apple's AIFF and Core Audio
Format, Sun's AU.
"""

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from audio.parts import PLAIN_WAV, Contents, Part, RawFormat, describe_cut

# Lengths that a program writing to a pipe puts into a header because it cannot know better.
UNKNOWN_LENGTHS = {0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF}
NEARLY_UNKNOWN = 0x7FFE0000  # some take the length of the header off, or round it to blocks
_EXTENSIBLE = 0xFFFE  # the true format is then the first two bytes of the sub-format
_WAV_SUBTYPES = {
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
    (6, 1): "ALAW",
    (7, 1): "ULAW",
}
_BIG_SUBTYPES = {1: "PCM_S8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}
_AIFC_SUBTYPES = {b"fl32": "FLOAT", b"FL32": "FLOAT", b"fl64": "DOUBLE", b"FL64": "DOUBLE"}
_AIFC_SUBTYPES |= {b"ulaw": "ULAW", b"ULAW": "ULAW", b"alaw": "ALAW", b"ALAW": "ALAW"}
AU_SUBTYPES = {1: ("ULAW", 1), 2: ("PCM_S8", 1), 3: ("PCM_16", 2), 4: ("PCM_24", 3), 5: ("PCM_32", 4)}
AU_SUBTYPES |= {6: ("FLOAT", 4), 7: ("DOUBLE", 8), 27: ("ALAW", 1)}
# Chunks behind the samples, whatever length they announce.
TRAILING_CHUNKS = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"smpl", b"fact", b"PEAK", b"iXML", b"_PMX", b"JUNK"}
TRAILING_CHUNKS |= {b"junk", b"inst", b"afsp", b"cart", b"axml", b"plst", b"levl", b"umid", b"DISP", b"labl", b"note"}
TRAILING_CHUNKS |= {b"PAD ", b"FLLR", b"Fake", b"acid", b"strc", b"minf", b"elm1", b"regn", b"SAUR", b"chna", b"LGWV"}
TRAILING_CHUNKS |= {b"NAME", b"AUTH", b"ANNO", b"(c) ", b"COMT", b"MARK", b"INST", b"APPL", b"MIDI", b"AESD", b"SAXL"}
_TAIL_BYTES = 1 << 20  # of the end of a file of unknown length, in which chunks behind the samples are looked for
_LONGEST_HEADER = 1 << 16  # bytes kept of a header that is to be repaired
_MOST_CHUNKS = 1000
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class ChunkLayout:
    """How chunks lie in a kind of file.

    Attributes:
        kind: of the file.
        first: byte at which the first chunk begins.
        header: bytes in front of what a chunk holds.
        parse: of these: name of the chunk, and bytes that it holds.
        align: chunks begin at a multiple of so many bytes.
        format_name: of the chunk that says how samples lie.
        data_name: of the chunk with the samples.
        skip: bytes of it in front of the samples.
        read_format: of the former chunk.
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


def find_wav(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of a WAV, also a big-endian one (RIFX) or one of more than 4 GB (RF64, BW64)."""
    if head[36:40] == b"data" and head[8:16] == b"WAVEfmt " and head[:4] == b"RIFF":  # most files, in a few steps
        n_bytes = int.from_bytes(head[40:44], "little")
        if n_bytes and 0 <= size - 44 - n_bytes <= n_bytes % 2:
            return PLAIN_WAV
    if head[8:12] != b"WAVE":  # AVI, say
        return Contents()
    return _find(descriptor, size, head, RIFX_LAYOUT if head[:4] == b"RIFX" else WAV_LAYOUT)


def find_w64(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of a Wave64."""
    return _find(descriptor, size, head, W64_LAYOUT)


def find_aiff(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of an AIFF or AIFF-C."""
    return _find(descriptor, size, head, AIFF_LAYOUT) if head[8:12] in (b"AIFF", b"AIFC") else Contents()


def find_caf(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of a Core Audio file."""
    return _find(descriptor, size, head, CAF_LAYOUT)


def find_au(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the samples of an AU: they end with the file."""
    if len(head) < 24:
        return PLAIN_WAV
    start, n_bytes, encoding, rate, channels = struct.unpack(">5I", head[4:24])
    subtype, width = AU_SUBTYPES.get(encoding, ("", 0))
    if not subtype or not rate or not 0 < channels < 1024 or not 24 <= start < size:
        return PLAIN_WAV
    raw = RawFormat(rate, channels, subtype, "BIG", width * channels)
    return _compare(start, n_bytes, size - start, raw, b"")


def _find(descriptor: int, size: int, head: bytes, layout: ChunkLayout) -> Contents:
    """Walk to the samples, compare their length with the file's, and find what to decode."""
    raw: RawFormat | None = None
    size64 = 0
    for name, start, n_bytes in _walk(descriptor, size, head, layout, layout.first):
        if name == layout.format_name:
            raw = layout.read_format(_read(descriptor, head, start, min(n_bytes, 256)))
        elif name == b"ds64":
            size64 = struct.unpack("<Q", _read(descriptor, head, start + 8, 8).ljust(8, b"\0"))[0]
        elif name == layout.data_name:
            break
    else:
        return PLAIN_WAV
    start += layout.skip
    n_bytes = size64 if n_bytes == 0xFFFFFFFF and size64 else n_bytes - layout.skip
    held = size - start
    if held <= 0:
        return PLAIN_WAV
    more, behind = _find_behind(descriptor, size, start, n_bytes, layout)
    if n_bytes > 0 and behind:
        if not more:
            return PLAIN_WAV
        frame = raw.frame_bytes if raw else 1
        parts = [_samples(descriptor, head, start, start + n_bytes // frame * frame, raw, layout)]
        for first, stop in more:  # a second chunk of samples, or a second file
            whole = _read(descriptor, b"", first, 4) in FILE_MARKS
            parts.append(Part(first, stop) if whole else _samples(descriptor, head, first, stop, raw, layout))
        return Contents(parts, "wav")
    stop = start + _length_without_trailing(descriptor, size, start, layout)
    head_bytes = _read(descriptor, head, 0, min(start, _LONGEST_HEADER))
    return _compare(start, n_bytes, stop - start, raw, _patch(head_bytes, start, stop - start, layout))


FILE_MARKS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff", b"caff")


def _compare(start: int, announced: int, held: int, raw: RawFormat | None, head: bytes) -> Contents:
    """Return what to decode of samples whose announced length is not that of the file.

    Args:
        start: first byte of the samples.
        announced: bytes, by the header.
        held: bytes that there are.
        raw: how they lie, if that is simple.
        head: a repaired header.
    """
    is_unknown = announced <= 0 or announced in UNKNOWN_LENGTHS or (announced >= NEARLY_UNKNOWN and announced > held)
    frame = raw.frame_bytes if raw else 1
    if 0 <= announced - held < frame and announced > 0:
        return PLAIN_WAV
    if raw is None:
        if not head or (is_unknown and announced > 0):
            return PLAIN_WAV
        part = Part(0, start + held, head=head)
        seconds: tuple[float | None, float | None] = (None, None)
    else:
        stop = start + held // raw.frame_bytes * raw.frame_bytes
        part = Part(start, stop, raw)
        seconds = tuple(n // raw.frame_bytes / raw.sample_rate for n in (held, announced))  # type: ignore[assignment]
    if is_unknown:
        return Contents([part], "wav")
    if announced > held:
        return Contents([part], "wav", warnings={"truncated": describe_cut(*seconds)})
    lengths = "" if raw is None else f" ({seconds[1]:.2f} s)"
    holds = "" if raw is None else f" ({seconds[0]:.2f} s)"
    sentence = f"announces less sound in its header{lengths} than it holds{holds}; all was read"
    return Contents([part], "wav", warnings={"repaired": sentence})


def _samples(descriptor: int, head: bytes, start: int, stop: int, raw: RawFormat | None, layout: ChunkLayout) -> Part:
    """Return a part of samples without a header of their own."""
    if raw is not None:
        return Part(start, stop, raw)
    return Part(0, stop, head=_patch(_read(descriptor, head, 0, start), start, stop - start, layout))


def _find_behind(
    descriptor: int, size: int, start: int, n_bytes: int, layout: ChunkLayout
) -> tuple[list[tuple[int, int]], bool]:
    """Look behind the announced end of the samples.

    Returns:
        More samples or whole files that lie there, first byte and end; and whether what lies there is understood, so
        that the announced end is the true one.
    """
    stop = start + n_bytes
    if stop >= size:
        return [], stop == size
    if n_bytes <= 0:
        return [], False
    for end in dict.fromkeys((stop + -stop % layout.align, stop)):  # some leave the padding out
        more: list[tuple[int, int]] = []
        position, is_understood = end, size - end < layout.header
        for name, body, n_body in _walk(descriptor, size, b"", layout, end):
            if name in FILE_MARKS:
                more.append((body - layout.header, size))
                position = size
                break
            if not is_chunk_name(name) or (body + n_body > size + layout.align and name not in TRAILING_CHUNKS):
                break
            if name == layout.data_name and n_body > layout.skip:
                more.append((body + layout.skip, min(body + n_body, size)))
            position = body + n_body
        if is_understood or size - position < layout.header:
            return more, True
    return [], _is_padding(descriptor, stop, size)


def is_chunk_name(name: bytes) -> bool:
    """Whether four bytes may be the name of a chunk."""
    return len(name) == 4 and all(0x20 <= letter < 0x7F for letter in name)


def _is_padding(descriptor: int, start: int, stop: int) -> bool:
    """Whether bytes are an ID3v1 or APE tag, or all zero: space that a recorder has kept ready."""
    first = os.pread(descriptor, 8, start)
    if (first[:3] == b"TAG" and stop - start == 128) or first == b"APETAGEX":
        return True
    while start < stop:
        try:  # skip what the file system knows to be empty
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # up to the end
                return True
        block = os.pread(descriptor, max(min(len(_ZEROS), stop - start), 0), start)
        if block != _ZEROS[: len(block)]:
            return False
        if not block:
            return True
        start += len(block)
    return True


def _length_without_trailing(descriptor: int, size: int, start: int, layout: ChunkLayout) -> int:
    """Return how many bytes of samples there are if only chunks of something else may follow them."""
    first = max(start, size - _TAIL_BYTES)
    tail = os.pread(descriptor, size - first, first)
    best = size
    for name in TRAILING_CHUNKS:
        at = tail.find(name)
        while at >= 0:
            position = first + at
            if position < best and (position % 2 == 0 or layout.align == 1) and _ends_file(tail[at:], layout):
                best = position
            at = tail.find(name, at + 1)
    if best == size and size - start > 128 and tail[-128:-125] == b"TAG":
        best = size - 128
    return best - start


def _ends_file(tail: bytes, layout: ChunkLayout) -> bool:
    """Whether bytes are chunks with names that are known, the last of which ends where they end."""
    position = 0
    while position + layout.header <= len(tail):
        name, n_bytes = layout.parse(tail[position : position + layout.header])
        if name not in TRAILING_CHUNKS or n_bytes < 0:
            return False
        position += layout.header + n_bytes
        if position == len(tail):
            return True
        position += -position % layout.align
    return position == len(tail)


def _walk(
    descriptor: int, size: int, head: bytes, layout: ChunkLayout, position: int
) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and length of each chunk."""
    for _ in range(_MOST_CHUNKS):
        raw = _read(descriptor, head, position, layout.header)
        if len(raw) < layout.header:
            return
        name, n_bytes = layout.parse(raw)
        yield name, position + layout.header, n_bytes
        if n_bytes < 0:
            return
        position += layout.header + n_bytes
        position += -position % layout.align


def _read(descriptor: int, head: bytes, start: int, n_bytes: int) -> bytes:
    return head[start : start + n_bytes] if start + n_bytes <= len(head) else os.pread(descriptor, n_bytes, start)


def _patch(head: bytes, start: int, n_bytes: int, layout: ChunkLayout) -> bytes:
    """Return a header with the true length of the samples; empty where it cannot be written."""
    order = {"wav": "<", "rifx": ">", "aiff": ">"}.get(layout.kind)
    if order is None or n_bytes + layout.skip >= 1 << 32 or len(head) < start or head[:4] in (b"RF64", b"BW64"):
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


def _wav_format(body: bytes, order: str = "<") -> RawFormat | None:
    if len(body) < 16:
        return None
    tag, channels, rate, _, block, _ = struct.unpack(f"{order}HHIIHH", body[:16])
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack(f"{order}H", body[24:26])
    if not channels or not rate or block % channels:
        return None
    subtype = _WAV_SUBTYPES.get((tag, block // channels))
    return (subtype and RawFormat(rate, channels, subtype, "LITTLE" if order == "<" else "BIG", block)) or None


def _rifx_format(body: bytes) -> RawFormat | None:
    return _wav_format(body, ">")


def _aiff_format(body: bytes) -> RawFormat | None:
    if len(body) < 18:
        return None
    channels, _, bits, exponent, mantissa = struct.unpack(">hIhHQ", body[:18])
    rate = round(mantissa * 2.0 ** ((exponent & 0x7FFF) - 16383 - 63))
    compression = body[18:22] if len(body) >= 22 else b"NONE"
    width = (bits + 7) // 8
    if compression in _AIFC_SUBTYPES:
        subtype = _AIFC_SUBTYPES[compression]
        width = {"FLOAT": 4, "DOUBLE": 8}.get(subtype, 1)
    elif compression in (b"NONE", b"twos", b"sowt", b"in24", b"in32"):
        subtype = _BIG_SUBTYPES.get(width, "")
    else:
        subtype = ""
    if not subtype or channels < 1 or rate < 1:
        return None
    return RawFormat(rate, channels, subtype, "LITTLE" if compression == b"sowt" else "BIG", width * channels)


def _caf_format(body: bytes) -> RawFormat | None:
    if len(body) < 32:
        return None
    rate, name, flags, n_bytes, per_packet, channels, bits = struct.unpack(">d4sIIIII", body[:32])
    if (
        name != b"lpcm"
        or per_packet != 1
        or not channels
        or n_bytes != channels * ((bits + 7) // 8)
        or not 1 <= rate < 1e7
    ):
        return None
    width = n_bytes // channels
    subtype = {4: "FLOAT", 8: "DOUBLE"}.get(width) if flags & 1 else _BIG_SUBTYPES.get(width)
    return (subtype and RawFormat(round(rate), channels, subtype, "LITTLE" if flags & 2 else "BIG", n_bytes)) or None


WAV_LAYOUT = ChunkLayout("wav", 12, 8, _parse_riff, 2, b"fmt ", b"data", 0, _wav_format)
RIFX_LAYOUT = ChunkLayout("rifx", 12, 8, _parse_iff, 2, b"fmt ", b"data", 0, _rifx_format)
W64_LAYOUT = ChunkLayout("w64", 40, 24, _parse_w64, 8, b"fmt ", b"data", 0, _wav_format)
AIFF_LAYOUT = ChunkLayout("aiff", 12, 8, _parse_iff, 2, b"COMM", b"SSND", 8, _aiff_format)
CAF_LAYOUT = ChunkLayout("caf", 8, 12, _parse_caf, 1, b"desc", b"data", 4, _caf_format)
