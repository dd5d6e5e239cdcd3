"""Patterns of the names of sounds, such as "{label}_{speaker}_{}.wav", and guesses of patterns.

A pattern is literal text with placeholders. `{name}` becomes a column and matches as little as possible, `{}` is
ignored and matches as much as possible; `:d` in either (`{take:d}`, `{:d}`) matches a whole number. No placeholder
matches a "/". A name that occurs twice must match the same text.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from audio.io import AUDIO_EXTENSIONS, FOREIGN_EXTENSIONS
from common.errors import UserError, some

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ANY_EXTENSION = re.compile(r"\.(?:\{\}|\*)$")
_DIGITS = "(?<![0-9])[0-9]+(?![0-9])"
_LAST_NUMBER = re.compile(r"(.*?)([ _.\-]*)[0-9]+")
RESERVED = ("filename", "labels", "hdf5path")  # columns of every list

_MAX_VALUES = 1000  # of a part of names that may be the label
_CLIPS_A_VALUE = 3  # at least, on average


class NamePattern:
    """A pattern of names, see the docstring of this module.

    Args:
        text: matched against the path relative to the folder of sounds if it has a "/", else against the file's name.
            The extension may be omitted; `.{}` and `.*` at the end match any extension.

    Attributes:
        text: as given.
        columns: the distinct names of its placeholders, in their order.

    Raises:
        UserError: unbalanced braces, an invalid or reserved name of a placeholder, two placeholders without text
            between them, or no placeholder.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        stem, self.extension = _split_extension(text)
        self._with_folders = "/" in stem
        parts = _PLACEHOLDER.split(stem)  # literal, placeholder, literal, ...
        self.columns: list[str] = []
        self._check(parts)
        self._regex = re.compile(self._make_expression(parts, names_are_short=True))
        self._other_regex = re.compile(self._make_expression(parts, names_are_short=False))

    def _check(self, parts: list[str]) -> None:
        if any("{" in literal or "}" in literal for literal in parts[::2]):
            raise UserError(f"--pattern {self.text!r}: unbalanced braces; expected placeholders such as {{label}}")
        if len(parts) == 1:
            raise UserError(f"--pattern {self.text!r} has no placeholder; expected one such as '{{label}}_{{}}'")
        for number, placeholder in enumerate(parts[1::2]):
            name, colon, kind = placeholder.partition(":")
            if (name and not name.isidentifier()) or (colon and kind != "d"):
                raise UserError(
                    f"--pattern {self.text!r}: {{{placeholder}}} is no placeholder; expected {{}}, a word such as "
                    "{speaker}, or a whole number such as {take:d} or {:d}"
                )
            if name in RESERVED:
                expected = "{label}" if name == "labels" else "another name"
                raise UserError(f"--pattern {self.text!r}: {{{name}}} is a column of every list; expected {expected}")
            before = parts[2 * number - 1] if number else ""
            if number and not parts[2 * number] and not (colon or before.endswith(":d")):
                raise UserError(
                    f"--pattern {self.text!r}: no text separates {{{before}}} from {{{placeholder}}}; add the text "
                    "between them, or make one a whole number, such as {:d}"
                )
            if name and name not in self.columns:
                self.columns.append(name)

    def _make_expression(self, parts: list[str], *, names_are_short: bool) -> str:
        expression, seen = "", set[str]()
        for number, part in enumerate(parts):
            if number % 2 == 0:
                expression += re.escape(part)
                continue
            name, _, kind = part.partition(":")
            is_short = bool(name) == names_are_short
            text = _DIGITS if kind else "[^/]+?" if is_short else "[^/]+"
            group = f"c{self.columns.index(name)}" if name else ""
            expression += f"(?P={group})" if name in seen else f"(?P<{group}>{text})" if name else f"(?:{text})"
            seen |= {name} - {""}
        return expression

    def match(self, name: str) -> list[str] | None:
        """Return the text of each column in a name relative to the folder, or None if it does not match."""
        return self._match(self._regex, name)

    def match_other(self, name: str) -> list[str] | None:
        """Return the match in which `{name}` is as long as possible and `{}` as short as possible."""
        return self._match(self._other_regex, name)

    def _match(self, regex: re.Pattern[str], name: str) -> list[str] | None:
        path, extension = os.path.splitext(name)
        if self.extension and extension.lower() != self.extension:
            return None
        found = regex.fullmatch(path if self._with_folders else path.rpartition("/")[2])
        return list(found.groups()) if found else None


