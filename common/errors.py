"""Errors that a user can correct, with messages that name the cause and the remedy.

Invalid files, keys and values are raised as `UserError`: entry points print its message and exit with status 1. Any
other exception is a bug of this project and keeps its traceback.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, ParamSpec, TypeVar

from common.closed_output import end_with_reader
from common.interrupts import print_stop, respond_to_signals

P = ParamSpec("P")
R = TypeVar("R")


class UserError(Exception):
    """Invalid input; the message names the object, what was found, what was expected and what to do."""


class Faults:
    """Collects all faults of an input, to report them together.

    Args:
        subject: the input, for the message.
        limit: number of faults that are listed; None for all.

    Example:
        >>> faults = Faults("trainconfig/mine.yaml")
        >>> faults.add("unknown key 'epoch'")
        >>> faults.raise_if_any()
        Traceback (most recent call last):
        ...
        common.errors.UserError: trainconfig/mine.yaml has 1 fault:
          - unknown key 'epoch'
    """

    def __init__(self, subject: str, limit: int | None = None) -> None:
        self.subject, self.limit = subject, limit
        self.sentences: list[str] = []

    def add(self, sentence: str) -> None:
        """Add a fault."""
        self.sentences.append(sentence)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Add a `UserError` that is raised in the `with` block, which ends there."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def raise_if_any(self) -> None:
        """Raise one `UserError` with all faults, if there are any."""
        if self.sentences:
            plural = "s" if len(self.sentences) > 1 else ""
            lines = "".join(f"\n  - {sentence}" for sentence in self.sentences[: self.limit])
            if self.limit is not None and len(self.sentences) > self.limit:
                lines += f"\n  - and {len(self.sentences) - self.limit} more"
            raise UserError(f"{self.subject} has {len(self.sentences)} fault{plural}:{lines}")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the valid name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names, comma separated, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


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
