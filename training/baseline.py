"""The baseline: scikit-learn models on simple statistics of the spectrogram, fitted in seconds.

Mean and standard deviation over time of 40 log-mels or 20 MFCCs, of the whole clip or of each of four equal parts of
it, are standardised and classified by a logistic regression (C = 1) or by a support vector machine with an RBF kernel
(C = 10): eight variants. The variant is chosen without the test data: on the validation clips if there are any,
otherwise by cross-validation of the training clips. It is then fitted to all of them, validation clips included, and
evaluated on the test clips once. There is no randomness, and everything runs in one thread, so that the results for
the same data are bit-identical.

Letters: N clips, C classes, D features.
"""

import hashlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from audio.dataset import Pack
from audio.labels import parse_labels
from audio.manifest import GROUP_COLUMNS
from common.errors import UserError
from common.files import write_json
from training.baseline_features import FeatureTable, compute_features
from training.baseline_variants import VARIANTS, Variant, affordable_variants, class_scores
from training.data import TrainingData
from training.holdout import find_groups
from training.labelled import LabelledPack
from training.metrics import Metrics, evaluate_scores

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "mAP"]

MAX_CLIPS, MAX_VALID_CLIPS = 4000, 1000  # for fitting, and for choosing a variant
TRAIN_HOURS = 10.0  # of sound that are read for training; only parts of very long clips are read
MIN_SECONDS, MAX_SECONDS = 10.0, 600.0  # that are read of a longer clip, depending on the number of clips
FIT_CLIPS, FIT_HOURS = 40_000, 40.0  # for `fits_in_seconds`: a core reads an hour at 16 kHz in about a second
FEW_CLIPS = 1000  # five folds for up to so many clips, otherwise three
SPLIT_COLUMNS = (*GROUP_COLUMNS, "fold")  # clips with the same value are never on both sides of a split
SEED = 0  # of the folds


