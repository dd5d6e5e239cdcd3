"""Atomic writing: a file is complete or absent.

A file is written under a temporary name beside the target, flushed to disk and renamed. A reader that finds the target
finds all of it, and an interrupted writer, or one whose disk is full, leaves the previous file unchanged. Libraries
write to the file object that `whole_file` yields, never to a path, so that every error of the disk is seen here.

Partial files of a killed process are removed by the next process that writes into the folder. While
`.NAME.TOKEN.partial` is written, its process holds a lock on `.TOKEN.partial.lock`, which contains the boot id of the
machine. The lock ends with the process, whatever its number and its container. Where a lock proves nothing (another
boot id may mean another machine, and on some file systems locks are local or missing), files are removed after
`DEAD_AFTER`.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar

from common.errors import UserError

if TYPE_CHECKING:
    import h5py

T = TypeVar("T")

DEAD_AFTER = 24 * 3600.0  # seconds since a partial file of another boot has changed

_LOCK = re.compile(r"\.([0-9a-f]{8})\.partial\.lock")
_WRITING: set[str] = set()  # tokens of this process: its own locks do not keep it out
_CLEANED: set[Path] = set()  # folders; a listing for every file would take too long in a large one


class WholeFile(io.RawIOBase, BinaryIO):
    """A binary file that is being written; errors of the disk are kept, not raised, until `finish`.

    HDF5 crashes when it closes a file after a failed write, and PyTorch replaces the error by one of its own. Such
    libraries are given this object, whose `write` always succeeds. What could not be written is only counted, for the
    message, and kept for those that read back what they wrote.

    Args:
        path: the file to create.
        target: the final path, for the message.
        keep: keep in memory what could not be written, so that HDF5 can read it until it has closed the file.

    Attributes:
        error: the first error, None as long as everything was written.
    """

    def __init__(self, path: Path, target: Path, keep: bool = False) -> None:
        super().__init__()
        self.path, self.target, self._keep = path, target, keep
        self.error: BaseException | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._position = self._size = 0
        self._unwritten: list[tuple[int, bytes]] = []

    @property
    def name(self) -> str:
        """Path of the file, which some libraries ask for."""
        return str(self.path)

    def writable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position; no limits are checked."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def write(self, data: Any) -> int:
        """Write bytes at the position; an error is kept in `error`."""
        view = memoryview(data).cast("B")
        n_written = self._attempt(lambda: _write_all(self._descriptor, view, self._position))
        if n_written is None and self._keep:
            self._unwritten.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Read bytes at the position, including those that could not be written to the disk."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._size - self._position))
        data = self._attempt(lambda: os.pread(self._descriptor, n, self._position), always=True) or b""
        view[:n] = data.ljust(n, b"\0")
        for start, piece in self._unwritten:
            first, stop = max(start, self._position), min(start + len(piece), self._position + n)
            if first < stop:
                view[first - self._position : stop - self._position] = piece[first - start : stop - start]
        self._position += n
        return n

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        self._size = self._position if size is None else size
        self._attempt(lambda: os.ftruncate(self._descriptor, self._size))
        return self._size

    def check(self) -> None:
        """Raise if something could not be written.

        Raises:
            UserError: the disk is full or has failed; names the target, the space needed so far, and what to do.
        """
        if isinstance(self.error, OSError):
            raise UserError(describe_write_error(self.target, self.error, self._size, self.path)) from self.error
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Write everything to the disk, and close the file.

        Raises:
            UserError: see `check`.
        """
        if not self.closed:
            self._attempt(lambda: os.fsync(self._descriptor))
            self.close()
        self.check()

    def close(self) -> None:
        """Close the file without writing it to the disk."""
        if not self.closed:
            self._attempt(lambda: os.close(self._descriptor), always=True)
            super().close()

    def _attempt(self, function: Callable[[], T], always: bool = False) -> T | None:
        """Call a function unless there was an error, and keep its error; return None if there is one."""
        try:
            return function() if self.error is None or always else None
        except BaseException as error:  # Ctrl-C, too, must not pass through HDF5
            self.error = self.error or error
            return None


