"""The held-out baseline: what scikit-learn reaches with simple statistics of the spectrogram, in seconds.

A figure of a network means little without it. Mean and standard deviation over time of 40 log-mels or 20 MFCCs, of the
whole clip or of each of four equal parts of it, are standardised and given to a logistic regression (C = 1) or to a
support vector machine with an RBF kernel (C = 10): eight variants. Which one is reported is decided without the test
data: on the validation clips where there are any, otherwise by cross-validation of the training clips. It is then
fitted to all of them, validation clips included, and judged on the test clips once. No seed is drawn from, and
everything computes in one thread, so that the same data give the same bits.

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

MAX_CLIPS, MAX_VALID_CLIPS = 4000, 1000  # to fit to, and to choose by
TRAIN_HOURS = 10.0  # of sound that are read for training, so that clips of hours are looked at in parts
MIN_SECONDS, MAX_SECONDS = 10.0, 600.0  # that are read of a longer clip, by how many there are
FIT_CLIPS, FIT_HOURS = 40_000, 40.0  # `fits_in_seconds`: a core reads an hour at 16 kHz in about a second
FEW_CLIPS = 1000  # up to here five folds, then three
SPLIT_COLUMNS = (*GROUP_COLUMNS, "fold")  # clips that share a value are never on both sides of a split
SEED = 0  # of the folds


@dataclass(frozen=True)
class Baseline:
    """What was reached, and how.

    Attributes:
        variant: the one that was chosen.
        metric: "accuracy" where each test clip has exactly one label, otherwise "mAP".
        metrics: its figures on the test clips.
        scores: (N,C) of the test clips; the higher the likelier.
        choice_metric: by which it was chosen.
        choices: the variants that were tried with their figures, in the order of `VARIANTS`; nan where nothing could
            be compared.
        n_fitted: clips that it was fitted to.
        notes: how it was chosen and what was limited, as parts of a sentence.
        seconds: that all of it took.
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
        """Its figure."""
        return get_value(self.metrics, self.metric)

    @property
    def sentence(self) -> str:
        """Everything in one line of text."""
        reached = _text(self.metrics, self.metric)
        if self.metric == "accuracy":
            reached += f" (mAP {self.metrics.mAP:.4f})"
        seconds = f"{self.seconds:.1f}" if self.seconds < 10 else f"{self.seconds:.0f}"
        fitted = f"fitted to {self.n_fitted:,} clips in {seconds} s"
        return "; ".join([f"baseline: {self.variant}, {reached}, {fitted}", *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Return all but the scores, ready for JSON."""
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
    """Return the figure `metric`, "accuracy" or "mAP", of a set."""
    value = metrics.top1 if metric == "accuracy" else metrics.mAP
    assert value is not None
    return value


def _text(metrics: Metrics, metric: str) -> str:
    value = get_value(metrics, metric)
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"mAP {value:.4f}"


def fits_in_seconds(n_clips: int, hours: float, sample_rate: int = 16000) -> bool:
    """Whether data are small enough for a baseline beside a training run: a minute on one core at most.

    Args:
        n_clips: training clips that are fitted to (`MAX_CLIPS` at most) and all test clips.
        hours: what they last together.
        sample_rate: of the pack; an hour takes the longer, the higher it is.
    """
    return n_clips <= FIT_CLIPS and hours * sample_rate / 16000 <= FIT_HOURS


def fit_baseline(train: LabelledPack, test: LabelledPack, valid: LabelledPack | None = None) -> Baseline:
    """Choose a variant, fit it and judge it; see the head of this file.

    More than `MAX_CLIPS` training clips are thinned out by the hash of their names, class by class. Where clips last
    hours, about `TRAIN_HOURS` in all are read, as short stretches from all over each clip. With many clips or classes
    fewer variants are tried. `Baseline.notes` say so.

    Args:
        train: to fit to, and to choose by where there are no validation clips.
        test: to be judged on; its labels are looked at after everything else is settled.
        valid: to choose by, and to fit to after that.

    Raises:
        UserError: the packs have different sample rates or numbers of classes.
    """
    started = time.perf_counter()
    _check_alike(train, test, *([valid] if valid else []))
    with _one_thread():
        return _fit_baseline(train, test, valid, started)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Add up in one order, whatever the machine: the libraries split sums by the number of their threads."""
    from threadpoolctl import threadpool_limits

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its own MKL is out of the reach of threadpoolctl
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(n_threads)


def _fit_baseline(train: LabelledPack, test: LabelledPack, valid: LabelledPack | None, started: float) -> Baseline:
    notes: list[str] = []
    train = _thinned(train, MAX_CLIPS, "training", notes)
    most_seconds = limit_seconds(len(train.pack))
    longest = max(int(part.pack.n_samples.max()) for part in (train, test)) / test.pack.sample_rate
    if longest > most_seconds:
        notes.append(
            f"of clips longer than {most_seconds:.0f} s about so much is read, in stretches from all over them"
        )
    features, targets = compute_features(train.pack, most_seconds), train.multi_hot()
    if valid is None:
        column, groups = find_groups(train.pack, SPLIT_COLUMNS)
        splits = list(_folds(train, groups))
        how = f"by {len(splits)}-fold cross-validation of the training clips"
        how += f", each `{column}` in one fold" if column else ""
    else:
        valid = _thinned(valid, MAX_VALID_CLIPS, "validation", notes)
        of_valid = compute_features(valid.pack, most_seconds)
        features = {key: np.concatenate([table, of_valid[key]]) for key, table in features.items()}
        targets = np.concatenate([targets, valid.multi_hot()])
        splits = [np.arange(len(targets)) >= len(train.pack)]
        how = f"on {len(valid.pack):,} validation clips, which it is then fitted to as well"

    single = bool((targets.sum(axis=1) == 1).all())
    choice_metric: Metric = "accuracy" if single else "mAP"
    n_classes = int(targets.any(axis=0).sum())
    variants = affordable_variants(len(targets), n_classes, single)
    values = [_figure_on_splits(variant, features, targets, splits, choice_metric) for variant in variants]
    chosen = variants[int(np.argmax(np.nan_to_num(values)))]  # the first of equal ones
    if not splits:
        how = f"the first of {len(variants)} variants: there are too few clips to choose by"
    else:
        how = f"chosen of {len(variants)} variants {how}"
    if len(variants) < len(VARIANTS):
        models = "logistic regression" + (" on whole clips" if all(v.parts == 1 for v in variants) else "")
        notes.append(f"only {models} was tried, with {n_classes:,} classes of {len(targets):,} clips")

    key = (chosen.spectrum, chosen.parts)
    of_test = compute_features(test.pack, most_seconds)[key]
    scores = class_scores(chosen, features[key], targets, of_test, single=single)
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
        seconds=time.perf_counter() - started,
    )


def _thinned(data: LabelledPack, most: int, what: str, notes: list[str]) -> LabelledPack:
    if len(data.pack) > most:
        notes.append(f"{most:,} of {len(data.pack):,} {what} clips were taken, by the hash of their names")
    return thin_out(data, most)


def _check_alike(*packs: LabelledPack) -> None:
    rates = {part.pack.sample_rate: str(part.pack.manifest) for part in packs}
    if len(rates) > 1:
        found = ", ".join(f"{rate} Hz in {name}" for rate, name in sorted(rates.items()))
        raise UserError(f"a baseline wants packs of one sample rate; found {found}; pack one of them again")
    widths = {part.num_classes: str(part.pack.manifest) for part in packs}
    if len(widths) > 1:
        found = ", ".join(f"{n} in {name}" for n, name in sorted(widths.items()))
        raise UserError(f"a baseline wants packs labelled with the same classes; found {found}")


def limit_seconds(n_clips: int) -> float:
    """Return how much of a longer clip is read, where so many clips are fitted to."""
    return min(max(TRAIN_HOURS * 3600 / n_clips, MIN_SECONDS), MAX_SECONDS)


def _strata(data: LabelledPack) -> np.ndarray:
    """Return for each clip (N,) the rarest of its classes, which stands for it where classes are kept in balance."""
    counts = np.bincount(np.concatenate(data.labels), minlength=data.num_classes)
    return np.array([indices[counts[indices].argmin()] for indices in data.labels])


def thin_out(data: LabelledPack, most: int) -> LabelledPack:
    """Return at most so many clips of a pack, the same ones however they are listed: each class keeps its share.

    Args:
        data: N clips.
        most: how many to keep; where there are no more classes than that, each keeps one clip at least.
    """
    if len(data.pack) <= most:
        return data
    digests = (hashlib.sha256(name.encode()).digest() for name in data.pack.names)
    hashes = np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64)
    strata = _strata(data)
    sizes = np.bincount(strata)
    order = np.lexsort((hashes, strata))
    place = np.empty(len(strata))  # of a clip within its class, from 0 to 1
    place[order] = np.arange(len(strata)) - (np.cumsum(sizes) - sizes)[strata[order]]
    rows = np.sort(np.lexsort((hashes, place / sizes[strata]))[:most])
    return LabelledPack(data.pack.subset(rows), [data.labels[row] for row in rows], data.num_classes)


