"""Errors that a user can correct, with messages that name the cause and the remedy.

Invalid files, keys and values are raised as `UserError`: entry points print its message and exit with status 1. Any
other exception is a bug of this project and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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

    def add_all(self, others: "Faults") -> None:
        """Add the faults of a part of the input, each behind its subject."""
        self.sentences += [f"{others.subject}: {sentence}" for sentence in others.sentences]

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
