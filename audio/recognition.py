"""Detect the format of a stream from its first bytes."""

from collections.abc import Callable
from typing import NamedTuple

from audio.mpeg import parse_frame

# Signatures that FFmpeg detects: offset and bytes.
_SIGNATURES = (
    *((0, name) for name in (b"RIFF", b"RF64", b"RIFX", b"FORM", b"FRM8", b".snd", b"\x1aE\xdf\xa3", b"0&\xb2u")),
    *((4, name) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"skip")),
    *((0, name) for name in (b"wvpk", b"MAC ", b"TTA1", b"tBaK", b"#!AMR", b".RMF", b"FLV\x01", b"DSD ", b"MPCK")),
    *((0, name) for name in (b"Creative Voice File", b"NIST_1A", b"ajkg", b"qoaf", b"\0\0\x01\xba", b"\x64\xa3")),
    *((0, name) for name in (b"\x7f\xfe\x80\x01", b"PVF1", b"2BIT", b".SoX", b"XoS.")),
)
# Formats without sound, which would be noise if they were taken for raw samples.
_FOREIGN_SIGNATURES = {
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff\xe0": "a picture",
    b"\xff\xd8\xff\xe1": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a document",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b\x08": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
}
N_GUESSED = 1 << 13  # bytes in which frames are searched
_MIN_FIRST, _MIN_LATER = 3, 4  # consecutive frames, at the beginning and behind an incomplete one
_MIN_TEXT = 24  # bytes
_AC3_BIT_RATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
_AC3_RATES = (48000, 44100, 32000)


def has_signature(head: bytes) -> bool:
    """Return whether the first 32 bytes of a stream have a signature that FFmpeg detects."""
    return any(head[at : at + len(name)] == name for at, name in _SIGNATURES)


def describe_foreign(head: bytes) -> str | None:
    """Describe a stream that has no sound by its first bytes; None for others."""
    for name, what in _FOREIGN_SIGNATURES.items():
        if head.startswith(name):
            return f"it is {what}"
    return "it is text" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """Whether bytes are text, also where the last character is incomplete."""
    if len(head) < _MIN_TEXT or len(set(head)) < _MIN_TEXT // 3:
        return False
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(head) - 3:
        return False
    return all(letter.isprintable() or letter in "\t\r\n\f\x1b\ufeff" for letter in text)


class _Found(NamedTuple):
    n_bytes: int
    kind: tuple[int, ...]  # equal in all frames of a stream


def guess_frames(head: bytes) -> str | None:
    """Detect a format that has no signature by the headers of its frames; random bytes are not detected as one.

    Args:
        head: the first `N_GUESSED` bytes of the stream, or all of it.

    Returns:
        FFmpeg's name: "mp3", "aac", "loas", "ac3", "eac3" or "mpegts"; None: none of these.
    """
    for name, (marks, measure) in _FRAMES.items():
        for mark in marks:
            at = head.find(mark)
            while at >= 0:
                if _has_chain(head, at, measure):
                    return name
                at = head.find(mark, at + 1)
    return None


def _has_chain(head: bytes, at: int, measure: Callable[[bytes], _Found | None]) -> bool:
    """Whether consecutive frames of one kind begin at a byte."""
    required = _MIN_FIRST if at == 0 else _MIN_LATER
    n_frames, kind = 0, None
    while at + 8 <= len(head):
        frame = measure(head[at : at + 8])
        if frame is None or (kind is not None and frame.kind != kind):
            return False
        kind = frame.kind
        n_frames += 1
        at += frame.n_bytes
        if n_frames == required:
            return True
    ends_with_a_frame = len(head) < N_GUESSED and at == len(head)  # a short file
    return n_frames >= 2 and (n_frames + 1 >= required or ends_with_a_frame)


def _measure_mpeg(head: bytes) -> _Found | None:
    frame = parse_frame(head[1], head[2]) if head[0] == 0xFF else None
    return frame and _Found(frame.n_bytes, (head[1] & 0xFE, head[2] & 0x0C))


def _measure_adts(head: bytes) -> _Found | None:
    n_bytes = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or (head[2] >> 2) & 15 > 12 or n_bytes < 7:
        return None
    return _Found(n_bytes, (head[1], head[2] & 0xFC))


def _measure_loas(head: bytes) -> _Found | None:
    n_bytes = ((head[1] & 0x1F) << 8 | head[2]) + 3
    return _Found(n_bytes, ()) if head[0] == 0x56 and head[1] & 0xE0 == 0xE0 and n_bytes > 8 else None


def _measure_ac3(head: bytes) -> _Found | None:
    rate, code = head[4] >> 6, head[4] & 0x3F
    if head[:2] != b"\x0bw" or head[5] >> 3 > 10 or rate == 3 or code >= 2 * len(_AC3_BIT_RATES):
        return None
    n_words = _AC3_BIT_RATES[code >> 1] * 96000 // _AC3_RATES[rate] + (code & 1 if rate == 1 else 0)
    return _Found(2 * n_words, (rate, head[5]))


def _measure_eac3(head: bytes) -> _Found | None:
    is_eac3 = head[:2] == b"\x0bw" and 10 < head[5] >> 3 <= 16
    return _Found((((head[2] & 7) << 8 | head[3]) + 1) * 2, (head[4] >> 6,)) if is_eac3 else None


def _measure_transport(head: bytes) -> _Found | None:
    return _Found(188, ()) if head[0] == 0x47 and not head[1] & 0x80 and head[3] & 0x30 else None


_FRAMES: dict[str, tuple[tuple[bytes, ...], Callable[[bytes], _Found | None]]] = {
    "mp3": ((b"\xff",), _measure_mpeg),
    "aac": ((b"\xff\xf0", b"\xff\xf1", b"\xff\xf8", b"\xff\xf9"), _measure_adts),
    "loas": ((b"\x56",), _measure_loas),
    "ac3": ((b"\x0bw",), _measure_ac3),
    "eac3": ((b"\x0bw",), _measure_eac3),
    "mpegts": ((b"\x47",), _measure_transport),
}
