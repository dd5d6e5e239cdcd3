"""Holding out clips for validation: deterministic, stratified by class, with groups kept together."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from audio.dataset import Pack
from audio.manifest import GROUP_COLUMNS


def find_groups(pack: Pack, columns: Sequence[str] = GROUP_COLUMNS) -> tuple[str | None, np.ndarray]:
    """Return the first column that names groups, and the group of each clip, str (N,); without one, each is its own."""
    alone = np.array([f"row {row}" for row in range(len(pack))])
    for column in columns:
        if column in pack.table:
            cells = pack.table[column].astype(str).str.strip().to_numpy(dtype=str)
            groups = np.where(cells == "", alone, cells)
            if 1 < len(np.unique(groups)) < len(groups):
                return column, groups
    return None, alone


def hold_out(
    names: Sequence[str],
    labels: Sequence[np.ndarray],
    num_classes: int,
    fraction: float,
    groups: Sequence[str] | None = None,
    *,
    spare_single_clips: bool = True,
) -> np.ndarray:
    """Choose clips to hold out, independently of their order in the list.

    Groups are sorted by the rarest class of their clips, then by the hash of their names, and one is held out if that
    brings the share of held clips nearest to `fraction`. Of few large groups, the smallest is held out.

    Args:
        names: names of N clips.
        labels: class indices of each clip, int; empty without labels.
        num_classes: C.
        fraction: share of the clips to hold out.
        groups: group of each clip, held out as a whole or not at all; None if each clip is its own.
        spare_single_clips: do not hold out a group if a class would have no other clip to learn from; there may be no
            clip to hold out then.

    Returns:
        bool (N,).
    """
    held = np.zeros(len(names), bool)
    keys = names if groups is None else groups
    members: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    if fraction <= 0 or len(members) < 2:
        return held
    remaining = np.bincount(np.concatenate([*labels, np.empty(0, np.int64)]).astype(np.int64), minlength=num_classes)
    rarest = [int(classes[remaining[classes].argmin()]) if len(classes) else -1 for classes in labels]
    first = {key: _most_frequent([rarest[row] for row in rows]) for key, rows in members.items()}
    order = sorted(members, key=lambda key: (first[key], hashlib.sha256(key.encode()).hexdigest()))
    n_seen = n_held = 0
    for key in order:
        n_seen += len(members[key])
        nearer = n_held + len(members[key]) / 2 <= fraction * n_seen
        if nearer and (not spare_single_clips or _deduct(members[key], labels, remaining)):
            held[members[key]] = True
            n_held += len(members[key])
    if not n_held:
        smallest = min(map(len, members.values()))
        candidates = [key for key in order if len(members[key]) == smallest]
        rows = members[candidates[len(candidates) // 2]]
        held[rows] = not spare_single_clips or _deduct(rows, labels, remaining)
    return held


def _most_frequent(classes: list[int]) -> int:
    """Return the class that occurs most often, the lowest one of equals."""
    return min(Counter(classes).items(), key=lambda entry: (-entry[1], entry[0]))[0]


def _deduct(rows: list[int], labels: Sequence[np.ndarray], remaining: np.ndarray) -> bool:
    """Subtract the labels of some clips from `remaining` (C,), unless a class would have none; return whether."""
    counts = Counter(int(index) for row in rows for index in labels[row])
    if any(remaining[index] <= count for index, count in counts.items()):
        return False
    for index, count in counts.items():
        remaining[index] -= count
    return True
