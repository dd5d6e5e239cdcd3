"""Probing: heads on frozen embeddings, trained and evaluated on a labelled set.

    embeddings of a model, or stored ones ──► heads on folds or on a training part ──► figures on test clips
                                          └─► a head on all training clips ──► heads/NAME.pt, .json, .png

Letters: N clips, E embedding width, C classes.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.columns import align_columns
from common.errors import Faults, UserError
from common.files import sha256, write_bytes, write_json
from common.options import read_options
from common.parsing import load_json
from models.devices import choose_device
from models.headed import Head
from models.heads import FOLDER, save_head
from models.other_heads import NeighbourHead
from models.weight_sources import needs_download
from probing.baseline import fit_baselines
from probing.data import ProbeSet, open_clips
from probing.fit import FitSettings, FittedHead
from probing.options import ProbeOptions
from probing.pictures import draw_probe
from probing.scores import COVERAGE, N_DRAWS, Score, compute_score
from probing.source import EmbeddingSource, choose_input, embed, open_source
from probing.trials import collect_scores, count_training_clips, describe_trial, run_trials
from training.baseline import Metric
from training.figures import render_png


@dataclass(frozen=True)
class Probe:
    """A probe that was checked: what it trains, on which clips, and where it writes.

    Attributes:
        options: as given, with one head and one choice of layers.
        clips: labelled clips.
        source: of the embeddings.
        settings: of the fits.
        provenance: everything that the weights of the head depend on.
    """

    options: ProbeOptions
    clips: ProbeSet
    source: EmbeddingSource
    settings: FitSettings
    provenance: dict[str, Any]

    @property
    def target(self) -> Path:
        """The file of the head."""
        return Path(self.options.outputpath) / f"{self.options.name}.pt"

    @property
    def record_path(self) -> Path:
        """The file of its figures."""
        return self.target.with_suffix(".json")

    @property
    def is_done(self) -> bool:
        """Whether a head with the same provenance is there."""
        return self.target.exists() and _read_provenance(self.record_path) == self.provenance


def probe(given: dict[str, Any], seed: int) -> str:
    """Run `run.py probe` on one task, and return its report.

    Args:
        given: see `probing.options.ProbeOptions`.
        seed: of everything random.

    Raises:
        UserError: with every fault of the options, the data and the model.
    """
    options, clips, source = open_probe(given)
    checked = check_probe(options, clips, source, seed)
    baseline = fit_baselines(clips) if options.baseline else None
    return run_probe(checked, baseline)


def open_probe(given: dict[str, Any]) -> tuple[ProbeOptions, ProbeSet, EmbeddingSource]:
    """Read the options of a probe on one task, and open its clips and the source of its embeddings.

    Args:
        given: see `probing.options.ProbeOptions`.

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
    return options, clips, source


def check_probe(options: ProbeOptions, clips: ProbeSet, source: EmbeddingSource, seed: int) -> Probe:
    """Check what a probe needs besides valid options, before anything is computed.

    Args:
        options: with one head and one choice of layers.
        clips: of the task.
        source: of the embeddings.
        seed: of everything random.

    Raises:
        UserError: the model lacks what the head takes, there are fewer training clips than neighbours, or another head
            has that name.
    """
    settings = choose_input(source, clips, options, options.fitting(seed))
    n_train = count_training_clips(clips)
    if settings.kind == NeighbourHead.kind and settings.neighbours > n_train:
        raise UserError(
            f"--neighbours is {settings.neighbours}, but a head has {n_train} training clips: give {n_train} or fewer, "
            "or more clips"
        )
    checked = Probe(options, clips, source, settings, _collect_provenance(options, settings, clips, source))
    _check_target(checked)
    return checked


