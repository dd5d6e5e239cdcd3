"""The result of every clip of a list that was packed."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from audio.io import LOSSES, WARNINGS
from common.errors import some


@dataclass
class Report:
    """The result of every row of a list; names are as listed.

    Attributes:
        sample_rate: of the pack, in Hz.
        n_listed: rows of the list.
        n_packed: clips that were packed.
        n_samples: total length of these.
        source_rates: rate in Hz → number of packed files.
        left_out: for each of "unreadable", "empty", "nan", "duplicate": name and reason.
        noted: for each of "silent", "clipped" and the kinds of warnings (`audio.io.WARNINGS`): names of
            clips that are packed nevertheless.
        warnings: name, kind and sentence of the warnings.
        files: paths written.
    """

    sample_rate: int
    n_listed: int
    n_packed: int = 0
    n_samples: int = 0
    source_rates: Counter[int] = field(default_factory=Counter)
    left_out: dict[str, list[tuple[str, str]]] = field(
        default_factory=lambda: {fault: [] for fault in ("unreadable", "empty", "nan", "duplicate")}
    )
    noted: dict[str, list[str]] = field(default_factory=lambda: {note: [] for note in ("silent", "clipped", *WARNINGS)})
    warnings: list[tuple[str, str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def as_state(self) -> dict[str, Any]:
        """Return everything as JSON values, from which `from_state` restores it."""
        return vars(self) | {"source_rates": {str(rate): n for rate, n in self.source_rates.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Report":
        """Restore what `as_state` returned."""
        rates = Counter({int(rate): n for rate, n in state["source_rates"].items()})
        return cls(**state | {"source_rates": rates})

    @property
    def hours(self) -> float:
        """Total length of the packed clips."""
        return self.n_samples / self.sample_rate / 3600

    @property
    def is_complete(self) -> bool:
        """Whether every clip of the list is packed without loss of sound; a clip that is listed twice counts once."""
        is_left_out = any(rows for fault, rows in self.left_out.items() if fault != "duplicate")
        return not is_left_out and not any(self.noted[note] for note in LOSSES)

    @property
    def n_resampled(self) -> int:
        """Number of packed clips that were resampled."""
        return self.n_packed - self.source_rates[self.sample_rate]

    def as_json(self) -> dict[str, Any]:
        """Return the counts, then all names."""
        left_out = {
            fault: [{"filename": name, "reason": reason} for name, reason in rows]
            for fault, rows in self.left_out.items()
        }
        return {
            "sample_rate": self.sample_rate,
            "listed": self.n_listed,
            "packed": self.n_packed,
            "hours": round(self.hours, 4),
            "resampled": self.n_resampled,
            "source_rates": {str(rate): n for rate, n in sorted(self.source_rates.items())},
            "left_out": {fault: len(rows) for fault, rows in left_out.items()},
            "noted": {note: len(names) for note, names in self.noted.items()},
            "files": self.files,
            "left_out_clips": left_out,
            "noted_clips": self.noted,
            "warnings": [{"filename": name, "kind": kind, "what": text} for name, kind, text in self.warnings],
        }

    def summary(self) -> str:
        """Return a summary of a few lines."""
        rates = ", ".join(
            f"{n} from {rate} Hz" for rate, n in sorted(self.source_rates.items()) if rate != self.sample_rate
        )
        lines = [
            f"packed      {self.n_packed} of {self.n_listed} clips, "
            f"{_format_duration(self.n_samples / self.sample_rate)} at {self.sample_rate} Hz",
            f"resampled   {self.n_resampled}" + (f" ({rates})" if rates else ""),
        ]
        for fault, rows in self.left_out.items():
            first = f"   left out, e.g. {rows[0][0]}: {rows[0][1]}" if rows else ""
            lines.append(f"{_TITLES[fault]:<11} {len(rows)}{first}")
        sentences = {kind: f"{name} {text}" for name, kind, text in reversed(self.warnings)}
        for note, names in self.noted.items():
            first = f"   packed nevertheless, e.g. {sentences.get(note) or some(names, 2)}" if names else ""
            if names or note not in WARNINGS or note == "truncated":
                lines.append(f"{note:<11} {len(names)}{first}")
        return "\n".join(lines)


_TITLES = {"unreadable": "unreadable", "empty": "empty", "nan": "NaN", "duplicate": "duplicate"}


def _format_duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.1f} seconds"
