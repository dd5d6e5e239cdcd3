"""Probing: what frozen embeddings know of the classes of a labelled set, and a head that says it from then on.

    embeddings of a model, or stored ones ──► heads on folds or on a training part ──► figures on clips never seen
                                          └─► a head on all that may be learned from ──► heads/NAME.pt, .json, .png

Letters: N clips, E embedding width, C classes.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio.dataset import Pack
from common.columns import align_columns
from common.errors import Faults, UserError
from common.files import sha256, whole_file, write_json
from common.options import read_options
from models.devices import choose_device
from models.headed import Head
from models.heads import FOLDER, save_head
from probing.baseline import fit_baselines
from probing.data import ProbeSet, in_order, open_clips
from probing.fit import Examples, Fitted, Fitting, answer, fit
from probing.options import ProbeOptions
from probing.pictures import probe_figure
from probing.scores import COVERAGE, N_DRAWS, Metric, Score, score, value_of
from probing.source import Source, embed, open_source
from training.figures import png
from training.holdout import find_groups, hold_out
from training.metrics import evaluate_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One head that was fitted and tested: a fold, or the only one.

    Attributes:
        name: of the fold.
        fitted: the head.
        rows: of the test clips among all that are tested.
        scores: probabilities (N,C) of these.
    """

    name: str
    fitted: Fitted
    rows: np.ndarray
    scores: np.ndarray


def probe(given: dict[str, Any], seed: int) -> str:
    """Do what `run.py probe` is told, and return what there is to tell.

    Args:
        given: see `probing.options.ProbeOptions`.
        seed: of everything random.

    Raises:
        UserError: all that is wrong with the options, the data and the model.
    """
    faults = Faults("the probe")
    options = read_options(ProbeOptions, {key: value for key, value in given.items() if value is not None}, faults)
    clips = None if options is None else open_clips(options, faults)
    source = None if options is None else open_source(options, faults)
    faults.raise_if_any()
    assert options is not None
    assert clips is not None
    assert source is not None
    how = options.fitting(seed)
    made_with = _made_with(options, how, clips, source)
    _check_target(options, made_with)
    examples = {
        part: Examples(pack.names, embed(source, pack, options), clips.targets[part])
        for part, pack in clips.packs.items()
    }
    device = choose_device(options.device)
    trials, kept = run_trials(examples, clips, options.valid_fraction, how, device)
    tested = examples["data" if clips.folds is not None else "test"]
    scores = np.empty_like(tested.targets)
    for trial in trials:
        scores[trial.rows] = trial.scores
    metric: Metric = "accuracy" if clips.single else "mAP"
    result = score(scores, tested.targets, clips.labels, metric, seed)
    values = [_value(trial, tested.targets, clips.labels, metric) for trial in trials]
    baseline = fit_baselines(clips) if options.baseline else None
    facts = _facts(options, clips, source, kept, result) | {"baseline": baseline}
    folds = [_told(trial, value) for trial, value in zip(trials, values, strict=True)]
    path = _write(options, kept.head, facts, folds, result, clips.labels, made_with)
    return _table(options, source, clips, result, values, facts, path)


def run_trials(
    examples: dict[str, Examples], clips: ProbeSet, valid_fraction: float, how: Fitting, device: torch.device
) -> tuple[list[Trial], Fitted]:
    """Fit and test every head; what is tested is heard neither by its head nor by what stops its training.

    Args:
        examples: of each pack of `clips`.
        clips: their labels and folds.
        valid_fraction: of the clips to learn from that choose when to stop, where no pack is for that.
        how: heads are fitted.
        device: to compute on.

    Returns:
        A trial a fold, or the only one; and the head to keep: without folds that of the trial, else one more, of all.
    """
    groups = _groups(clips.packs.get("data" if clips.folds is not None else "train"))

    def fitted(train: Examples, valid: Examples | None) -> Fitted:
        if valid is None:
            labels = [np.flatnonzero(row) for row in train.targets]
            kept_together = None if groups is None else [groups[name] for name in train.names]
            held = hold_out(train.names, labels, train.targets.shape[1], valid_fraction, kept_together)
            train, valid = train.take(~held), train.take(held)
        return fit(train, valid, clips.labels, clips.single, how, device)

    if clips.folds is None:
        only = fitted(examples["train"], examples.get("valid"))
        test = examples["test"]
        return [Trial("test", only, np.arange(len(test)), answer(only.head, test.embeddings))], only
    data, trials = examples["data"], []
    for name in sorted(set(clips.folds.tolist()), key=in_order):
        tested = clips.folds == name
        one = fitted(data.take(~tested), None)
        trials.append(Trial(name, one, np.flatnonzero(tested), answer(one.head, data.embeddings[tested])))
        logger.info("fold %s: %d clips, best of %d epochs: %d", name, tested.sum(), one.n_epochs, one.best_epoch)
    return trials, fitted(data, None)


def _groups(pack: Pack | None) -> dict[str, str] | None:
    """Return the group of each clip by its name; None where no column names groups."""
    if pack is None:
        return None
    column, groups = find_groups(pack)
    return None if column is None else {name: str(group) for name, group in zip(pack.names, groups, strict=True)}


def _value(trial: Trial, targets: np.ndarray, labels: list[str], metric: Metric) -> float:
    return value_of(evaluate_scores(trial.scores, targets[trial.rows], labels), metric)


def _told(trial: Trial, value: float) -> dict[str, Any]:
    """Return what a trial was, as plain values."""
    counts = {
        name: getattr(trial.fitted, name) for name in ("n_train", "n_valid", "best_epoch", "n_epochs", "valid_loss")
    }
    return {"fold": trial.name, "n_test": len(trial.rows), **counts, "value": value}