def _split_extension(text: str) -> tuple[str, str]:
    """Return a pattern without its extension, and the extension in lower case, "" for any."""
    if _ANY_EXTENSION.search(text):
        return _ANY_EXTENSION.sub("", text), ""
    stem, extension = os.path.splitext(text)
    is_audio = extension.lower() in AUDIO_EXTENSIONS | FOREIGN_EXTENSIONS
    return (stem, extension.lower()) if is_audio else (text, "")


@dataclass(frozen=True)
class Proposal:
    """A part of names with few values.

    Attributes:
        pattern: with the part as `{label}`.
        values: of the part, sorted.
    """

    pattern: str
    values: list[str]

    @property
    def is_number(self) -> bool:
        """Whether all values are numbers, which may be folds, speakers or takes."""
        return all(value.isdecimal() for value in self.values)

    def __str__(self) -> str:
        return f"--pattern '{self.pattern}' ({len(self.values)} values: {some(self.values, 3)})"


def propose_labels(names: Sequence[str]) -> list[Proposal]:
    """Find parts before the first or after the last "_" or "-" of file names that have few values.

    Every name must have the part; there must be two values or more, with three clips or more on average.
    """
    stems = [os.path.splitext(name.rpartition("/")[2])[0] for name in names]
    proposals = []
    for mark in "_-":
        if not all(mark in stem for stem in stems):
            continue
        for pattern, parts in (
            (f"{{label}}{mark}{{}}", [stem.partition(mark) for stem in stems]),
            (f"{{}}{mark}{{label}}", [stem.rpartition(mark) for stem in stems]),
        ):
            values = Counter(part[0] if pattern.startswith("{label}") else part[2] for part in parts)
            most = min(_MAX_VALUES, len(stems) // _CLIPS_A_VALUE)
            if all(part[0] and part[2] for part in parts) and 2 <= len(values) <= most:
                proposals.append(Proposal(pattern, sorted(values)))
    return proposals


def choose_label(proposals: Iterable[Proposal]) -> Proposal | None:
    """Return the proposal whose values are words if there is exactly one, else None."""
    words = [proposal for proposal in proposals if not proposal.is_number]
    return words[0] if len(words) == 1 else None


def suggest_groups(names: Sequence[str], n_labels: int) -> str:
    """Return a sentence on possible groups of names, or "".

    Args:
        names: relative to the folder.
        n_labels: number of classes; fewer groups than twice as many may be the classes (dog_01, dog_02, cat_01).
    """
    folders: Counter[str] = Counter()
    prefixes: defaultdict[str, list[str]] = defaultdict(list)
    marks: Counter[str] = Counter()
    for name in names:
        folder, _, base = name.rpartition("/")
        folders[folder] += 1
        found = _LAST_NUMBER.fullmatch(os.path.splitext(base)[0])
        if found and found[1]:
            prefixes[f"{folder}/{found[1]}"].append(name)
            marks[found[2]] += 1
    min_groups = 2 * max(n_labels, 1)
    if sum(n > 1 for n in folders.values()) >= min_groups:
        return (
            f"the sounds are in {len(folders)} folders; if each folder is one group (one recording, one speaker), "
            "--group folder keeps it in one list"
        )
    several = [sorted(members) for members in prefixes.values() if len(members) > 1]
    if len(several) < min_groups or 2 * sum(map(len, several)) < len(names):
        return ""
    first = min(several)
    mark = marks.most_common(1)[0][0]
    return (
        f"names that differ only in their last number: {sum(map(len, several))} (such as {first[0]} and "
        f"{first[1]}); if these are parts of one recording, a pattern that ends in '{{recording}}{mark}{{:d}}' keeps "
        "each recording in one list"
    )
