"""Folders of sounds: which files below a folder are sounds, and which of them hold the same bytes.

Nothing is decoded. A file is known by its path relative to the folder, with "/" between its parts; names that are no
UTF-8 on disk are written as Windows-1252 reads them, and found again by that name (`audio.file_names`).
"""

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from audio.file_names import as_text, is_text, locate
from audio.io import AUDIO_EXTENSIONS, FOREIGN_EXTENSIONS
from audio.manifest import name_fault
from common.errors import UserError, some

_SAMPLE_BYTES = 4096  # read at the start, the middle and the end of a file before all of it is
_READERS = 8  # threads: on a network disk a file's latency is what takes time
_FILES_IN_FLIGHT = 8192


@dataclass
class SoundFolder:
    """The sounds below a folder.

    Attributes:
        root: the folder as given, without a "/" at its end.
        names: of the N sounds, relative to `root`, sorted.
        sizes: of each in bytes, int64 (N,); none is 0.
        not_sounds: extension → number of files that are no sounds.
        foreign: extension → number of sounds in formats that `audio.io` knows and cannot decode.
        empty: names of sounds of 0 bytes.
        unlistable: names that a list cannot hold: with a line break, or no UTF-8 and read as another name.
        not_utf8: names in `names` that are no UTF-8 on disk.
        broken_links: names of links that lead nowhere.
        repeated_links: names of links to folders that were searched under another name.
    """

    root: str
    names: list[str] = field(default_factory=list)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    not_sounds: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    unlistable: list[str] = field(default_factory=list)
    not_utf8: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    repeated_links: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        """Return the path of a sound as `find ROOT` prints it."""
        return join_path(self.root, name)

    def path_on_disk(self, name: str) -> str:
        """Return the path under which a sound can be opened, which differs where its name is no UTF-8."""
        path = self.path(name)
        return path if name.isascii() or not self.not_utf8 else str(locate(path) or path)


def join_path(root: str, name: str) -> str:
    """Return `name` below `root`, with one "/" between them."""
    return f"{root.rstrip('/')}/{name}"


def find_sounds(folder: str) -> SoundFolder:
    """List the sounds below a folder.

    Hidden files and folders (".name") are left out. Links to folders are followed after all else, in the order of their
    names; a folder that several names lead to is listed once, so a loop of links ends.

    Args:
        folder: absolute, or relative to the working directory.

    Raises:
        UserError: it does not exist, is no folder, may not be read, or holds no sound that can be decoded.
    """
    if not os.path.isdir(folder):
        what = "is a file; wanted a folder of sounds" if os.path.exists(folder) else "there is no such folder"
        raise UserError(f"{folder}: {what}")
    if name_fault(folder) or not is_text(folder):
        raise UserError(
            f"{folder!r}: a list cannot hold this name (not valid UTF-8, or a line break); rename the folder"
        )
    found = SoundFolder(folder.rstrip("/") or "/")
    sizes: dict[str, int] = {}
    sizes_not_utf8: dict[str, int] = {}
    with tqdm(desc="searching", unit=" files", delay=2, disable=None) as progress:
        for name, entry in _files_below(found):
            progress.update()
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in FOREIGN_EXTENSIONS:
                found.foreign[extension] += 1
            elif extension not in AUDIO_EXTENSIONS:
                found.not_sounds[extension] += 1
            elif name_fault(name):
                found.unlistable.append(as_text(name))
            elif size := entry.stat().st_size:
                (sizes if is_text(name) else sizes_not_utf8)[as_text(name)] = size
            else:
                found.empty.append(as_text(name))
    for name, size in sizes_not_utf8.items():
        if name in sizes:
            found.unlistable.append(name)
        else:
            sizes[name] = size
            found.not_utf8.append(name)
    for names in (found.empty, found.unlistable, found.not_utf8, found.broken_links, found.repeated_links):
        names.sort()
    found.names = sorted(sizes)
    found.sizes = np.array([sizes[name] for name in found.names], dtype=np.int64)
    if not sizes:
        raise UserError(_no_sounds(found))
    return found


