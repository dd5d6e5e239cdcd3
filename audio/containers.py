"""Inspect the bytes of a sound file: its parts, which are decoded one after the other, and warnings on them.

Decoders trust lengths in headers, and stop at the end of the first stream. Here lengths are compared with the bytes of
the file, and consecutive streams are found. Only headers are read.
"""

import os
from collections.abc import Callable
from pathlib import Path

from audio.chunks import find_samples
from audio.flac import find_flac
from audio.mpeg import find_mpeg
from audio.ogg import find_links
from audio.parts import Contents, Part

_HEAD_BYTES = 4096
_FINDERS: dict[bytes, Callable[[int, int, bytes], Contents]] = {
    **dict.fromkeys((b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b"caff", b".snd"), find_samples),
    b"fLaC": find_flac,
    b"OggS": find_links,
}
_FFMPEG_ALONE = (b"\x1aE\xdf\xa3", b"0&\xb2u")  # Matroska and WebM, WMA


def inspect(descriptor: int, size: int, path: str | Path = "") -> Contents:
    """Find the contents of a file.

    Args:
        descriptor: of the open file; its position is neither used nor changed.
        size: of the file, in bytes.
        path: its name, since MP3s may begin with any bytes.
    """
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    find = _FINDERS.get(head[:4])
    if find is not None:
        return find(descriptor, size, head)
    if head[:4] in _FFMPEG_ALONE or head[4:8] == b"ftyp":
        return Contents([Part(0, size, decoder="ffmpeg")], "mp4" if head[4:8] == b"ftyp" else "")
    is_mpeg = head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    if is_mpeg or Path(path).suffix.lower() in (".mp3", ".mp2", ".mpga"):
        return find_mpeg(descriptor, size, head)
    return Contents()
