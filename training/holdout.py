"""Clips held out for validation: the same in every run, and of every class its share."""

import hashlib
from collections.abc import Sequence

import numpy as np


def hold_out(
    names: Sequence[str],
    labels: Sequence[np.ndarray],
    num_classes: int,
    fraction: float,
    *,
    spare_single_clips: bool = True,
) -> np.ndarray:
    """Choose clips to hold out, in whatever order they are listed.

    Clips are sorted by their rarest class, then by the hash of their names, and taken at even distances.

    Args:
        names: of N clips.
        labels: class indices of each clip, int; empty ones where there are no labels.
        num_classes: C.
        fraction: of the clips to hold out.
        spare_single_clips: leave a clip where a class would have no other to learn from; then there may be none to
            hold out.

    Returns:
        bool (N,).
    """
    n_clips = len(names)
    held = np.zeros(n_clips, bool)
    if fraction <= 0 or n_clips < 2:
        return held
    remaining = np.bincount(np.concatenate([*labels, np.empty(0, np.int64)]).astype(np.int64), minlength=num_classes)
    rarest = [int(classes[remaining[classes].argmin()]) if len(classes) else -1 for classes in labels]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    order = np.array(sorted(range(n_clips), key=lambda row: (rarest[row], hashes[row])))
    quota = np.floor(np.arange(n_clips + 1) * fraction + 0.5)
    chosen = order[np.diff(quota) > 0]
    for row in chosen if len(chosen) else order[n_clips // 2 :][:1]:
        if not spare_single_clips or (remaining[labels[row]] > 1).all():
            held[row] = True
            remaining[labels[row]] -= 1
    return held