def _files_below(found: SoundFolder) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield relative name and entry of each file that is not hidden; links that cannot be followed are noted."""
    folders, links, searched = [""], list[str](), set[tuple[int, int]]()
    while folders or links:
        # Links wait until no real folder is left, so that a folder in the tree keeps its own name.
        is_link = not folders
        folder = heapq.heappop(links) if is_link else folders.pop()
        path = join_path(found.root, folder) if folder else found.root
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in searched:
                if is_link:
                    found.repeated_links.append(folder)
                continue
            searched.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                listed = list(entries)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be searched ({error.strerror}); change its permissions, or move it"
            ) from None
        for entry in listed:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind(entry)
            if kind == "folder":
                if entry.is_symlink():
                    heapq.heappush(links, name)
                else:
                    folders.append(name)
            elif kind == "file":
                yield name, entry
            elif kind == "broken":
                found.broken_links.append(name)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return what an entry is, links followed: "folder", "file", "broken" (a link that ends nowhere) or "other"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken" if entry.is_symlink() else "other"
    except OSError:  # a link to itself
        return "broken"


def _no_sounds(found: SoundFolder) -> str:
    if found.foreign:
        return (
            f"{found.root}: all its sounds are in formats that cannot be decoded "
            f"({format_extensions(found.foreign)}); convert them to .flac or .wav first"
        )
    inside = [
        f"{n} {what}"
        for n, what in (
            (found.not_sounds.total(), f"files that are no sounds ({format_extensions(found.not_sounds)})"),
            (len(found.empty), "empty files"),
            (len(found.unlistable), "files with names that no list can hold"),
            (len(found.broken_links), "broken links"),
        )
        if n
    ]
    known = " ".join(sorted(AUDIO_EXTENSIONS))
    return f"{found.root}: the folder holds no sound; found {', '.join(inside) or 'nothing'}; wanted one of {known}"


def format_extensions(counts: Counter[str], limit: int = 8) -> str:
    """Return ".txt 12, .csv 1, without extension 1", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return some((f"{extension or 'without extension'} {n}" for extension, n in ordered), limit)


def find_identical(sounds: SoundFolder, rows: Iterable[int] | None = None) -> list[list[int]]:
    """Find sounds with the same bytes.

    Only files of equal size are read; of those a few kilobytes first, and all of it only where these are equal, too.
    A file that cannot be read equals no other.

    Args:
        sounds: the folder.
        rows: positions of the sounds to compare; all by default.

    Returns:
        Positions in `sounds.names`, ascending, of each set of two or more; sets in the order of their first.
    """
    positions = range(len(sounds.names)) if rows is None else rows
    sets = _refine([sorted(positions)], lambda i: int(sounds.sizes[i]))
    sets = _refine_by_content(sets, sounds, _hash_samples, "comparing sounds of equal size")
    whole = [same for same in sets if sounds.sizes[same[0]] <= 3 * _SAMPLE_BYTES]
    partly = [same for same in sets if sounds.sizes[same[0]] > 3 * _SAMPLE_BYTES]
    return sorted(whole + _refine_by_content(partly, sounds, _hash_all, "comparing sounds that seem equal"))


def _refine(sets: Iterable[list[int]], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Split sets by a key of their members; members that are alone with theirs are dropped."""
    refined: dict[tuple[int, Hashable], list[int]] = {}
    for number, members in enumerate(sets):
        for i in members:
            refined.setdefault((number, key(i)), []).append(i)
    return [members for members in refined.values() if len(members) > 1]


def _refine_by_content(
    sets: list[list[int]], sounds: SoundFolder, read_hash: Callable[[str, int], bytes | None], what: str
) -> list[list[int]]:
    members = [i for same in sets for i in same]
    hashes: dict[int, bytes | None] = {}
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=len(members), desc=what, unit=" files", delay=2, disable=None) as progress,
    ):
        for start in range(0, len(members), _FILES_IN_FLIGHT):
            part = members[start : start + _FILES_IN_FLIGHT]
            paths = [sounds.path_on_disk(sounds.names[i]) for i in part]
            hashes.update(zip(part, pool.map(read_hash, paths, [int(sounds.sizes[i]) for i in part]), strict=True))
            progress.update(len(part))
    return _refine(sets, lambda i: i if hashes[i] is None else hashes[i])


def _hash_samples(path: str, size: int) -> bytes | None:
    """Hash the start, the middle and the end of a file, which is all of it where it is short."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            if size <= 3 * _SAMPLE_BYTES:
                digest.update(file.read())
                return digest.digest()
            for start in (0, (size - _SAMPLE_BYTES) // 2, size - _SAMPLE_BYTES):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return None
    return digest.digest()


def _hash_all(path: str, size: int) -> bytes | None:
    try:
        with open(Path(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
