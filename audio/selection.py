"""Selection of clips by label: all clips of some labels, and others as negatives.

The choice depends on the names of the clips, their labels and the seed, not on their order.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from audio.audioset import display_name, other_name
from audio.labels import SEPARATOR, list_classes, split_labels
from audio.ontology import Ontology
from common.errors import UserError, did_you_mean, some

ORIGINAL = "all_labels"  # column of the labels that clips had before a selection


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of `select_clips`.

    Attributes:
        labels: the targets, names or AudioSet's MIDs; empty for all labels that enough clips have.
        negatives: number of clips without a target; None for as many as have one, or all if there are fewer, and for
            none where `labels` is empty.
        min_clips: fewest clips of a target.
        balanced: take only as many clips of each target as the rarest one has, and by default of the negatives.
        seed: of what is drawn.
        negative_label: label of the negatives.
    """

    labels: Sequence[str] = ()
    negatives: int | None = None
    min_clips: int = 1
    balanced: bool = False
    seed: int = 42
    negative_label: str = "Other"


@dataclass
class Selection:
    """The clips that were chosen.

    Attributes:
        rows: of the table, int64, ascending.
        labels: of each of these rows: its targets joined by ";", or the label of the negatives.
        classes: the targets in the order given, then the label of the negatives if there are any.
        n_chosen: number of chosen clips of each class.
        n_found: number of clips of each class in the table.
        n_by_kind: number of clips in the table that have a target only by a kind of it (a descendant).
    """

    rows: np.ndarray
    labels: list[str]
    classes: list[str]
    n_chosen: dict[str, int]
    n_found: dict[str, int]
    n_by_kind: dict[str, int] = field(default_factory=dict)

    def take(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the chosen rows of a table with their new labels; those of the table become a column `all_labels`."""
        chosen = table.iloc[self.rows].reset_index(drop=True)
        if ORIGINAL not in chosen:
            chosen[ORIGINAL] = chosen["labels"]
        chosen["labels"] = pd.Series(self.labels, dtype=str)
        return chosen


def compute_order(names: Sequence[str], seed: int) -> np.ndarray:
    """Return a pseudo-random number for each name, which depends on name and seed only, uint64 (N,)."""
    prefix = f"{seed}\0".encode()
    digests = [hashlib.blake2b(prefix + name.encode("utf-8"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def select_clips(table: pd.DataFrame, settings: SelectionSettings, ontology: Ontology | None = None) -> Selection:
    """Choose all clips of the targets, and negatives: clips with labels that are neither targets nor kinds of them.

    Args:
        table: one row a clip, with the columns `filename` and `labels` (classes joined by ";").
        settings: what to choose.
        ontology: a clip with a label below a target in it is one of the target.

    Raises:
        UserError: an unknown target or one with too few clips, more negatives than there are, clips named twice.
    """
    _check_names(table["filename"])
    codes, cells = pd.factorize(table["labels"])
    targets = _find_targets(settings, list_classes(cells), ontology)
    direct, all_kinds = _find_cells(cells, targets, ontology)
    found = {target: np.flatnonzero(all_kinds[target][codes]) for target in targets}
    n_found = {target: len(rows) for target, rows in found.items()}
    targets = _check_counts(settings, n_found)
    is_target = np.zeros(len(table), bool)
    for target in targets:
        is_target[found[target]] = True
    is_labelled = np.array([bool(split_labels(cell)) for cell in cells])[codes]  # others may be of any class
    others = np.flatnonzero(~is_target & is_labelled)
    chosen = is_target.copy()
    if settings.balanced:
        chosen = _balance([found[target] for target in targets], table["filename"], settings.seed)
    default = min(n_found[target] for target in targets) if settings.balanced else int(chosen.sum())
    default *= bool(settings.labels)
    chosen[_draw_negatives(others, table["filename"], settings, default)] = True
    rows = np.flatnonzero(chosen)
    is_of = {target: all_kinds[target][codes[rows]] for target in targets}
    labels = _join(is_of, settings.negative_label)
    n_chosen = {target: int(mask.sum()) for target, mask in is_of.items()}
    classes = list(targets)
    if n_negatives := int((~is_target[rows]).sum()):
        classes.append(settings.negative_label)
        n_chosen[settings.negative_label] = n_negatives
    by_kind = {target: int((all_kinds[target] & ~direct[target])[codes].sum()) for target in targets}
    n_found = {target: n_found[target] for target in targets} | {settings.negative_label: len(others)}
    return Selection(rows, labels, classes, n_chosen, n_found, by_kind)


def _check_names(names: pd.Series) -> None:
    if names.empty:
        raise UserError("the list has no clips, so there is nothing to choose from")
    repeated = names[names.duplicated()]
    if len(repeated):
        raise UserError(
            f"rows with the name of an earlier row: {len(repeated)} ({some(repeated.unique(), 3)}); remove them, or "
            "join their labels by ';' in one row"
        )


def _find_targets(settings: SelectionSettings, classes: list[str], ontology: Ontology | None) -> list[str]:
    """Return the names of the targets."""
    if not classes:
        raise UserError("no clip of the list has a label, so there is nothing to choose by")
    targets = [display_name(label.strip()) for label in settings.labels] or classes
    known = set(classes) | set(ontology.children if ontology else ())
    for target in targets:
        if target not in known and other_name(target) is None:
            nearest = difflib.get_close_matches(target, classes, n=len(classes), cutoff=0)
            raise UserError(f"no clip has the label {target!r}{did_you_mean(target, known)}; labels: {some(nearest)}")
    twice = [target for target in targets if targets.count(target) > 1]
    if twice:
        raise UserError(f"the label {twice[0]!r} is given twice")
    if settings.negative_label in (*targets, ""):
        raise UserError(f"negatives cannot have the label {settings.negative_label!r}; choose another --negative_label")
    return targets


def _find_cells(
    cells: Sequence[str], targets: Sequence[str], ontology: Ontology | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return for each target which of the distinct cells name it, and which name it or a kind of it."""
    direct = {target: np.zeros(len(cells), bool) for target in targets}
    all_kinds = {target: np.zeros(len(cells), bool) for target in targets}
    above: dict[str, list[str]] = {}
    for target in targets:
        for name in {target} | (ontology.descendants(target) if ontology else set()):
            above.setdefault(name, []).append(target)
            if mid := other_name(name):
                above.setdefault(mid, []).append(target)
    for number, cell in enumerate(cells):
        for label in split_labels(cell):
            for target in above.get(label, ()):
                all_kinds[target][number] = True
                if label == target or display_name(label) == target:
                    direct[target][number] = True
    return direct, all_kinds


def _check_counts(settings: SelectionSettings, n_found: Mapping[str, int]) -> list[str]:
    """Return the targets with enough clips; raise if one that was given has too few."""
    few = {target: n for target, n in n_found.items() if n < settings.min_clips}
    if few and settings.labels:
        target, n = next(iter(few.items()))
        more = f" (and too few of {len(few) - 1} more labels)" if len(few) > 1 else ""
        raise UserError(
            f"clips of {target!r} in the list: {n}{more}; expected at least {settings.min_clips} (--min_clips)"
        )
    targets = [target for target in n_found if target not in few]
    if not targets:
        raise UserError(f"none of the {len(n_found)} labels has {settings.min_clips} clips (--min_clips)")
    return targets


def _balance(rows_of: Sequence[np.ndarray], names: pd.Series, seed: int) -> np.ndarray:
    """Return which clips to take so that each target has as many as the rarest one, bool (N,).

    A clip of several targets counts for all of them; a target may have more by clips that were taken for others.
    """
    fewest = min(map(len, rows_of))
    chosen = np.zeros(len(names), bool)
    for rows in sorted(rows_of, key=len):
        remaining = rows[~chosen[rows]]
        missing = fewest - (len(rows) - len(remaining))
        chosen[_draw(remaining, names, max(missing, 0), seed)] = True
    return chosen


def _draw_negatives(others: np.ndarray, names: pd.Series, settings: SelectionSettings, default: int) -> np.ndarray:
    n = min(default, len(others)) if settings.negatives is None else settings.negatives
    if n > len(others):
        raise UserError(
            f"{n:,} negatives are to be drawn, but only {len(others):,} of the {len(names):,} clips have other labels "
            "alone; give fewer with --negatives"
        )
    return _draw(others, names, n, settings.seed)


def _draw(rows: np.ndarray, names: pd.Series, n: int, seed: int) -> np.ndarray:
    """Return `n` of the rows, the same whatever their order."""
    if n >= len(rows):
        return rows
    order = compute_order(names.iloc[rows].tolist(), seed)
    return rows[np.argpartition(order, n)[:n]]


def _join(is_of: Mapping[str, np.ndarray], negative_label: str) -> list[str]:
    """Return the labels of each row, joined by ";"."""
    labels = np.full(len(next(iter(is_of.values()))), "", dtype=object)
    for target, mask in is_of.items():
        labels[mask] = [f"{label}{SEPARATOR}{target}" if label else target for label in labels[mask]]
    labels[labels == ""] = negative_label
    return labels.tolist()
