"""The error of a sound file that cannot be read."""

from pathlib import Path

from common.errors import UserError


class AudioReadError(UserError):
    """A sound file that cannot be used.

    Attributes:
        path: the file, as given.
        reason: in a few words.
        kind: "unreadable", "empty" (no samples) or "nan" (samples that are not finite numbers).
    """

    def __init__(self, path: str | Path, reason: str, kind: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str | Path, str, str]]:
        return type(self), (self.path, self.reason, self.kind)  # needed for pickling: errors come from worker processes