def _folds(data: LabelledPack, groups: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the clips of each fold, bool (N,), stratified by class, groups kept together; no fold of too few clips."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    strata, n_groups = _strata(data), len(np.unique(groups))
    n_folds = min(5 if len(strata) <= FEW_CLIPS else 3, int(np.bincount(strata).max()), n_groups)
    if n_folds < 2:
        return
    kind = StratifiedKFold if n_groups == len(groups) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer clips than folds, which is no harm
        for _, rows in kind(n_folds, shuffle=True, random_state=SEED).split(strata, strata, groups):
            if 0 < len(rows) < len(strata):  # large groups may leave a fold empty
                yield np.isin(np.arange(len(strata)), rows)


def _figure_on_splits(
    variant: Variant, features: FeatureTable, targets: np.ndarray, splits: list[np.ndarray], metric: Metric
) -> float:
    """Return the mean figure of a variant over splits, each held-out clip counting alike; nan without any split."""
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

    Validation clips that are held out of the training pack stay in it, and are no validation clips here.

    Raises:
        UserError: why there can be no baseline: no evaluation data or labels, or too much to be read in seconds.
    """
    pack, test, valid = data.pack, data.evaluation, data.valid
    if test is None:
        raise UserError("there are no evaluation data")
    if "labels" not in pack.table:
        raise UserError(f"{pack.manifest} has no `labels` column")
    n_fitted = min(len(pack), MAX_CLIPS)
    too_large = UserError(
        f"{len(pack):,} training and {len(test.pack):,} test clips take more than seconds; scripts/baseline.py fits one"
    )
    # The test clips come first: of millions of training clips nothing is looked up then.
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
    """Fit the baseline of a run that has ended, log it beside the figures of the model and write `baseline.json`.

    Whatever goes wrong is logged, and never ends the run.

    Args:
        data: of the run.
        metrics: of its model, on the evaluation data.
        folder: of the run.
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
    sentence = warning(baseline, metrics)
    if sentence:
        logger.warning("%s", sentence)
    return baseline


def warning(baseline: Baseline, metrics: Metrics) -> str | None:
    """Return a sentence where a model is below the baseline on the same clips, otherwise None."""
    if get_value(metrics, baseline.metric) >= baseline.value:
        return None
    return (
        f"the model is BELOW THE BASELINE: {_text(metrics, baseline.metric)}, where {baseline.variant} reaches "
        f"{_text(baseline.metrics, baseline.metric)} in seconds. Look at the training first: its length, its learning "
        "rate, its data, its initial weights"
    )
