"""Atomic writing: a file is complete or absent.

A file is written under a temporary name beside the target, flushed to disk and renamed. A reader that finds the target
finds all of it, and an interrupted writer leaves the previous file unchanged.

Partial files of a killed process are removed by the next process that writes into the folder. While
`.NAME.TOKEN.partial` is written, its process holds a lock on `.TOKEN.partial.lock`, which contains the boot id of the
machine. The lock ends with the process, whatever its number and its container. Where a lock proves nothing (another
boot id may mean another machine, and on some file systems locks are local or missing), files are removed after
`DEAD_AFTER`.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

DEAD_AFTER = 24 * 3600.0  # seconds since a partial file of another boot has changed

_LOCK = re.compile(r"\.([0-9a-f]{8})\.partial\.lock")
_WRITING: set[str] = set()  # tokens of this process: its own locks do not keep it out
_CLEANED: set[Path] = set()  # folders; a listing for every file would take too long in a large one


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `target` on a clean exit and removed on an error.

    Args:
        target: the final path; its folder is created if it is missing.

    Yields:
        A path in the same folder (so that the rename cannot cross file systems), unique to this call.
    """
    target = Path(target)
    with reserve_partial(target) as partial:
        yield partial
        _flush(partial)
        os.replace(partial, target)
        _flush(target.parent)


@contextmanager
def reserve_partial(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` for a file or a folder, and remove whatever is there at the end.

    Args:
        target: the final path; its folder is created if it is missing.

    Yields:
        `.NAME.TOKEN.partial` in the same folder, which does not exist.
    """
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if folder.absolute() not in _CLEANED:
        remove_dead_partials(folder)
        _CLEANED.add(folder.absolute())
    token = secrets.token_hex(4)
    lock = folder / f".{token}.partial.lock"
    _WRITING.add(token)
    try:
        with open(lock, "xb", buffering=0) as file:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)  # not flock, which processes that are forked meanwhile hold on to
                file.write(_boot_id())  # once it is locked: an empty file was never, or is not yet
            partial = folder / f".{target.name}.{token}.partial"
            try:
                yield partial
            finally:
                _remove(partial)
                lock.unlink(missing_ok=True)
    finally:
        _WRITING.discard(token)


def remove_dead_partials(folder: str | Path) -> None:
    """Remove the partial files of killed processes in a folder, as far as permissions allow."""
    try:
        names = os.listdir(folder)
    except OSError:  # it does not exist, or may not be listed
        return
    for name in names:
        found = _LOCK.fullmatch(name)
        if found is None or found[1] in _WRITING:
            continue
        try:
            with open(Path(folder, name), "r+b") as lock:
                for path in _find_dead(lock, Path(folder), found[1]):
                    _remove(path)
        except OSError:
            continue  # removed meanwhile, or of another user


def _find_dead(lock: IO[bytes], folder: Path, token: str) -> list[Path]:
    """Return the partial files of a process that is dead, its lock last; an empty list if it may be alive."""
    boot_id = None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        boot_id = lock.read()
    except (BlockingIOError, PermissionError):
        return []
    except OSError:  # a file system without locks
        pass
    # Listed only now, when no more are added. Libraries that write beside the given name append to it.
    found = sorted((path for path in folder.iterdir() if f".{token}.partial" in path.name), key=_is_lock)
    is_dead = (
        boot_id == _boot_id() or time.time() - max((path.stat().st_mtime for path in found), default=0) > DEAD_AFTER
    )
    return found if is_dead else []


def _is_lock(path: Path) -> bool:
    return _LOCK.fullmatch(path.name) is not None


@cache
def _boot_id() -> bytes:
    """Return an id that all processes of one running kernel share, in whatever container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return os.uname().nodename.encode()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target`, atomically."""
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `target`, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
