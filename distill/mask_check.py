"""How much of each clip its masks hide, and whether that leaves enough to learn from."""

from dataclasses import dataclass

import numpy as np

from distill.replay import (
    REFERENCE_BANDS,
    REFERENCE_HOP_SECONDS,
    FrequencyMasking,
    Replay,
    TimeMasking,
    reference_frames,
)

MOST_MASKED = 1 / 3  # of the frames: more than this on average is refused, of a single clip it is warned of
SUGGESTED_SHARE = 0.2  # max_share of the messages


@dataclass(frozen=True)
class MaskedShares:
    """What the time masks of an augmentation hide of M clips.

    A mask is v * limit frames wide, v uniform from 0 to 1; masks of one clip share their draws and lie within the
    widest, which alone counts.

    Attributes:
        n_frames: (M,) frames of each clip on the reference grid.
        limits: (M,) the widest mask that each clip can get, in frames.
    """

    n_frames: np.ndarray
    limits: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """The mean share of each clip that is masked, E[min(1, v * limit / n)], (M,)."""
        widest = self.limits / self.n_frames
        return np.where(widest <= 1, widest / 2, 1 - 0.5 / np.maximum(widest, 1))

    @property
    def largest(self) -> np.ndarray:
        """The largest share of each clip that can be masked, (M,)."""
        return np.minimum(1, self.limits / self.n_frames)

    @property
    def mean(self) -> float:
        """The expected share, averaged over the clips."""
        return float(self.expected.mean()) if len(self.n_frames) else 0.0


@dataclass(frozen=True)
class MaskFindings:
    """What is wrong with masks for clips of given lengths: at most one of the two is there.

    Attributes:
        fault: a sentence where training would see too little, else None.
        warning: a sentence where single clips can lose too much, or where stored targets cannot be changed.
    """

    fault: str | None = None
    warning: str | None = None


def masked_shares(replay: Replay, n_reference: np.ndarray) -> MaskedShares:
    """Return what the time masks of `replay` hide of clips of `n_reference` samples (M,) at the reference rate."""
    n_frames = reference_frames(np.asarray(n_reference, np.int64))
    limits = np.zeros(len(n_frames))
    for mask in replay.masks:
        if isinstance(mask, TimeMasking):
            share = np.inf if mask.max_share is None else mask.max_share
            limits = np.maximum(limits, np.minimum(mask.param, share * n_frames))
    return MaskedShares(n_frames, limits)


def check_masks(replay: Replay, n_reference: np.ndarray, store: str | None = None) -> MaskFindings:
    """See whether masks leave enough of the clips.

    More than a third of the frames (or bands) on average is a fault; that a single clip can lose more than a third is
    a warning. A circular shift loses nothing.

    Args:
        replay: the augmentation.
        n_reference: (M,) lengths of the clips in samples at the reference rate.
        store: the folder of stored targets that the augmentation belongs to, which a training configuration cannot
            change: what would be a fault is a warning then. None for an augmentation that is yet to be used.
    """
    shares = masked_shares(replay, n_reference)
    too_much = shares.mean > MOST_MASKED
    n_affected = int((shares.largest > MOST_MASKED).sum())
    bands = max((_band_share(mask) for mask in replay.masks if isinstance(mask, FrequencyMasking)), default=0.0)
    sentences = [_describe_time_masks(shares)] if too_much or n_affected else []
    remedies = [_suggest_time_mask(replay, shares)] if too_much or n_affected else []
    if bands / 2 > MOST_MASKED:
        sentences.append(f"FrequencyMasking hides up to {bands:.0%} of the bands, {bands / 2:.0%} on average")
        remedies.append("`max_share: 0.25` among the arguments of FrequencyMasking")
    if not sentences:
        return MaskFindings()
    found = "; ".join(sentences)
    if store is not None:
        return MaskFindings(
            warning=f"the targets of {store} were stored with masks that suit longer clips: {found}. A training "
            f"configuration cannot change the masks of stored targets: make them again, by save_logits.py with "
            f"{' and '.join(remedies)}"
        )
    remedy = f"write {' and '.join(remedies)}"
    if too_much or bands / 2 > MOST_MASKED:
        return MaskFindings(fault=f"spectransforms: {found}; too little is left to learn from: {remedy}")
    return MaskFindings(warning=f"spectransforms: {found}; to limit the mask to a part of each clip, {remedy}")


def _band_share(mask: FrequencyMasking) -> float:
    return min(mask.param / REFERENCE_BANDS, 1 if mask.max_share is None else mask.max_share)


def _describe_time_masks(shares: MaskedShares) -> str:
    """Say how long masks and clips are, and what is hidden of how many."""
    seconds = shares.n_frames * REFERENCE_HOP_SECONDS
    n_clips, n_vanishing = len(seconds), int((shares.largest >= 1).sum())
    n_affected = int((shares.largest > MOST_MASKED).sum())
    vanishing = f", {n_vanishing} of them whole" if n_vanishing else ""
    return (
        f"TimeMasking hides up to {shares.limits.max() * REFERENCE_HOP_SECONDS:.2f} s of {n_clips} clips, which are "
        f"{np.median(seconds):.2f} s long in the median and {seconds.min():.2f} s at least: {shares.mean:.0%} of their "
        f"frames on average, and of {n_affected} clips it can hide more than a third{vanishing}"
    )


def _suggest_time_mask(replay: Replay, shares: MaskedShares) -> str:
    """Say what to write in place of the widest time mask."""
    param = max(mask.param for mask in replay.masks if isinstance(mask, TimeMasking))
    shorter = max(1, int(SUGGESTED_SHARE * np.median(shares.n_frames)))
    smaller = f", or a time_mask_param of at most {shorter}" if shorter < param else ""
    return f"`TimeMasking: {{time_mask_param: {param}, max_share: {SUGGESTED_SHARE}}}`{smaller}"