def _made_with(options: ProbeOptions, how: Fitting, clips: ProbeSet, source: Source) -> dict[str, Any]:
    """Return what decides the head: a head of the same name with another one is another head."""
    settings = asdict(how) | {"valid_fraction": options.valid_fraction, "label_column": options.label_column}
    settings |= {"chunk_length": options.chunk_length} if source.model is not None else {}
    settings |= {"fold_column": options.fold_column} if clips.folds is not None else {}
    settings |= {"mode": options.mode} if source.model is not None else {}
    made = {
        "embeddings": source.facts,
        "data": {part: sha256(pack.manifest) for part, pack in clips.packs.items()},
        "labels": clips.labels,
        "settings": settings,
    }
    return json.loads(json.dumps(made))


def _check_target(options: ProbeOptions, made_with: dict[str, Any]) -> None:
    """Leave a head alone that was made otherwise.

    Raises:
        UserError: there is one.
    """
    target = Path(options.outputpath) / f"{options.name}.pt"
    if options.overwrite or not target.exists():
        return
    was: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # where nothing says it, all of it differs
        was = dict(json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))["made_with"])
    differing = [key for key, value in made_with.items() if was.get(key) != value]
    if "settings" in differing and isinstance(was.get("settings"), dict):
        now, then = made_with["settings"], was["settings"]
        differing.remove("settings")
        differing += [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differing:
        raise UserError(
            f"{target} is a head made with other {', '.join(differing)}; give another --name, or --overwrite true to "
            "replace it"
        )


def _facts(options: ProbeOptions, clips: ProbeSet, source: Source, kept: Fitted, result: Score) -> dict[str, Any]:
    """Return what the head says of itself."""
    store_seconds = source.stores[0].chunk_seconds if source.stores else options.chunk_length
    made_of = {"model": source.model_name, "weights_sha256": source.facts.get("weights_sha256")}
    return {
        "name": options.name,
        **made_of,
        "source": source.name,
        "chunk_length": store_seconds,
        "data": clips.packs["data" if clips.folds is not None else "test"].manifest.stem,
        "metric": result.metric,
        "value": result.value,
        "interval": list(result.interval),
        "chance": result.chance,
        "n_train": kept.n_train,
        "n_valid": kept.n_valid,
        "best_epoch": kept.best_epoch,
    }


def _write(
    options: ProbeOptions,
    head: Head,
    facts: dict[str, Any],
    folds: list[dict[str, Any]],
    result: Score,
    labels: list[str],
    made_with: dict[str, Any],
) -> Path:
    """Write NAME.json and NAME.png, then NAME.pt: where that one is, all three are."""
    target = Path(options.outputpath) / f"{options.name}.pt"
    target.unlink(missing_ok=True)
    values = [fold["value"] for fold in folds]
    told: dict[str, Any] = {**facts, "figures": result.metrics.as_dict()}
    if len(folds) > 1:
        told |= {"folds_mean": float(np.mean(values)), "folds_std": float(np.std(values, ddof=1))}
    head.facts = facts
    per_class = json.loads(result.metrics.per_class.to_json(orient="records"))
    told |= {"folds": folds, "labels": labels, "per_class": per_class, "made_with": made_with}
    write_json(target.with_suffix(".json"), told)
    low, high = result.interval
    title = f"{options.name}: {result.metric} {result.value:.3f} ({low:.3f} to {high:.3f}), {facts['data']}"
    with whole_file(target.with_suffix(".png")) as partial:
        partial.write_bytes(png(probe_figure(result, labels, title)))
    save_head(target, head)
    return target


def _table(
    options: ProbeOptions,
    source: Source,
    clips: ProbeSet,
    result: Score,
    values: Sequence[float],
    facts: dict[str, Any],
    path: Path,
) -> str:
    """Lay out the figures, and the commands that use the head."""
    tested = facts["data"] + (f", {len(values)} folds" if len(values) > 1 else "")
    low, high = result.interval
    interval = "Wilson" if result.metric == "accuracy" else f"bootstrap, {N_DRAWS} draws"
    rows = [
        ("embeddings", f"{source.name}, of chunks of {facts['chunk_length']:g} s"),
        ("head", f"{options.head}, {len(clips.labels)} classes"),
        ("tested on", f"{tested}, {result.metrics.n_clips} clips"),
        (result.metric, f"{result.value:.4f}, {COVERAGE:.0%} interval {low:.4f} to {high:.4f} ({interval})"),
    ]
    if len(values) > 1:
        rows.append(("of the folds", f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"))
    rows.append(("chance", f"{result.chance:.4f}"))
    if facts["baseline"] is not None:
        below = ", which is BETTER: fine-tune this model, or take another one" * (facts["baseline"] > result.value)
        rows.append(("baseline", f"{facts['baseline']:.4f} by simple features (scripts/baseline.py){below}"))
    lines = align_columns(rows)
    lines.append(f"head: {path} (figures: {path.with_suffix('.json')}, picture: {path.with_suffix('.png')})")
    head = options.name if Path(options.outputpath) == Path(FOLDER) else str(path)
    model = source.given
    if model is None:
        return "\n".join([*lines, "these embeddings are of no model here: the head reads them, and cannot tag sounds"])
    asked_with = options.weights or (source.stores[0].meta.get("config", {}).get("weights") if source.stores else None)
    weights = f" --weights {asked_with}" if asked_with else ""
    window = "" if facts["chunk_length"] == 10 else f" -c {facts['chunk_length']:g}"  # its own default
    lines.append(f"next: python inference.py FILES_OR_FOLDERS -m {model}{weights} --head {head}{window}")
    if not weights:
        lines.append(f"in Python: models.get_ssondo({model!r}, head={head!r})")
    return "\n".join(lines)
