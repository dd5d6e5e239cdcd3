"""Processes that decode sound files for this one, and are used again for the next file.

Only JSON and samples come back from them. Each message is the lengths of both, the JSON, and the samples.
"""

import atexit
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

LENGTHS = struct.Struct("!IQ")  # of the JSON and of the samples, in bytes
_ROOT = str(Path(__file__).resolve().parents[1])
_CODE = f"import sys; sys.path.insert(0, {_ROOT!r}); from audio.isolation import serve; serve(int(sys.argv[1]))"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_BUFFER = 1 << 22  # bytes between the processes: with less, they would wait for each other within each block
_MAX_IDLE = 2 * (os.cpu_count() or 1)  # processes kept for the next file


class CancelledError(Exception):
    """Decoding was cancelled by another thread."""


class DecoderStartError(UserError):
    """No process can be started to decode: a fault of the machine, and of no file.

    Args:
        reason: in a few words.
        is_ended: it was started, and ended at once.
    """

    def __init__(self, reason: str, is_ended: bool = False) -> None:
        super().__init__(
            f"a process that decodes cannot be started ({reason}): give fewer --n_workers, or raise the limits of "
            "processes, open files or memory"
        )
        self.is_ended = is_ended


class DecoderEndedError(Exception):
    """A process that decodes has ended within a file; the message describes how.

    Args:
        description: in a few words.
        is_killed: by SIGKILL, which no file causes by itself.
    """

    def __init__(self, description: str, is_killed: bool) -> None:
        super().__init__(description)
        self.is_killed = is_killed


class DecoderProcess:
    """A process that decodes one file after the other for this one.

    Raises:
        DecoderStartError: it cannot be started.
    """

    def __init__(self) -> None:
        try:
            self._socket, theirs = socket.socketpair()
        except OSError as error:
            raise DecoderStartError(str(error.strerror)) from None
        try:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._process = subprocess.Popen(
                # -P: no module is imported from the working directory, which may be a folder of somebody's files
                [sys.executable, "-P", "-c", _CODE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # threads take address space
                process_group=0,  # Ctrl-C is for the process that decodes are made for, which ends this one
            )
        except OSError as error:
            self._socket.close()
            raise DecoderStartError(str(error.strerror)) from None
        finally:
            theirs.close()
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def is_killed(self) -> bool:
        """Whether SIGKILL has ended it."""
        return self._process.poll() == -signal.SIGKILL

    def wait_until_ready(self) -> None:
        """Wait until it can decode.

        Raises:
            DecoderStartError: it ends, or does not start in time.
        """
        if self._is_ready:
            return
        try:
            self._is_ready = self.receive(time.monotonic() + _START_SECONDS) is not None
        except (EOFError, ConnectionError):
            raise DecoderStartError(self.describe_end(), is_ended=True) from None
        if not self._is_ready:
            raise DecoderStartError(f"it did not start within {_START_SECONDS:.0f} s")

    def send(self, request: dict[str, Any], descriptor: int | None = None) -> None:
        """Send the request for a file, and the open file itself where it has no name in the other process."""
        self._socket.settimeout(_START_SECONDS)
        data = json.dumps(request | {"is_open": descriptor is not None}).encode()
        self._socket.sendall(LENGTHS.pack(len(data), 0) + data)
        if descriptor is not None:
            socket.send_fds(self._socket, [b"\0"], [descriptor])

    def receive(self, deadline: float, cancelled: threading.Event | None = None) -> dict[str, Any] | np.ndarray | None:
        """Wait for the next message: samples, or the end of a file; None where it was not complete in time.

        Raises:
            CancelledError: by another thread.
            EOFError: the process ended.
        """
        try:
            self._receive_into(head := bytearray(LENGTHS.size), deadline, cancelled)
            n_json, n_bytes = LENGTHS.unpack(head)
            self._receive_into(data := bytearray(n_json), deadline, cancelled)
            message = json.loads(data)
            if not n_bytes:
                return message
            block = np.empty(message["shape"], message["dtype"])
            self._receive_into(block.data.cast("B"), deadline, cancelled)
        except TimeoutError:
            return None
        return block

    def _receive_into(self, buffer: bytearray | memoryview, deadline: float, cancelled: threading.Event | None) -> None:
        """Fill a buffer; raises `TimeoutError` at the deadline."""
        self._socket.settimeout(_POLL_SECONDS)
        rest = memoryview(buffer)
        while len(rest):
            try:
                n_read = self._socket.recv_into(rest)
            except TimeoutError:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError from None
                if time.monotonic() > deadline:
                    raise
                continue
            if not n_read:
                raise EOFError
            rest = rest[n_read:]

    def kill(self) -> None:
        """End the process."""
        self._socket.close()
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
            name = next((each.name for each in signal.Signals if each == -status), f"signal {-status}")
            return f"its decoder crashed with {name}"
        return f"its decoder crashed with exit status {status}"


_idle: list[DecoderProcess] = []
_lock = threading.Lock()


def start_processes(n: int) -> None:
    """Start processes ahead of their first files, so that they are ready when these come."""
    for _ in range(n - len(_idle)):
        release(DecoderProcess())


def acquire() -> DecoderProcess:
    """Return an idle process, or a new one where there is none."""
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.is_alive:
                return process
            process.kill()  # closes its socket; it was ended from outside
    return DecoderProcess()


def release(process: DecoderProcess) -> None:
    """Keep a process for the next file, or end it where there are enough."""
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
