"""Decode sound files in other processes, so that a file that crashes its decoder costs only itself.

So does one that makes it loop or wait for ever, or demands too much memory. See `audio.decoder_processes`.

S samples.
"""

import errno
import json
import os
import resource
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from audio.clip_blocks import ClipBlocks
from audio.decoder_processes import (
    LENGTHS,
    CancelledError,
    DecoderEndedError,
    DecoderProcess,
    DecoderStartError,
    acquire,
    release,
    start_processes,
)
from audio.errors import AudioReadError
from audio.io import AudioBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError
from common.interrupts import start_worker

__all__ = ["CancelledError", "DecoderStartError", "IsolatedBlocks", "describe_failure", "serve", "start_processes"]

_SOURCES = {source.__name__: source for source in (AudioBlocks, ClipBlocks)}
_SEARCH_SPEED = 2e6  # bytes a second, at which a slow disk or a search for the parts of a file proceeds at least
_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/", "/proc/thread-self/fd/")  # files this process has open
_MAX_LINKS = 40  # as many as Linux follows


class IsolatedBlocks:
    """The blocks of `AudioBlocks` or `ClipBlocks`, decoded in another process.

    Iterating, once, yields blocks; the attributes of the source that a process can send are set at the end.

    Args:
        path: a sound file of any kind.
        sample_rate: see the source, as all further arguments.
        source: the class whose blocks are decoded.
        limits: of the file.
        cancelled: set by another thread to end the iteration with `CancelledError`.

    Raises:
        AudioReadError: while iterating: as the source does, and where the decoder crashes, stalls or needs more memory
            than its limit.
    """

    def __init__(
        self,
        path: str | Path,
        sample_rate: int | None = None,
        *,
        source: type[AudioBlocks] | type[ClipBlocks] = AudioBlocks,
        limits: SoundLimits = DEFAULT_LIMITS,
        cancelled: threading.Event | None = None,
        **arguments: Any,
    ) -> None:
        self.path, self.limits = Path(path), limits
        self.cancelled = cancelled
        self.process: DecoderProcess | None = None
        self.sample_rate = self.source_rate = 0
        self.warnings: dict[str, str] = {}
        self.silent = self.clipped = False
        # Absolute: the process keeps the working directory it was started in. Not normalised, since `..` behind a link
        # is not the folder that the link is in.
        absolute = self.path.absolute()
        self._request = {"source": source.__name__, "path": os.fspath(absolute), "limits": vars(limits)}
        self._request["arguments"] = {"sample_rate": sample_rate, **arguments}
        self._is_descriptor = _names_descriptor(os.fspath(absolute))
        self._n_given = 0  # blocks

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            yield from self._decode()
        except DecoderStartError as error:
            if not error.is_ended:
                raise
        except DecoderEndedError as error:
            # A process that was killed, perhaps while it was idle, is no fault of a file that can be read again.
            if not (self._is_regular() and (error.is_killed or not self._n_given)):
                raise AudioReadError(self.path, f"cannot be decoded ({error})") from None
        else:
            return
        try:
            yield from self._decode(is_fresh=True)
        except DecoderEndedError as error:
            raise AudioReadError(self.path, f"cannot be decoded ({error})") from None

    def _decode(self, is_fresh: bool = False) -> Iterator[np.ndarray]:
        """Yield the blocks that were not given yet, of a new process or of an idle one."""
        process = self.process = DecoderProcess() if is_fresh else acquire()
        is_free = False
        n_blocks = 0
        try:
            self._send_request(process)
            seconds = self.limits.stall_seconds
            while True:
                allowed = seconds if n_blocks else seconds + self._search_seconds()
                message = process.receive(time.monotonic() + allowed, self.cancelled)
                if message is None:
                    raise AudioReadError(self.path, self._describe_stall(allowed))
                if not isinstance(message, np.ndarray):
                    break
                n_blocks += 1
                if n_blocks > self._n_given:
                    self._n_given = n_blocks
                    yield message
            is_free = True
        except (EOFError, ConnectionError):
            raise DecoderEndedError(process.describe_end(), process.is_killed) from None
        finally:
            self.process = None
            if is_free:
                release(process)
            else:
                process.kill()
        if "reason" in message:
            raise AudioReadError(self.path, message["reason"], message["kind"])
        vars(self).update(message)

    def _send_request(self, process: DecoderProcess) -> None:
        process.wait_until_ready()
        if not self._is_descriptor:
            process.send(self._request)
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise DecoderStartError(str(error.strerror)) from None
            raise AudioReadError(self.path, f"cannot be opened ({error.strerror})") from None
        try:
            process.send(self._request, descriptor)
        finally:
            os.close(descriptor)

    def _is_regular(self) -> bool:
        try:
            return stat.S_ISREG(os.stat(self.path).st_mode)
        except OSError:
            return False

    def _search_seconds(self) -> float:
        try:
            return os.stat(self.path).st_size / _SEARCH_SPEED
        except OSError:
            return 0.0

    def _describe_stall(self, seconds: float) -> str:
        return (
            f"cannot be decoded (no sound came for {seconds:.0f} s: its disk or pipe delivers nothing, or its decoder "
            "hangs; --limits '{stall_seconds: N}' waits longer)"
        )


