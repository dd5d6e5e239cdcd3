"""Folders of sounds: the sounds below a folder, and those of the same bytes.

Nothing is decoded. A file's name is its path relative to the folder, with "/" between its parts; names that are not
UTF-8 on disk are decoded as Windows-1252, and files are found by that name as well (`audio.file_names`).
"""

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from audio.file_names import as_text, is_text, locate
from audio.io import AUDIO_EXTENSIONS, FOREIGN_EXTENSIONS
from audio.manifest import name_fault
from common.errors import UserError, some

_SAMPLE_BYTES = 4096  # read at the start, the middle and the end of a file before the whole file is read
_READERS = 8  # threads; on a network disk, latency dominates
_FILES_IN_FLIGHT = 8192


@dataclass
class SoundFolder:
    """The sounds below a folder.

    Attributes:
        root: the folder as given, without a trailing "/".
        names: of the N sounds, relative to `root`, sorted.
        sizes: in bytes, int64 (N,); none is 0.
        not_sounds: extension → number of files that are no sounds.
        foreign: extension → number of sounds in formats that `audio.io` cannot decode.
        empty: names of sounds of 0 bytes.
        unlistable: names that a list cannot contain: with a line break, or not UTF-8 and decoded to an existing name.
        not_utf8: names in `names` that are not UTF-8 on disk.
        broken_links: names of links without a target.
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
        """Return the path to open a sound by, which differs from `path` if its name is not UTF-8."""
        path = self.path(name)
        return path if name.isascii() or not self.not_utf8 else str(locate(path) or path)

    def describe_skipped(self) -> list[str]:
        """Return a sentence on each kind of file that cannot be in a list."""
        texts = []
        if self.not_sounds:
            texts.append(f"files that are no sounds: {format_extensions(self.not_sounds)}")
        if self.foreign:
            formats = format_extensions(self.foreign)
            texts.append(f"sounds that cannot be decoded: {formats}; convert them to .flac")
        for names, what in (
            (self.empty, "empty files"),
            (self.unlistable, "files with names that a list cannot contain (a line break, or a duplicate)"),
            (self.broken_links, "broken links"),
            (self.repeated_links, "links to folders that were searched under another name"),
        ):
            if names:
                texts.append(f"{what}: {len(names):,} ({some(names, 3)})")
        return texts


def join_path(root: str, name: str) -> str:
    """Return `name` below `root`, with one "/" between them."""
    return f"{root.rstrip('/')}/{name}"


def find_sounds(folder: str) -> SoundFolder:
    """List the sounds below a folder.

    Hidden files and folders (".name") are skipped. Links to folders are followed last, in the order of their names; a
    folder with several names is searched once, so that a loop of links ends.

    Args:
        folder: absolute, or relative to the working directory.

    Raises:
        UserError: it does not exist, is no folder, cannot be read, or has no sound that can be decoded.
    """
    if not os.path.isdir(folder):
        what = "is a file; expected a folder of sounds" if os.path.exists(folder) else "there is no such folder"
        raise UserError(f"{folder}: {what}")
    if name_fault(folder) or not is_text(folder):
        raise UserError(
            f"{folder!r}: a list cannot contain this name (not valid UTF-8, or a line break); rename the folder"
        )
    found = SoundFolder(folder.rstrip("/") or "/")
    sizes: dict[str, int] = {}
    sizes_not_utf8: dict[str, int] = {}
    with tqdm(desc="searching", unit=" files", delay=2, disable=None) as progress:
        for name, entry in _walk(found):
            progress.update()
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in FOREIGN_EXTENSIONS:
                found.foreign[extension] += 1
            elif extension not in AUDIO_EXTENSIONS:
                found.not_sounds[extension] += 1
            elif name_fault(as_text(name)):
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
        raise UserError(_describe_no_sounds(found))
    return found


def _walk(found: SoundFolder) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield relative name and entry of each file that is not hidden; links not followed are added to `found`."""
    folders, links, searched = [""], list[str](), set[tuple[int, int]]()
    while folders or links:
        # Links come after all folders, so that a folder in the tree is listed under its own name.
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
                entries_below = list(entries)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be searched ({error.strerror}); change its permissions, or move it"
            ) from None
        for entry in entries_below:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _classify(entry)
            if kind == "folder":
                if entry.is_symlink():
                    heapq.heappush(links, name)
                else:
                    folders.append(name)
            elif kind == "file":
                yield name, entry
            elif kind == "broken":
                found.broken_links.append(name)