def _write_all(descriptor: int, view: memoryview, position: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
    return done


def describe_write_error(target: Path, error: OSError, n_bytes: int | None = None, partial: Path | None = None) -> str:
    """Return a sentence on a file that could not be written.

    Args:
        target: its path.
        error: of the disk.
        n_bytes: size that was to be written, as far as it is known.
        partial: what has been written, which will be removed.
    """
    reason = error.strerror or str(error)
    if error.errno == errno.EDQUOT:
        return f"{target} cannot be written ({reason}): make space within your quota and repeat the command"
    if error.errno != errno.ENOSPC:
        return f"{target} cannot be written ({reason}): check the disk and the permissions, and repeat the command"
    n_free = shutil.disk_usage(_find_existing(target)).free
    with suppress(OSError):
        n_free += partial.stat().st_blocks * 512 if partial else 0
    needed = f"at least {_format_size(n_bytes)} needed, " if n_bytes else ""
    return (
        f"{target} cannot be written ({reason}: {needed}{_format_size(n_free)} free): make space and repeat the command"
    )


def _format_size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


@contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Raise errors of the disk in the `with` block as `UserError`, see `describe_write_error`."""
    try:
        yield
    except OSError as error:
        raise UserError(describe_write_error(target, error)) from error


def append_bytes(file: io.FileIO, data: bytes) -> None:
    """Append to an unbuffered file.

    Raises:
        UserError: the disk is full or has failed; then a part of `data` may have been written.
    """
    with explain_write_errors(Path(os.fsdecode(file.name))):
        done = 0
        while done < len(data):
            done += file.write(data[done:])


def _find_existing(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@contextmanager
def whole_file(target: str | Path, keep: bool = False) -> Iterator[WholeFile]:
    """Yield a file to write to; it is renamed to `target` on a clean exit and removed on an error.

    Args:
        target: the final path; its folder is created if it is missing.
        keep: for HDF5, see `WholeFile`.

    Yields:
        A binary file in the same folder (so that the rename cannot cross file systems), unique to this call.

    Raises:
        UserError: the disk is full or has failed; then `target` is unchanged.
    """
    target = Path(target)
    with reserve_partial(target) as partial:
        with explain_write_errors(target):
            file = WholeFile(partial, target, keep)
        try:
            yield file
            file.finish()
        except Exception:
            file.check()  # an error of the disk is the cause of whatever a library made of it
            raise
        finally:
            file.close()
        with explain_write_errors(target):
            os.replace(partial, target)
            _flush_folder(target.parent)


@contextmanager
def create_hdf5(target: str | Path) -> "Iterator[h5py.File]":
    """Yield an HDF5 file to write to, see `whole_file`."""
    import h5py  # here, since it takes a tenth of a second

    with whole_file(target, keep=True) as file, h5py.File(file, "w") as content:
        yield content


@contextmanager
def reserve_partial(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` for a file or a folder, and remove whatever is there at the end.

    Args:
        target: the final path; its folder is created if it is missing.

    Yields:
        `.NAME.TOKEN.partial` in the same folder, which does not exist.
    """
    folder = target.parent
    with explain_write_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.absolute() not in _CLEANED:
        remove_dead_partials(folder)
        _CLEANED.add(folder.absolute())
    token, lock = _lock_token(target)
    partial, process = folder / f".{target.name}.{token}.partial", os.getpid()
    try:
        yield partial
    finally:
        if os.getpid() == process:  # and not one that was forked in the block and ends
            _remove(partial)
            (folder / _lock_name(token)).unlink(missing_ok=True)
        lock.close()  # only now: a lock that is released before would be that of a dead process
        _WRITING.discard(token)


def _lock_token(target: Path) -> tuple[str, IO[bytes]]:
    """Create and lock a lock file beside `target`; return its token, and the file to close."""
    while True:
        token = secrets.token_hex(4)
        path = target.parent / _lock_name(token)
        _WRITING.add(token)
        try:
            with explain_write_errors(target):
                lock = open(path, "xb", buffering=0)  # noqa: SIM115 - open as long as the partial file
        except BaseException:
            _WRITING.discard(token)
            raise
        with suppress(OSError):  # a file system without locks, or a full one
            fcntl.lockf(lock, fcntl.LOCK_EX)  # not flock, which processes that are forked meanwhile hold on to
            lock.write(_boot_id())
        if path.exists():
            return token, lock
        lock.close()  # removed before it was locked, as that of a dead process
        _WRITING.discard(token)


def _lock_name(token: str) -> str:
    return f".{token}.partial.lock"


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
    # A lock without content: its process was killed before it wrote it, or will see that the lock is gone.
    if boot_id in (b"", _boot_id()):
        return found
    age = time.time() - max((path.stat().st_mtime for path in found), default=0)
    return found if age > DEAD_AFTER else []


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


def _flush_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk, where permissions and the file system allow it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(descriptor)


def write_bytes(target: str | Path, data: bytes) -> None:
    """Write `data` to `target`, atomically."""
    with whole_file(target) as file:
        file.write(data)


def write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target`, atomically."""
    write_bytes(target, text.encode())


def write_json(target: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `target`, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
