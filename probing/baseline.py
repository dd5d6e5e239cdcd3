"""The baseline of simple features on the clips of a probe."""

import logging

import numpy as np

from audio.dataset import Pack
from common.errors import UserError
from probing.data import ProbeSet
from training.baseline import MAX_CLIPS, fit_baseline, fits_in_seconds
from training.labelled import LabelledPack

logger = logging.getLogger(__name__)


def fit_baselines(clips: ProbeSet) -> float | None:
    """Return the figure of `training.baseline` on the test clips, or on the clips of all folds.

    Args:
        clips: of a probe.

    Returns:
        Accuracy if every clip has one label, otherwise mAP; the mean over folds, weighted by their clips. None if it
        would take more than seconds or fails, which is logged.
    """
    hours = sum(float((pack.n_samples / pack.sample_rate).sum()) for pack in clips.packs.values()) / 3600
    n_folds = 1 if clips.folds is None else len(set(clips.folds.tolist()))
    n_clips = sum(min(len(pack), MAX_CLIPS) for pack in clips.packs.values())
    if not fits_in_seconds(n_clips * n_folds, hours * n_folds, max(pack.sample_rate for pack in clips.packs.values())):
        logger.info("no baseline: so much sound takes more than seconds; use scripts/baseline.py")
        return None
    packs = {part: _label(pack, clips.targets[part]) for part, pack in clips.packs.items()}
    try:
        if clips.folds is None:
            return fit_baseline(packs["train"], packs["test"], packs.get("valid")).value
        values, sizes = [], []
        for fold in np.unique(clips.folds):
            tested = clips.folds == fold
            data, targets = clips.packs["data"], clips.targets["data"]
            train, test = (_label(data.subset(np.flatnonzero(rows)), targets[rows]) for rows in (~tested, tested))
            values.append(fit_baseline(train, test).value)
            sizes.append(int(tested.sum()))
        return float(np.average(values, weights=sizes))
    except UserError as error:
        logger.info("no baseline: %s", error)
        return None


def _label(pack: Pack, targets: np.ndarray) -> LabelledPack:
    return LabelledPack(pack, [np.flatnonzero(row) for row in targets], targets.shape[1])