def run_probe(checked: Probe, baseline: float | None) -> str:
    """Fit and test the heads of a probe, write them, and return the report.

    Args:
        checked: the probe.
        baseline: figure of simple features on the same clips, see `probing.baseline`; None if there is none.

    Raises:
        UserError: clips without valid embeddings.
    """
    options, clips, source, settings = checked.options, checked.clips, checked.source, checked.settings
    examples = {part: embed(source, pack, clips.targets[part], options, settings) for part, pack in clips.packs.items()}
    trials, kept = run_trials(examples, clips, options.valid_fraction, settings, choose_device(options.device))
    tested = examples[clips.test_part]
    scores = collect_scores(trials, tested.targets)
    metric: Metric = "accuracy" if clips.single else "mAP"
    result = compute_score(scores, tested.targets, clips.labels, metric, settings.seed)
    facts = _collect_facts(options, clips, source, kept, result) | {"baseline": baseline}
    record: dict[str, Any] = facts | {"figures": result.metrics.as_dict()}
    folds = [describe_trial(trial, tested.targets, clips.labels, metric) for trial in trials]
    values = [fold["value"] for fold in folds]
    if len(folds) > 1:
        record |= {"folds_mean": float(np.mean(values)), "folds_std": float(np.std(values, ddof=1))}
    per_class = json.loads(result.metrics.per_class.to_json(orient="records"))
    record |= {"folds": folds, "labels": clips.labels, "per_class": per_class, "made_with": checked.provenance}
    if kept.head.layer_weights:
        record["layer_weights"] = {str(layer): weight for layer, weight in kept.head.layer_weights.items()}
    kept.head.facts = facts
    _write(checked, kept.head, record, result)
    return format_report(checked, result, record)


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
        "settings": settings.describe() | {name: getattr(options, name) for name in names},
    }
    return json.loads(json.dumps(provenance))  # as it is read back: lists for tuples


def _read_provenance(path: Path) -> dict[str, Any]:
    """Return what the head of a record was made with; empty without a valid record."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return dict(load_json(path)["made_with"])
    return {}


def _check_target(checked: Probe) -> None:
    """Refuse to replace a head of the same name that was made otherwise.

    Raises:
        UserError: there is one.
    """
    if checked.options.overwrite or not checked.target.exists():
        return
    made_with, earlier = checked.provenance, _read_provenance(checked.record_path)  # without a record, all differs
    differing = [key for key, value in made_with.items() if earlier.get(key) != value]
    if "settings" in differing and isinstance(earlier.get("settings"), dict):
        now, then = made_with["settings"], earlier["settings"]
        differing.remove("settings")
        differing += [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differing:
        raise UserError(
            f"{checked.target} is a head made with other {', '.join(differing)}; choose another --name, or replace it "
            "with --overwrite true"
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


def _write(checked: Probe, head: Head, record: dict[str, Any], result: Score) -> None:
    """Write NAME.json and NAME.png, then NAME.pt, so that a head always has its other files."""
    checked.target.unlink(missing_ok=True)
    write_json(checked.record_path, record)
    low, high = result.interval
    title = f"{record['name']}: {result.metric} {result.value:.3f} ({low:.3f} to {high:.3f}), {record['data']}"
    write_bytes(checked.target.with_suffix(".png"), render_png(draw_probe(result, record["labels"], title)))
    save_head(checked.target, head)


def format_report(checked: Probe, result: Score, record: dict[str, Any]) -> str:
    """Lay out the figures, and the commands that use the head."""
    options, source, path = checked.options, checked.source, checked.target
    n_folds = len(record["folds"])
    data = record["data"] + (f", {n_folds} folds" if n_folds > 1 else "")
    low, high = result.interval
    method = "Wilson" if result.metric == "accuracy" else f"bootstrap, {N_DRAWS} draws"
    rows = [
        ("embeddings", f"{source.name}, of chunks of {record['chunk_length']:g} s"),
        ("head", f"{options.head[0]}, {len(record['labels'])} classes"),
        ("tested on", f"{data}, {result.metrics.n_clips} clips"),
        (result.metric, f"{result.value:.4f}, {COVERAGE:.0%} interval {low:.4f} to {high:.4f} ({method})"),
    ]
    if weights := record.get("layer_weights"):
        rows.insert(1, ("weights of layers", ", ".join(f"{layer}: {weight:.2f}" for layer, weight in weights.items())))
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
