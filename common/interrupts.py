"""Signals that stop a command: Ctrl-C, SIGTERM of schedulers and containers, SIGHUP of a closed terminal.

Every entry point imports `common.errors`, and with it this module, before anything else. From then on a signal ends the
process without a traceback. In a function that is decorated with `common.errors.print_user_errors` it raises
`StopSignal`, a KeyboardInterrupt: temporary files are removed and outputs are closed as on Ctrl-C. A signal that is
ignored from outside (`nohup`) stays ignored.

A launcher passes on what the terminal has already sent to every process, so a second signal within `REPEAT_SECONDS` is
the same one. A later one ends the process at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 2.0
WATCH_SECONDS = 0.5  # between two checks whether the parent of a worker is alive

_ROOT = Path(__file__).resolve().parents[1]
# Of the project's folder; a user's program there that imports the project keeps its own handlers.
_PROGRAMS = (
    "run.py",
    "save_logits.py",
    "inference.py",
    "export_onnx.py",
    "onnx_inference_with_kaldi.py",
    "onnx_inference_with_torchaudio.py",
)


class StopSignal(KeyboardInterrupt):
    """A signal that stops the command; its notes say what was kept.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Handler:
    """The handler of `SIGNALS` in this process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.respond: Callable[[int], None] | None = None  # to the first signal; None ends the process
        self.first_time: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # forked: the parent prints the message
            os._exit(128 + number)
        if self.first_time is not None and time.monotonic() - self.first_time < REPEAT_SECONDS:
            return
        is_first, self.first_time = self.first_time is None, time.monotonic()
        if is_first and self.respond is not None:
            self.respond(number)
            return
        if _prints():
            write_error("\nstopped\n" if is_first else "\nstopped at once\n")
        os._exit(128 + number)

    def install(self) -> dict[signal.Signals, object]:
        """Handle the signals that are not ignored; return their former handlers."""
        handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        return {number: signal.signal(number, self) for number in handled}


_HANDLER = _Handler()


def _prints() -> bool:
    """Return whether this process prints messages that all ranks of a run would print."""
    return os.environ.get("RANK", "0") == "0"


def write_error(message: str) -> None:
    """Write to standard error, if there is one, where `print` is not safe: in a handler, or before `os._exit`."""
    if sys.stderr is not None:  # else descriptor 2 may be that of any file
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, message.encode())


def _is_entry_point() -> bool:
    """Return whether the running program is one of this project's, and not a test or a notebook that imports it."""
    main = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
    return main in [_ROOT / name for name in _PROGRAMS] or main.parent == _ROOT / "scripts"


def _raise(number: int) -> None:
    raise StopSignal(number)


@contextmanager
def respond_to_signals(respond: Callable[[int], None] = _raise) -> Iterator[None]:
    """Call a function with the number of the first signal in the block: by default it raises `StopSignal`."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    former = _HANDLER.respond, _HANDLER.first_time, _HANDLER.process
    _HANDLER.respond, _HANDLER.process = respond, os.getpid()
    handlers = _HANDLER.install()
    try:
        yield
    finally:
        _HANDLER.respond, _, _HANDLER.process = former
        for number, handler in handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if signal.getsignal(signal.SIGINT) is not _HANDLER:  # in a program that lives on
            _HANDLER.first_time = former[1]


@contextmanager
def note_when_stopped(note: str) -> Iterator[None]:
    """Add a sentence to the message of a stop in the block: what is kept, and what to do.

    It is added to errors of the machine as well, such as a full disk or a dead process, but not to those of the input.
    """
    try:
        yield
    except BaseException as error:
        causes = (error, error.__cause__)  # the cause of a UserError
        if any(isinstance(cause, KeyboardInterrupt | OSError | EOFError | RuntimeError) for cause in causes):
            error.add_note(note)
        raise


def print_stop(error: KeyboardInterrupt) -> int:
    """Print that the command was stopped and what is kept; return the exit status: 130 for Ctrl-C, 143 for SIGTERM."""
    notes = getattr(error, "__notes__", None) or ["unfinished files were removed"]
    if _prints() and sys.stderr is not None:
        with suppress(OSError):  # of a terminal that is gone
            print(f"\nstopped: {'; '.join(dict.fromkeys(notes))}", file=sys.stderr)
    return 128 + getattr(error, "number", signal.SIGINT)


def start_worker(_: int = 0) -> None:
    """Let the parent decide when this process ends: call it first in a process that loads or decodes.

    Signals to the whole process group are for the parent, which stops its workers. SIGTERM of the parent itself
    ends the worker, and so does the end of the parent, however it came.
    """
    import multiprocessing  # here, since entry points import this module first

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, where SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()
        pid = os.getppid() if parent is None or parent.pid is None else parent.pid
        # Of a process that the fork server has forked, only the sentinel shows the end of its parent. Elsewhere the
        # sentinel may not: processes that were forked later hold on to it.
        sentinel = None if parent is None or os.getppid() == pid else parent.sentinel
        threading.Thread(target=_watch_parent, args=(pid, sentinel), daemon=True).start()


def _watch_parent(parent: int, sentinel: int | None) -> None:
    from multiprocessing.connection import wait

    while os.getppid() == parent if sentinel is None else not wait([sentinel], 0):
        received = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def act_as_entry_point() -> None:
    """Handle signals from here on; a forked process calls this, programs of the project need not."""
    _HANDLER.process = os.getpid()
    _HANDLER.install()


if _is_entry_point():
    act_as_entry_point()
