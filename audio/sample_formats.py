"""The formats of samples in the headers of WAV, Wave64, AIFF and CAF, and contradictions within them."""

import math
import struct

from audio.parts import RawFormat

_EXTENSIBLE = 0xFFFE  # the format tag is then in the first two bytes of the sub-format
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
_WHOLE_FORMATS = {1, 3, 6, 7}  # tags of uncompressed samples, whose header has every fact twice


def wav_format(body: bytes, order: str = "<") -> RawFormat | None:
    """Read the format chunk of a WAV or Wave64; None for compressed samples."""
    if len(body) < 16:
        return None
    tag, channels, rate, _, block, _ = struct.unpack(f"{order}HHIIHH", body[:16])
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack(f"{order}H", body[24:26])
    if not channels or not rate or block % channels:
        return None
    subtype = _WAV_SUBTYPES.get((tag, block // channels))
    return (subtype and RawFormat(rate, channels, subtype, "LITTLE" if order == "<" else "BIG", block)) or None


def rifx_format(body: bytes) -> RawFormat | None:
    """Read the format chunk of a big-endian WAV."""
    return wav_format(body, ">")


def aiff_format(body: bytes) -> RawFormat | None:
    """Read the chunk COMM of an AIFF or AIFC; None for compressed samples."""
    if len(body) < 18:
        return None
    channels, _, bits, exponent, mantissa = struct.unpack(">hIhHQ", body[:18])
    rate = round(math.ldexp(mantissa, min((exponent & 0x7FFF) - 16383 - 63, 64)))  # not infinite
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


def caf_format(body: bytes) -> RawFormat | None:
    """Read the chunk desc of a CAF; None for compressed samples."""
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


def is_consistent(body: bytes, order: str = "<") -> bool:
    """Return whether the format chunk of a WAV agrees with itself, or describes compressed samples."""
    tag, channels, rate, byte_rate, block, bits = struct.unpack(f"{order}HHIIHH", body[:16])
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack(f"{order}H", body[24:26])
    return tag not in _WHOLE_FORMATS or (block == channels * ((bits + 7) // 8) and byte_rate == rate * block)


def describe_contradiction(kind: str, body: bytes, n_bytes: int) -> str | None:
    """Return a sentence on a header whose numbers cannot all be right; None where they may be.

    Args:
        kind: of the layout of chunks.
        body: content of the chunk that describes the samples.
        n_bytes: of samples, by the header.
    """
    if kind in ("wav", "rifx", "w64") and len(body) >= 16:
        order = ">" if kind == "rifx" else "<"
        if is_consistent(body, order):
            return None
        _, channels, rate, byte_rate, block, bits = struct.unpack(f"{order}HHIIHH", body[:16])
        return (
            f"has a header that contradicts itself: {rate} Hz, {channels} channels and {bits} bits do not make "
            f"{byte_rate} bytes a second in blocks of {block}, so that its pitch may be wrong"
        )
    raw = aiff_format(body) if kind == "aiff" else None
    if raw is None or not raw.subtype.startswith("PCM") or n_bytes <= 0:
        return None
    (n_frames,) = struct.unpack(">I", body[2:6])
    if n_frames * raw.frame_bytes == n_bytes or not n_frames:
        return None
    width = raw.frame_bytes
    return f"has a header that contradicts itself: {n_frames} samples of {width} bytes do not make {n_bytes} bytes"
