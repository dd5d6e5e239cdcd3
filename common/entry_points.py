"""What every command does with errors and signals: one message, no traceback, an exit status.

Entry points import this module before anything slow, since signals are handled from then on.
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from common.closed_output import end_with_reader
from common.errors import UserError
from common.interrupts import print_stop, respond_to_signals

P = ParamSpec("P")
R = TypeVar("R")


def print_user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point: print user errors and interruptions as one message, without a traceback.

    The exit status is 1 for an error, and 128 and the number of the signal for a stop: 130 for Ctrl-C, 143 for SIGTERM.
    """
    function = end_with_reader(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with respond_to_signals():
                return function(*args, **kwargs)
        except UserError as error:
            fail("; ".join([_strip_traceback(str(error)), *getattr(error, "__notes__", [])]))
        except KeyboardInterrupt as error:
            sys.exit(print_stop(error))
        except OSError as error:  # a full disk, missing permissions: for the user to correct as well
            named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            fail("; ".join([named, *getattr(error, "__notes__", [])]))
        except RuntimeError as error:
            if str(error) == "can't start new thread":  # by Python, also where memory is all that is missing
                reason = f"{error}: give fewer workers or threads, or raise the limits of processes or memory"
                fail("; ".join([reason, *getattr(error, "__notes__", [])]))
            if dead := describe_dead_worker(error):  # PyTorch raises it wherever the process is at that moment
                fail("; ".join([dead, *getattr(error, "__notes__", [])]))
            raise

    return wrapper


def describe_dead_worker(error: Exception) -> str | None:
    """Return the message for an error about a loader process that has died; None for an error that it has raised."""
    found = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\) (?:is killed by signal: (.*?)\.|exited)", str(error))
    # Its sockets end or are gone, and Python raises what they raise.
    is_lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "ancdata" in str(error)
    if found is None and (not is_lost or "DataLoader worker" in str(error)):
        return None
    which = f" (pid {found[1]}{f', signal: {found[2]}' if found[2] else ''})" if found else ""
    return (
        f"a process that loads clips has died{which}: as a rule, memory has run out (or shared memory, /dev/shm); "
        "lower num_workers or batch_size"
    )


def _strip_traceback(message: str) -> str:
    """Return a message without the traceback that PyTorch wraps around an error of a loader worker."""
    if "Original Traceback" not in message:
        return message
    return re.split(r"^[\w.]*Error: ", message, flags=re.MULTILINE)[-1].strip()


def fail(sentence: str) -> NoReturn:
    """Print an error message and exit with status 1."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)
