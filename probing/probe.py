"""Probing: heads on frozen embeddings, trained and evaluated on a labelled set.

    embeddings of a model, or stored ones ──► heads on folds or on a training part ──► figures on test clips
                                          └─► a head on all training clips ──► heads/NAME.pt, .json, .png

Letters: N clips, E embedding width, C classes.
"""

import contextlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio.dataset import Pack
from common.columns import align_columns
from common.errors import Faults, UserError
from common.files import sha256, write_bytes, write_json
from common.options import read_options
from common.parsing import load_json
from models.devices import choose_device
from models.headed import Head
from models.heads import FOLDER, save_head
from models.weight_sources import needs_download
from probing.baseline import fit_baselines
from probing.data import ProbeSet, make_sort_key, open_clips
from probing.fit import Examples, FitSettings, FittedHead, fit, predict
from probing.options import ProbeOptions
from probing.pictures import draw_probe
from probing.scores import COVERAGE, N_DRAWS, Score, compute_score
from probing.source import EmbeddingSource, embed, open_source
from training.baseline import Metric, get_value
from training.figures import render_png
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
    """

    name: str
    fitted: FittedHead
    rows: np.ndarray
    scores: np.ndarray


def probe(given: dict[str, Any], seed: int) -> str:
    """Run `run.py probe`, and return its report.

    Args:
        given: see `probing.options.ProbeOptions`.
        seed: of everything random.

    Raises:
        UserError: with every fault of the options, the data and the model.
    """
    faults = Faults("the probe")
    options = read_options(ProbeOptions, {key: value for key, value in given.items() if value is not None}, faults)
    clips = None if options is None else open_clips(options, faults)
    source = None
    with faults.noted():
        # before a download, which may take long, other faults are reported
        if options is not None and not (faults.sentences and needs_download(options.weights or options.model)):
            source = open_source(options, faults)
    faults.raise_if_any()
    assert options is not None
    assert clips is not None
    assert source is not None
    settings = options.fitting(seed)
    made_with = _collect_provenance(options, settings, clips, source)
    _check_target(options, made_with)
    examples = {
        part: Examples(pack.names, embed(source, pack, options), clips.targets[part])
        for part, pack in clips.packs.items()
    }
    trials, kept = run_trials(examples, clips, options.valid_fraction, settings, choose_device(options.device))
    tested = examples[clips.test_part]
    scores = np.empty_like(tested.targets)
    for trial in trials:
        scores[trial.rows] = trial.scores
    metric: Metric = "accuracy" if clips.single else "mAP"
    result = compute_score(scores, tested.targets, clips.labels, metric, seed)
    facts = _collect_facts(options, clips, source, kept, result)
    facts["baseline"] = fit_baselines(clips) if options.baseline else None
    record: dict[str, Any] = facts | {"figures": result.metrics.as_dict()}
    folds = [_describe_trial(trial, tested.targets, clips.labels, metric) for trial in trials]
    values = [fold["value"] for fold in folds]
    if len(folds) > 1:
        record |= {"folds_mean": float(np.mean(values)), "folds_std": float(np.std(values, ddof=1))}
    per_class = json.loads(result.metrics.per_class.to_json(orient="records"))
    record |= {"folds": folds, "labels": clips.labels, "per_class": per_class, "made_with": made_with}
    kept.head.facts = facts
    path = _write(options, kept.head, record, result)
    return _format_report(options, source, result, record, path)


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

    def fit_head(train: Examples, valid: Examples | None) -> FittedHead:
        if valid is None:
            labels = [np.flatnonzero(row) for row in train.targets]
            train_groups = None if groups is None else [groups[name] for name in train.names]
            held = hold_out(train.names, labels, train.targets.shape[1], valid_fraction, train_groups)
            train, valid = train.take(~held), train.take(held)
        return fit(train, valid, clips.labels, clips.single, settings, device)

    if clips.folds is None:
        fitted = fit_head(examples["train"], examples.get("valid"))
        test = examples["test"]
        return [Trial("test", fitted, np.arange(len(test)), predict(fitted.head, test.embeddings))], fitted
    data, trials = examples["data"], []
    for name in sorted(set(clips.folds.tolist()), key=make_sort_key):
        tested = clips.folds == name
        fitted = fit_head(data.take(~tested), None)
        trials.append(Trial(name, fitted, np.flatnonzero(tested), predict(fitted.head, data.embeddings[tested])))
        logger.info("fold %s: %d clips, best of %d epochs: %d", name, tested.sum(), fitted.n_epochs, fitted.best_epoch)
    return trials, fit_head(data, None)


def _find_groups(pack: Pack | None) -> dict[str, str] | None:
    """Return the group of each clip by its name; None without a column of groups."""
    if pack is None:
        return None
    column, groups = find_groups(pack)
    return None if column is None else {name: str(group) for name, group in zip(pack.names, groups, strict=True)}


def _describe_trial(trial: Trial, targets: np.ndarray, labels: list[str], metric: Metric) -> dict[str, Any]:
    """Return the facts of a trial as plain values."""
    names = ("n_train", "n_valid", "best_epoch", "n_epochs", "valid_loss")
    facts = {name: getattr(trial.fitted, name) for name in names}
    value = get_value(evaluate_scores(trial.scores, targets[trial.rows], labels), metric)
    return {"fold": trial.name, "n_test": len(trial.rows), **facts, "value": value}


def _collect_provenance(
    options: ProbeOptions, settings: FitSettings, clips: ProbeSet, source: EmbeddingSource
) -> dict[str, Any]:
    """Return everything that the weights of a head depend on."""
    names = ["valid_fraction", "label_column"]
    names += ["chunk_length"] if source.model is not None else []
    names += ["fold_column"] if clips.folds is not None else []
    names += ["mode"] if source.model is not None else []
    provenance = {
        "embeddings": source.facts,
        "data": {part: sha256(pack.manifest) for part, pack in clips.packs.items()},
        "labels": clips.labels,
        "settings": asdict(settings) | {name: getattr(options, name) for name in names},
    }
    return json.loads(json.dumps(provenance))  # as it is read back: lists for tuples


def _check_target(options: ProbeOptions, made_with: dict[str, Any]) -> None:
    """Refuse to replace a head of the same name that was made otherwise.

    Raises:
        UserError: there is one.
    """
    target = Path(options.outputpath) / f"{options.name}.pt"
    if options.overwrite or not target.exists():
        return
    earlier: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # without a record, everything differs
        earlier = dict(load_json(target.with_suffix(".json"))["made_with"])
    differing = [key for key, value in made_with.items() if earlier.get(key) != value]
    if "settings" in differing and isinstance(earlier.get("settings"), dict):
        now, then = made_with["settings"], earlier["settings"]
        differing.remove("settings")
        differing += [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differing:
        raise UserError(
            f"{target} is a head made with other {', '.join(differing)}; choose another --name, or replace it with "
            "--overwrite true"
        )


def _collect_facts(
    options: ProbeOptions, clips: ProbeSet, source: EmbeddingSource, kept: FittedHead, result: Score
) -> dict[str, Any]:
    """Return the facts that are saved in the head."""
    return {
        "name": options.name,
        "model": source.model_name,
        "weights_sha256": source.facts.get("weights_sha256"),
        "source": source.name,
        "chunk_length": source.stores[0].chunk_seconds if source.stores else options.chunk_length,
        "data": clips.packs[clips.test_part].manifest.stem,
        "metric": result.metric,
        "value": result.value,
        "interval": list(result.interval),
        "chance": result.chance,
        "n_train": kept.n_train,
        "n_valid": kept.n_valid,
        "best_epoch": kept.best_epoch,
    }


def _write(options: ProbeOptions, head: Head, record: dict[str, Any], result: Score) -> Path:
    """Write NAME.json and NAME.png, then NAME.pt, so that a head always has its other files."""
    target = Path(options.outputpath) / f"{options.name}.pt"
    target.unlink(missing_ok=True)
    write_json(target.with_suffix(".json"), record)
    low, high = result.interval
    title = f"{options.name}: {result.metric} {result.value:.3f} ({low:.3f} to {high:.3f}), {record['data']}"
    write_bytes(target.with_suffix(".png"), render_png(draw_probe(result, record["labels"], title)))
    save_head(target, head)
    return target


def _format_report(
    options: ProbeOptions, source: EmbeddingSource, result: Score, record: dict[str, Any], path: Path
) -> str:
    """Lay out the figures, and the commands that use the head."""
    n_folds = len(record["folds"])
    data = record["data"] + (f", {n_folds} folds" if n_folds > 1 else "")
    low, high = result.interval
    method = "Wilson" if result.metric == "accuracy" else f"bootstrap, {N_DRAWS} draws"
    rows = [
        ("embeddings", f"{source.name}, of chunks of {record['chunk_length']:g} s"),
        ("head", f"{options.head}, {len(record['labels'])} classes"),
        ("tested on", f"{data}, {result.metrics.n_clips} clips"),
        (result.metric, f"{result.value:.4f}, {COVERAGE:.0%} interval {low:.4f} to {high:.4f} ({method})"),
    ]
    if n_folds > 1:
        rows.append(("of the folds", f"{record['folds_mean']:.4f} ± {record['folds_std']:.4f}"))
    rows.append(("chance", f"{result.chance:.4f}"))
    if record["baseline"] is not None:
        better = ", which is BETTER: fine-tune this model, or use another one" * (record["baseline"] > result.value)
        rows.append(("baseline", f"{record['baseline']:.4f} by simple features (scripts/baseline.py){better}"))
    lines = [
        align_columns(rows),
        f"head: {path} (figures: {path.with_suffix('.json')}, picture: {path.with_suffix('.png')})",
    ]
    head = options.name if Path(options.outputpath) == Path(FOLDER) else str(path)
    model = source.given
    if model is None:
        return "\n".join([*lines, "the embeddings are of no model of this project: the head cannot tag sounds"])
    weights = options.weights or (source.stores[0].meta.get("config", {}).get("weights") if source.stores else None)
    weights_option = f" --weights {weights}" if weights else ""
    chunk_option = "" if record["chunk_length"] == 10 else f" -c {record['chunk_length']:g}"  # 10 is its default
    lines.append(f"next: python inference.py FILES_OR_FOLDERS -m {model}{weights_option} --head {head}{chunk_option}")
    if not weights:
        lines.append(f"in Python: models.get_ssondo({model!r}, head={head!r})")
    return "\n".join(lines)