def _names_descriptor(path: str) -> bool:
    """Whether an absolute path, or what it links to, is a name of a file that only this process has open."""
    for _ in range(_MAX_LINKS):
        if path.startswith(_DESCRIPTORS):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return False


# In the other process


def serve(descriptor: int) -> NoReturn:
    """Decode the files that are requested, until the process that requests them ends."""
    start_worker()
    _set_limit(resource.RLIMIT_CORE, 0)
    connection = socket.socket(fileno=descriptor)
    _send(connection, {})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print notes there, without the name of the file
    try:
        while head := connection.recv(LENGTHS.size, socket.MSG_WAITALL):
            n_json, _ = LENGTHS.unpack(head)
            _serve_file(connection, json.loads(connection.recv(n_json, socket.MSG_WAITALL)))
    except (ConnectionError, KeyboardInterrupt):
        pass
    os._exit(0)


def _send(connection: socket.socket, message: dict[str, Any], samples: memoryview | bytes = b"") -> None:
    data = json.dumps(message).encode()
    connection.sendall(LENGTHS.pack(len(data), len(samples)) + data)
    connection.sendall(samples)


def _serve_file(connection: socket.socket, request: dict[str, Any]) -> None:
    limits = SoundLimits(**request["limits"])
    _set_limit(resource.RLIMIT_AS, limits.decoder_mb * 1e6)
    path, descriptor = request["path"], None
    if request["is_open"]:
        _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
        path = f"/dev/fd/{descriptor}"
    blocks = _SOURCES[request["source"]](path, limits=limits, **request["arguments"])
    try:
        for block in blocks:
            samples = np.ascontiguousarray(block).data.cast("B")
            _send(connection, {"shape": block.shape, "dtype": block.dtype.name}, samples)
    except ConnectionError:
        raise
    except AudioReadError as error:
        message = {"reason": error.reason, "kind": error.kind}
    except Exception as error:  # whatever it is, the other files are decoded
        message = {"reason": describe_failure(error, limits), "kind": "unreadable"}
    else:
        message = {name: value for name, value in vars(blocks).items() if name in _SENT}
    finally:
        if descriptor is not None:
            os.close(descriptor)
    _send(connection, message)


_SENT = ("sample_rate", "source_rate", "warnings", "silent", "clipped")


def _set_limit(kind: int, value: float) -> None:
    """Set a limit of this process, where the system supports it; infinity is the highest that it allows."""
    with suppress(ValueError, OSError):  # macOS refuses limits of address space
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (int(min(value, sys.maxsize if hard == resource.RLIM_INFINITY else hard)), hard))


def describe_failure(error: Exception, limits: SoundLimits) -> str:
    """Describe an error of a decoder that is not one of the file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        mb = limits.decoder_mb
        return f"cannot be decoded (it needs more than {mb:.0f} MB of memory; --limits '{{decoder_mb: N}}' allows more)"
    return f"cannot be decoded (decoding failed with {type(error).__name__}: {error})"
