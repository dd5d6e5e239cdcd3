"""Fitting and testing the heads of a probe: one for each fold, or one on a training part.

Letters: N clips, C classes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audio.dataset import Pack
from models.other_heads import NeighbourHead
from probing.data import ProbeSet, make_sort_key
from probing.fit import Examples, FitSettings, FittedHead, fit, predict
from training.baseline import Metric, get_value
from training.holdout import find_groups, hold_out
from training.metrics import evaluate_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One head that was fitted and tested: that of a fold, or the only one.

    Attributes:
        name: of the fold.
        fitted: the head.
        rows: of the test clips among all tested clips.
        scores: probabilities (N,C) of these.
        valid: validation clips, of the training part; None if the head was fitted without.
    """

    name: str
    fitted: FittedHead
    rows: np.ndarray
    scores: np.ndarray
    valid: Examples | None = None


def run_trials(
    examples: dict[str, Examples],
    clips: ProbeSet,
    valid_fraction: float,
    settings: FitSettings,
    device: torch.device,
) -> tuple[list[Trial], FittedHead]:
    """Fit and test every head; test clips are used neither for training nor for early stopping.

    Args:
        examples: of each pack of `clips`.
        clips: their labels and folds.
        valid_fraction: part of the training clips that is held out for early stopping, without a pack of such clips.
        settings: of the fits.
        device: to compute on.

    Returns:
        A trial for each fold, or the only one; and the head to keep: without folds that of the trial, else another one,
        fitted to all clips.
    """
    groups = _find_groups(clips.packs.get(clips.train_part))

    def fit_head(train: Examples, valid: Examples | None) -> tuple[FittedHead, Examples | None]:
        if valid is None and settings.kind != NeighbourHead.kind:  # which has no epochs
            labels = [np.flatnonzero(row) for row in train.targets]
            train_groups = None if groups is None else [groups[name] for name in train.names]
            held = hold_out(train.names, labels, train.targets.shape[1], valid_fraction, train_groups)
            train, valid = train.take(~held), train.take(held)
        return fit(train, valid, clips.labels, clips.single, settings, device), valid or None

    if clips.folds is None:
        fitted, valid = fit_head(examples["train"], examples.get("valid"))
        test = examples["test"]
        return [Trial("test", fitted, np.arange(len(test)), predict(fitted.head, test), valid)], fitted
    data, trials = examples["data"], []
    for name in sorted(set(clips.folds.tolist()), key=make_sort_key):
        tested = clips.folds == name
        fitted, valid = fit_head(data.take(~tested), None)
        trials.append(Trial(name, fitted, np.flatnonzero(tested), predict(fitted.head, data.take(tested)), valid))
        logger.info("fold %s: %d clips, best of %d epochs: %d", name, tested.sum(), fitted.n_epochs, fitted.best_epoch)
    return trials, fit_head(data, None)[0]


def collect_scores(trials: Sequence[Trial], targets: np.ndarray) -> np.ndarray:
    """Return the probabilities of all tested clips, as `targets` (N,C) in shape and type."""
    scores = np.empty_like(targets)
    for trial in trials:
        scores[trial.rows] = trial.scores
    return scores


def _find_groups(pack: Pack | None) -> dict[str, str] | None:
    """Return the group of each clip by its name; None without a column of groups."""
    if pack is None:
        return None
    column, groups = find_groups(pack)
    return None if column is None else {name: str(group) for name, group in zip(pack.names, groups, strict=True)}


def describe_trial(trial: Trial, targets: np.ndarray, labels: list[str], metric: Metric) -> dict[str, Any]:
    """Return the facts of a trial as plain values."""
    names = ("n_train", "n_valid", "best_epoch", "n_epochs", "valid_loss")
    facts = {name: getattr(trial.fitted, name) for name in names}
    value = get_value(evaluate_scores(trial.scores, targets[trial.rows], labels), metric)
    return {"fold": trial.name, "n_test": len(trial.rows), **facts, "value": value}


def count_training_clips(clips: ProbeSet) -> int:
    """Return the number of clips that the smallest training set of a probe has."""
    if clips.folds is None:
        return len(clips.targets["train"])
    return len(clips.folds) - int(np.unique(clips.folds, return_counts=True)[1].max())
