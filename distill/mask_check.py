"""Check that masks leave enough of each clip."""

from dataclasses import dataclass

import numpy as np

from distill.replay import (
    REFERENCE_BANDS,
    REFERENCE_HOP_SECONDS,
    FrequencyMasking,
    Replay,
    TimeMasking,
    count_reference_frames,
)

MAX_MASKED = 1 / 3  # of the frames: more on average is a fault, more of a single clip a warning
SUGGESTED_SHARE = 0.2  # max_share in messages


@dataclass(frozen=True)
class MaskedShares:
    """The shares of M clips that the time masks of an augmentation cover.

    A mask is v * limit frames wide, v uniform from 0 to 1; masks of one clip share their draws, so that the
    widest contains the others.

    Attributes:
        n_frames: (M,) frames of each clip on the reference grid.
        limits: (M,) width of the widest possible mask of each clip, in frames.
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
    """Result of a check of masks for clips of given lengths: at most one of the two is set.

    Attributes:
        fault: message if too little is left for training, else None.
        warning: message if single clips can lose too much, or if the masks are those of stored targets.
    """

    fault: str | None = None
    warning: str | None = None


def compute_masked_shares(replay: Replay, n_reference: np.ndarray) -> MaskedShares:
    """Return the masked shares of clips of `n_reference` samples (M,) at the reference rate."""
    n_frames = count_reference_frames(np.asarray(n_reference, np.int64))
    limits = np.zeros(len(n_frames))
    for mask in replay.masks:
        if isinstance(mask, TimeMasking):
            share = np.inf if mask.max_share is None else mask.max_share
            limits = np.maximum(limits, np.minimum(mask.param, share * n_frames))
    return MaskedShares(n_frames, limits)


def check_masks(replay: Replay, n_reference: np.ndarray, store: str | None = None) -> MaskFindings:
    """Check that masks leave enough of the clips.

    More than a third of the frames (or bands) on average is a fault, more than a third of a single clip a warning. A
    circular shift loses nothing.

    Args:
        replay: the augmentation.
        n_reference: (M,) lengths of the clips in samples at the reference rate.
        store: the folder of stored targets that the augmentation belongs to, which a training configuration cannot
            change: a fault is then a warning. None for a new augmentation.
    """
    shares = compute_masked_shares(replay, n_reference)
    too_much = shares.mean > MAX_MASKED
    n_affected = int((shares.largest > MAX_MASKED).sum())
    bands = max((_band_share(mask) for mask in replay.masks if isinstance(mask, FrequencyMasking)), default=0.0)
    sentences = [_describe_time_masks(shares)] if too_much or n_affected else []
    remedies = [_suggest_time_mask(replay, shares)] if too_much or n_affected else []
    if bands / 2 > MAX_MASKED:
        sentences.append(f"FrequencyMasking masks up to {bands:.0%} of the bands, {bands / 2:.0%} on average")
        remedies.append("`max_share: 0.25` among the arguments of FrequencyMasking")
    if not sentences:
        return MaskFindings()
    found = "; ".join(sentences)
    if store is not None:
        return MaskFindings(
            warning=f"the targets of {store} were stored with masks for longer clips: {found}. A training "
            f"configuration cannot change the masks of stored targets: store them again, by save_logits.py with "
            f"{' and '.join(remedies)}"
        )
    remedy = f"write {' and '.join(remedies)}"
    if too_much or bands / 2 > MAX_MASKED:
        return MaskFindings(fault=f"spectransforms: {found}; too little is left for training: {remedy}")
    return MaskFindings(warning=f"spectransforms: {found}; to limit the mask to a part of each clip, {remedy}")


def _band_share(mask: FrequencyMasking) -> float:
    return min(mask.param / REFERENCE_BANDS, 1 if mask.max_share is None else mask.max_share)


def _describe_time_masks(shares: MaskedShares) -> str:
    """Describe the lengths of masks and clips, and the masked shares."""
    seconds = shares.n_frames * REFERENCE_HOP_SECONDS
    n_clips, n_vanishing = len(seconds), int((shares.largest >= 1).sum())
    n_affected = int((shares.largest > MAX_MASKED).sum())
    vanishing = f", {n_vanishing} of them whole" if n_vanishing else ""
    return (
        f"TimeMasking masks up to {shares.limits.max() * REFERENCE_HOP_SECONDS:.2f} s of {n_clips} clips, which are "
        f"{np.median(seconds):.2f} s long in the median and {seconds.min():.2f} s at least: {shares.mean:.0%} of their "
        f"frames on average, and more than a third of {n_affected} clips can be masked{vanishing}"
    )


def _suggest_time_mask(replay: Replay, shares: MaskedShares) -> str:
    """Return the suggested arguments of the widest time mask."""
    param = max(mask.param for mask in replay.masks if isinstance(mask, TimeMasking))
    shorter = max(1, int(SUGGESTED_SHARE * np.median(shares.n_frames)))
    smaller = f", or a time_mask_param of at most {shorter}" if shorter < param else ""
    return f"`TimeMasking: {{time_mask_param: {param}, max_share: {SUGGESTED_SHARE}}}`{smaller}"
