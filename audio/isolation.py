"""Decode sound files in other processes, so that a file that crashes its decoder costs only itself.

So does one that makes it loop or wait for ever, or demands too much memory. A process serves one file at a time and is
used again for the next. Only JSON and samples come back from it.

S samples.
"""

import atexit
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from audio.clip_blocks import ClipBlocks
from audio.errors import AudioReadError
from audio.io import AudioBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError
from common.interrupts import start_worker

_ROOT = str(Path(__file__).resolve().parents[1])
_CODE = f"import sys; sys.path.insert(0, {_ROOT!r}); from audio.isolation import serve; serve(int(sys.argv[1]))"
_SOURCES = {source.__name__: source for source in (AudioBlocks, ClipBlocks)}
_SEARCH_SPEED = 2e6  # bytes a second, at which a slow disk or a search for the parts of a file proceeds at least
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_BUFFER = 1 << 22  # bytes between the processes: with less, they would wait for each other within each block
_MAX_IDLE = 2 * (os.cpu_count() or 1)  # processes kept for the next file


class CancelledError(Exception):
    """Decoding was cancelled by another thread."""


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
        self._request = {"source": source.__name__, "path": os.fspath(path), "limits": vars(limits)}
        self._request["arguments"] = {"sample_rate": sample_rate, **arguments}

    def __iter__(self) -> Iterator[np.ndarray]:
        process = self.process = _borrow()
        is_free = False
        try:
            process.send(self._request)
            seconds = self.limits.stall_seconds
            n_blocks = 0
            while True:
                allowed = seconds if n_blocks else seconds + self._search_seconds()
                message = process.receive(time.monotonic() + allowed, self.cancelled)
                if message is None:
                    raise AudioReadError(self.path, self._describe_stall(allowed))
                if isinstance(message, np.ndarray):
                    n_blocks += 1
                    yield message
                    continue
                is_free = True
                break
        except (EOFError, ConnectionError):
            raise AudioReadError(self.path, f"cannot be decoded ({process.describe_end()})") from None
        finally:
            self.process = None
            if is_free:
                _give_back(process)
            else:
                process.kill()
        if "reason" in message:
            raise AudioReadError(self.path, message["reason"], message["kind"])
        vars(self).update(message)

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


class DecoderProcess:
    """A process that decodes one file after the other for this one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._connection = Connection(ours.detach())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # threads take address space
            process_group=0,  # Ctrl-C is for the process that decodes are made for, which ends this one
        )
        theirs.close()
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, request: dict[str, Any]) -> None:
        """Send the request for a file, once the process is ready."""
        if not self._is_ready:
            with suppress(EOFError, ConnectionError):
                self._is_ready = self.receive(time.monotonic() + _START_SECONDS) is not None
            if not self._is_ready:
                self.kill()
                raise RuntimeError(f"a process that decodes cannot be started; it ended with {self.describe_end()}")
        self._connection.send_bytes(json.dumps(request).encode())

    def receive(self, deadline: float, cancelled: threading.Event | None = None) -> dict[str, Any] | np.ndarray | None:
        """Wait for the next message: samples, or the end of a file; None where none came in time.

        Raises:
            CancelledError: by another thread.
            EOFError: the process ended.
        """
        while not self._connection.poll(_POLL_SECONDS):
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            if time.monotonic() > deadline:
                return None
        message = json.loads(self._connection.recv_bytes())
        if "shape" not in message:
            return message
        block = np.empty(message["shape"], message["dtype"])
        self._connection.recv_bytes_into(block.data.cast("B"))
        return block

    def kill(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:  # it waits for a disk that does not answer, which no signal ends
            self._process.returncode = -signal.SIGKILL  # never waited for again

    def describe_end(self) -> str:
        """Describe how the process ended by itself."""
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "its decoder closed its pipe"
        if status == -signal.SIGKILL:
            return "its decoder was killed, perhaps because the machine ran out of memory"
        if status < 0:
            return f"its decoder crashed with {signal.Signals(-status).name}"
        return f"its decoder crashed with exit status {status}"


_idle: list[DecoderProcess] = []
_lock = threading.Lock()


def start_processes(n: int) -> None:
    """Start processes ahead of their first files, so that they are ready when these come."""
    for _ in range(n - len(_idle)):
        _give_back(DecoderProcess())


def _borrow() -> DecoderProcess:
    with _lock:
        if _idle:
            return _idle.pop()
    return DecoderProcess()


def _give_back(process: DecoderProcess) -> None:
    with _lock:
        if len(_idle) < _MAX_IDLE:
            _idle.append(process)
            return
    process.kill()


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().kill()


def _forget_all() -> None:
    """Leave the processes to the one that forked."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forget_all)


# In the other process


def serve(descriptor: int) -> NoReturn:
    """Decode the files that are requested, until the process that requests them ends."""
    start_worker()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(descriptor)
    connection.send_bytes(b"{}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print notes there, without the name of the file
    try:
        while True:
            _serve_file(connection, json.loads(connection.recv_bytes()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass
    os._exit(0)


def _serve_file(connection: Connection, request: dict[str, Any]) -> None:
    limits = SoundLimits(**request["limits"])
    _limit_memory(round(limits.decoder_mb * 1e6))
    blocks = _SOURCES[request["source"]](request["path"], limits=limits, **request["arguments"])
    try:
        for block in blocks:
            connection.send_bytes(json.dumps({"shape": block.shape, "dtype": block.dtype.name}).encode())
            connection.send_bytes(np.ascontiguousarray(block).data.cast("B"))
    except ConnectionError:
        raise
    except AudioReadError as error:
        message = {"reason": error.reason, "kind": error.kind}
    except Exception as error:  # whatever it is, the other files are decoded
        message = {"reason": describe_failure(error, limits), "kind": "unreadable"}
    else:
        message = {name: value for name, value in vars(blocks).items() if name in _SENT}
    connection.send_bytes(json.dumps(message).encode())


_SENT = ("sample_rate", "source_rate", "warnings", "silent", "clipped")


def _limit_memory(n_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard), hard))


def describe_failure(error: Exception, limits: SoundLimits) -> str:
    """Describe an error of a decoder that is not one of the file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        mb = limits.decoder_mb
        return f"cannot be decoded (it needs more than {mb:.0f} MB of memory; --limits '{{decoder_mb: N}}' allows more)"
    return f"cannot be decoded (decoding failed with {type(error).__name__}: {error})"
