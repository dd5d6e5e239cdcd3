"""The end of a command whose output nobody reads any more, as in `python run.py --help | head -1`."""

import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def end_with_reader(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point: where the reader of its output has ended, it ends without a message.

    The exit status is that of a program that SIGPIPE ends, 141. Python itself ignores the signal, for good reason: it
    would end a process that writes to a worker which has died.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            try:
                return function(*args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # else Python does so at its end, where nothing can be caught
        except BrokenPipeError:
            closed = [descriptor for descriptor in (1, 2) if _is_closed(descriptor)]
            if not closed:  # another pipe, to a process of this command
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in closed:
                os.dup2(nowhere, descriptor)
            sys.exit(128 + signal.SIGPIPE)

    return wrapper


def _is_closed(descriptor: int) -> bool:
    """Return whether what is written to a pipe or a socket has no reader."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