def _classify(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry or of its target: "folder", "file", "broken" (a link without target) or "other"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken" if entry.is_symlink() else "other"
    except OSError:  # a link to itself
        return "broken"


def _describe_no_sounds(found: SoundFolder) -> str:
    if found.foreign:
        return (
            f"{found.root}: all its sounds are in formats that cannot be decoded "
            f"({format_extensions(found.foreign)}); convert them to .flac or .wav first"
        )
    contents = "; ".join(found.describe_skipped()) or "nothing"
    extensions = " ".join(sorted(AUDIO_EXTENSIONS))
    return f"{found.root}: the folder has no sound; found {contents}; expected one of {extensions}"


def format_extensions(counts: Counter[str], limit: int = 8) -> str:
    """Return ".txt 12, .csv 1, without extension 1", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return some((f"{extension or 'without extension'} {n}" for extension, n in ordered), limit)


def find_identical(sounds: SoundFolder) -> list[list[int]]:
    """Find sounds with the same bytes.

    Only files of equal size are read: first a few kilobytes, and the whole file only if these are equal, too. A file
    that cannot be read equals no other.

    Args:
        sounds: the folder.

    Returns:
        Rows of `sounds.names`, ascending, of each set of two or more; sets in the order of their first.
    """
    sets = _split_sets([list(range(len(sounds.names)))], sounds.sizes.tolist())
    sets = _split_by_content(sets, sounds, _hash_samples, "comparing sounds of equal size")
    complete = [rows for rows in sets if sounds.sizes[rows[0]] <= 3 * _SAMPLE_BYTES]
    sampled = [rows for rows in sets if sounds.sizes[rows[0]] > 3 * _SAMPLE_BYTES]
    return sorted(complete + _split_by_content(sampled, sounds, _hash_file, "comparing sounds of equal samples"))


def _split_sets(sets: Iterable[list[int]], keys: Mapping[int, Hashable] | Sequence[Hashable]) -> list[list[int]]:
    """Split sets of rows by their keys; sets of one row are dropped."""
    split: dict[tuple[int, Hashable], list[int]] = {}
    for number, rows in enumerate(sets):
        for row in rows:
            split.setdefault((number, keys[row]), []).append(row)
    return [rows for rows in split.values() if len(rows) > 1]


def _split_by_content(
    sets: list[list[int]], sounds: SoundFolder, read_hash: Callable[[str, int], bytes | None], what: str
) -> list[list[int]]:
    rows = [row for same in sets for row in same]
    hashes: dict[int, Hashable] = {}
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=len(rows), desc=what, unit=" files", delay=2, disable=None) as progress,
    ):
        for start in range(0, len(rows), _FILES_IN_FLIGHT):
            part = rows[start : start + _FILES_IN_FLIGHT]
            paths = [sounds.path_on_disk(sounds.names[row]) for row in part]
            for row, found in zip(part, pool.map(read_hash, paths, sounds.sizes[part].tolist()), strict=True):
                hashes[row] = row if found is None else found
            progress.update(len(part))
    return _split_sets(sets, hashes)


def _hash_samples(path: str, size: int) -> bytes | None:
    """Hash the start, the middle and the end of a file; the whole file if it is short."""
    if size <= 3 * _SAMPLE_BYTES:
        return _hash_file(path, size)
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            for start in (0, (size - _SAMPLE_BYTES) // 2, size - _SAMPLE_BYTES):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return None
    return digest.digest()


def _hash_file(path: str, size: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
