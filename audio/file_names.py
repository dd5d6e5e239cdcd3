"""Names of files in lists: always valid text, also where the bytes on disk are not, or have another Unicode form.

On Linux a file's name is bytes. Names that are no UTF-8 (archives packed on Windows, old disks) are written in lists as
their Windows-1252 characters (Latin-1 for bytes without one), folder by folder, so that every list, HDF5 file, table
and JSON file can contain them; `locate` finds the file under the original bytes. macOS stores "é" as two characters
(NFD), most other programs write one (NFC): `locate` finds either by the other.
"""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_LEGACY = ("cp1252", "latin-1")  # the latter has a character for each of the 256 bytes


def decode_name(raw: bytes) -> str:
    """Decode bytes as UTF-8, or as Windows-1252 for each part between "/" that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "/".join(map(_decode_part, raw.split(b"/")))


def _decode_part(raw: bytes) -> str:
    for encoding in ("utf-8", *_LEGACY[:-1]):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode(_LEGACY[-1])


def as_text(name: str) -> str:
    """Convert a name of the operating system to its form in lists: bytes that are not UTF-8 as Windows-1252."""
    return name if is_text(name) else decode_name(os.fsencode(name))


def is_text(name: str) -> bool:
    """Return whether a name of the operating system is valid text."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def locate(path: str | Path) -> Path | None:
    """Return the path on disk of a file of a list; None where there is none under any spelling.

    Args:
        path: as listed. Searched as it is; then part by part as it is, composed (NFC), decomposed (NFD), and as the
            bytes of Windows-1252 and Latin-1.
    """
    path = Path(path)
    if os.path.exists(path):  # not Path.exists, which raises for names that are too long
        return path
    if str(path).isascii():
        return None  # there is no other spelling
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        step = next((found / form for form in _spellings(part) if os.path.exists(found / form)), None)
        if step is None:
            return None
        found = step
    return found


def _spellings(part: str) -> Iterator[str]:
    yield part
    if part.isascii():
        return
    composed = unicodedata.normalize("NFC", part)
    yield composed
    yield unicodedata.normalize("NFD", part)
    for encoding in _LEGACY:
        for text in (part, composed):
            try:
                yield os.fsdecode(text.encode(encoding))
            except UnicodeEncodeError:
                continue