@dataclass(frozen=True)
class Baseline:
    """The result of the baseline.

    Attributes:
        variant: the chosen variant.
        metric: "accuracy" if each test clip has exactly one label, otherwise "mAP".
        metrics: its metrics on the test clips.
        scores: (N,C) of the test clips; higher means more likely.
        choice_metric: the metric that it was chosen by.
        choices: the variants that were compared and their values, in the order of `VARIANTS`; nan if there were too few
            clips to compare them.
        n_fitted: number of clips that it was fitted to.
        notes: how it was chosen and what was limited, as parts of a sentence.
        seconds: duration of everything.
    """

    variant: Variant
    metric: Metric
    metrics: Metrics
    scores: np.ndarray
    choice_metric: Metric
    choices: list[tuple[Variant, float]]
    n_fitted: int
    notes: list[str]
    seconds: float

    @property
    def value(self) -> float:
        """The value of `metric`."""
        return get_value(self.metrics, self.metric)

    @property
    def sentence(self) -> str:
        """The result in one line of text."""
        result = _format(self.metrics, self.metric)
        if self.metric == "accuracy":
            result += f" (mAP {self.metrics.mAP:.4f})"
        seconds = f"{self.seconds:.1f}" if self.seconds < 10 else f"{self.seconds:.0f}"
        fitted = f"fitted to {self.n_fitted:,} clips in {seconds} s"
        return "; ".join([f"baseline: {self.variant}, {result}, {fitted}", *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the scores, for JSON."""
        return {
            "sentence": self.sentence,
            "variant": vars(self.variant),
            "metric": self.metric,
            "value": self.value,
            "choice_metric": self.choice_metric,
            "choices": [vars(v) | {"value": None if np.isnan(value) else value} for v, value in self.choices],
            "clips_fitted": self.n_fitted,
            "notes": self.notes,
            "seconds": round(self.seconds, 2),
            "metrics": self.metrics.as_dict(),
        }


def get_value(metrics: Metrics, metric: str) -> float:
    """Return `metric`, "accuracy" or "mAP", of an evaluation."""
    value = metrics.top1 if metric == "accuracy" else metrics.mAP
    assert value is not None
    return value


def _format(metrics: Metrics, metric: str) -> str:
    value = get_value(metrics, metric)
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"mAP {value:.4f}"


def fits_in_seconds(n_clips: int, hours: float, sample_rate: int = 16000) -> bool:
    """Return whether data are small enough for a baseline after a training run: at most a minute on one core.

    Args:
        n_clips: number of training clips used (`MAX_CLIPS` at most) and of all test clips.
        hours: their total length.
        sample_rate: of the pack; the time is proportional to it.
    """
    return n_clips <= FIT_CLIPS and hours * sample_rate / 16000 <= FIT_HOURS


def fit_baseline(train: LabelledPack, test: LabelledPack, valid: LabelledPack | None = None) -> Baseline:
    """Choose a variant, fit it and evaluate it; see the docstring of this module.

    Of more than `MAX_CLIPS` training clips a subset is used, chosen by the hash of their names, class by class. Of very
    long clips about `TRAIN_HOURS` in total are read, as short segments spread over each clip. With many clips or
    classes fewer variants are compared. `Baseline.notes` has these limits.

    Args:
        train: for fitting, and for choosing if there are no validation clips.
        test: for the evaluation; its labels are not used before.
        valid: for choosing, and then for fitting.

    Raises:
        UserError: the packs have different sample rates or numbers of classes.
    """
    start_time = time.perf_counter()
    packs = [train, test, *([valid] if valid else [])]
    for values, what in (
        ({part.pack.sample_rate: str(part.pack.manifest) for part in packs}, "sample rate in Hz"),
        ({part.num_classes: str(part.pack.manifest) for part in packs}, "number of classes"),
    ):
        if len(values) > 1:
            found = ", ".join(f"{value} in {name}" for value, name in sorted(values.items()))
            raise UserError(f"the packs of a baseline must have the same {what}; found {found}")
    with _single_thread():
        return _fit_baseline(train, test, valid, start_time)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Make sums independent of the machine: the libraries split them by the number of their threads."""
    from threadpoolctl import threadpool_limits

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threadpoolctl does not reach the MKL of PyTorch
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(n_threads)


def _fit_baseline(train: LabelledPack, test: LabelledPack, valid: LabelledPack | None, start_time: float) -> Baseline:
    notes: list[str] = []
    train = _reduce(train, MAX_CLIPS, "training", notes)
    most_seconds = limit_seconds(len(train.pack))
    longest = max(int(part.pack.n_samples.max()) for part in (train, test)) / test.pack.sample_rate
    if longest > most_seconds:
        notes.append(f"of clips longer than {most_seconds:.0f} s about so much is read, in segments spread over them")
    features, targets = compute_features(train.pack, most_seconds), train.multi_hot()
    if valid is None:
        column, groups = find_groups(train.pack, SPLIT_COLUMNS)
        splits = list(_folds(train, groups))
        how = f"by {len(splits)}-fold cross-validation of the training clips"
        how += f", each `{column}` in one fold" if column else ""
    else:
        valid = _reduce(valid, MAX_VALID_CLIPS, "validation", notes)
        valid_features = compute_features(valid.pack, most_seconds)
        features = {key: np.concatenate([table, valid_features[key]]) for key, table in features.items()}
        targets = np.concatenate([targets, valid.multi_hot()])
        splits = [np.arange(len(targets)) >= len(train.pack)]
        how = f"on {len(valid.pack):,} validation clips, which are then used for fitting as well"

    single = bool((targets.sum(axis=1) == 1).all())
    choice_metric: Metric = "accuracy" if single else "mAP"
    n_classes = int(targets.any(axis=0).sum())
    variants = affordable_variants(len(targets), n_classes, single)
    values = [_score_splits(variant, features, targets, splits, choice_metric) for variant in variants]
    chosen = variants[int(np.argmax(np.nan_to_num(values)))]  # the first of equals
    if not splits:
        how = f"the first of {len(variants)} variants: there are too few clips to compare them"
    else:
        how = f"chosen of {len(variants)} variants {how}"
    if len(variants) < len(VARIANTS):
        models = "logistic regression" + (" on whole clips" if all(v.parts == 1 for v in variants) else "")
        notes.append(f"only {models} was fitted, since there are {n_classes:,} classes of {len(targets):,} clips")

    key = (chosen.spectrum, chosen.parts)
    test_features = compute_features(test.pack, most_seconds)[key]
    scores = class_scores(chosen, features[key], targets, test_features, single=single)
    metrics = evaluate_scores(scores, test.multi_hot())
    return Baseline(
        variant=chosen,
        metric="mAP" if metrics.top1 is None else "accuracy",
        metrics=metrics,
        scores=scores,
        choice_metric=choice_metric,
        choices=list(zip(variants, values, strict=True)),
        n_fitted=len(targets),
        notes=[how, *notes],
        seconds=time.perf_counter() - start_time,
    )


def _reduce(data: LabelledPack, max_clips: int, what: str, notes: list[str]) -> LabelledPack:
    if len(data.pack) > max_clips:
        notes.append(f"{max_clips:,} of {len(data.pack):,} {what} clips were used, chosen by the hash of their names")
    return thin_out(data, max_clips)


def limit_seconds(n_clips: int) -> float:
    """Return how many seconds of a longer clip are read, for a number of training clips."""
    return min(max(TRAIN_HOURS * 3600 / n_clips, MIN_SECONDS), MAX_SECONDS)


def _strata(data: LabelledPack) -> np.ndarray:
    """Return the rarest class of each clip (N,), for stratification."""
    counts = np.bincount(np.concatenate(data.labels), minlength=data.num_classes)
    return np.array([indices[counts[indices].argmin()] for indices in data.labels])


def thin_out(data: LabelledPack, max_clips: int) -> LabelledPack:
    """Return a stratified subset of a pack, independent of the order of its clips.

    Args:
        data: N clips.
        max_clips: number of clips to keep; with fewer classes than that, each keeps at least one clip.
    """
    if len(data.pack) <= max_clips:
        return data
    digests = (hashlib.sha256(name.encode()).digest() for name in data.pack.names)
    hashes = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    strata = _strata(data)
    sizes = np.bincount(strata)
    order = np.lexsort((hashes, strata))
    place = np.empty(len(strata))  # of a clip within its class
    place[order] = np.arange(len(strata)) - (np.cumsum(sizes) - sizes)[strata[order]]
    rows = np.sort(np.lexsort((hashes, place / sizes[strata]))[:max_clips])
    return LabelledPack(data.pack.subset(rows), [data.labels[row] for row in rows], data.num_classes)


def _folds(data: LabelledPack, groups: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the clips of each fold, bool (N,), stratified by class, with groups kept together; none for few clips."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    strata, n_groups = _strata(data), len(np.unique(groups))
    n_folds = min(5 if len(strata) <= FEW_CLIPS else 3, int(np.bincount(strata).max()), n_groups)
    if n_folds < 2:
        return
    kind = StratifiedKFold if n_groups == len(groups) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer clips than folds do no harm
        for _, rows in kind(n_folds, shuffle=True, random_state=SEED).split(strata, strata, groups):
            if 0 < len(rows) < len(strata):  # large groups may leave a fold empty
                yield np.isin(np.arange(len(strata)), rows)


def _score_splits(
    variant: Variant, features: FeatureTable, targets: np.ndarray, splits: list[np.ndarray], metric: Metric
) -> float:
    """Return the mean value of a variant over splits, weighted by their sizes; nan without any split."""
    table = features[variant.spectrum, variant.parts]
    values, sizes = [], []
    for held in splits:
        single = metric == "accuracy"
        scores = class_scores(variant, table[~held], targets[~held], table[held], single=single)
        values.append(get_value(evaluate_scores(scores, targets[held]), metric))
        sizes.append(int(held.sum()))
    return float(np.average(values, weights=sizes)) if values else float("nan")


def training_packs(data: TrainingData) -> tuple[LabelledPack, LabelledPack, LabelledPack | None]:
    """Return the training, test and validation clips of a run, for `fit_baseline`.

    Validation clips that are held out of the training pack are part of the training clips here.

    Raises:
        UserError: there are no evaluation data or labels, or they are too large to be read in seconds.
    """
    pack, test, valid = data.pack, data.evaluation, data.valid
    if test is None:
        raise UserError("there are no evaluation data")
    if "labels" not in pack.table:
        raise UserError(f"{pack.manifest} has no `labels` column")
    n_fitted = min(len(pack), MAX_CLIPS)
    too_large = UserError(
        f"{len(pack):,} training and {len(test.pack):,} test clips are too many; use scripts/baseline.py"
    )
    # The test clips come first, which avoids reading the labels of millions of training clips.
    test_hours = _hours_read(test.pack, n_fitted) if len(test.pack) <= FIT_CLIPS else math.inf
    if not fits_in_seconds(n_fitted + len(test.pack), test_hours, pack.sample_rate):
        raise too_large
    try:
        labels = parse_labels(pack.table["labels"], data.labels, pack.names)
    except UserError:
        raise UserError(f"the labels of {pack.manifest} are not all classes of this run") from None
    train = LabelledPack(pack, labels, len(data.labels))
    train_hours = _hours_read(thin_out(train, MAX_CLIPS).pack, n_fitted)
    if not fits_in_seconds(n_fitted + len(test.pack), train_hours + test_hours, pack.sample_rate):
        raise too_large
    if valid is test or (valid is not None and valid.pack.manifest == pack.manifest):
        valid = None
    return train, test, valid


def _hours_read(pack: Pack, n_fitted: int) -> float:
    seconds = np.minimum(pack.n_samples / pack.sample_rate, limit_seconds(n_fitted))
    return float(seconds.sum()) / 3600


def add_baseline(data: TrainingData, metrics: Metrics, folder: Path) -> Baseline | None:
    """Fit the baseline of a finished run, log it and write `baseline.json`; errors are logged and never end the run.

    Args:
        data: data of the run.
        metrics: metrics of the final model on the evaluation data.
        folder: folder of the run.
    """
    try:
        baseline = fit_baseline(*training_packs(data))
        write_json(folder / "baseline.json", baseline.as_dict())
    except UserError as error:
        logger.info("no baseline: %s", error)
        return None
    except Exception as error:
        logger.warning("no baseline: it failed (%s: %s)", type(error).__name__, error)
        logger.debug("", exc_info=True)
        return None
    logger.info("%s", baseline.sentence)
    if warning := compare_with_baseline(metrics, baseline):
        logger.warning("%s", warning)
    return baseline


def compare_with_baseline(metrics: Metrics, baseline: Baseline) -> str | None:
    """Return a warning if a model is below the baseline on the same clips, otherwise None."""
    if get_value(metrics, baseline.metric) >= baseline.value:
        return None
    return (
        f"the model is BELOW THE BASELINE: {_format(metrics, baseline.metric)}, {baseline.variant} reaches "
        f"{_format(baseline.metrics, baseline.metric)} in seconds. Check the length of the training, its learning "
        "rate, its data and its initial weights"
    )
