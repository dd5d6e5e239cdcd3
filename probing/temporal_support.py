"""Temporal support: how long the windows must be that a task's embeddings are computed from, and what they cost.

The temporal support of an embedding is the duration of sound that it is computed from ("On the influence of temporal
support", arXiv 2312.14005, ICASSP 2024). For each duration, a clip is embedded as the mean over its windows, weighted
by their length, and heads are trained and tested as by an ordinary probe. The paper's durations, pooling and probe are
not public beyond its abstract: these are our own choices.

Letters: N clips, C classes.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.columns import align_columns
from common.errors import UserError
from common.files import write_bytes, write_json
from models import AudioTagger
from models.devices import choose_device
from probing.baseline import fit_baselines
from probing.cost import BATCH, ROUNDS, Cost, measure_costs
from probing.data import ProbeSet
from probing.fit import predict
from probing.options import ProbeOptions
from probing.probe import Probe, check_probe, open_probe, run_probe
from probing.scores import Score, compute_score
from probing.source import EmbeddingSource, embed
from probing.support_picture import draw_supports
from probing.trials import Trial, collect_scores, run_trials
from training.baseline import Metric
from training.figures import render_png

logger = logging.getLogger(__name__)

MIN_SAVING = 0.1  # of time; less may be noise of the measurement


@dataclass(frozen=True)
class Support:
    """Score and cost of embeddings of one temporal support.

    Attributes:
        seconds: length of the windows.
        n_steps: time steps of the model in a window.
        valid: of the validation clips, which lie in the training part; with folds, of all folds, whose training parts
            have clips that others test.
        test: of the test clips.
        cost: of embedding a clip.
        note: what is particular about this length; empty if nothing is.
    """

    seconds: float
    n_steps: int
    valid: Score
    test: Score
    cost: Cost
    note: str


@dataclass(frozen=True)
class Choice:
    """The supports that a task's validation clips choose.

    Attributes:
        best: of the best validation score; of equal ones, that of the fewest operations.
        cheapest: of the least time among those whose validation score is within the interval of the best; the best
            itself where none saves `MIN_SAVING` of its time.
    """

    best: Support
    cheapest: Support

    @property
    def ratios(self) -> dict[str, float]:
        """Each cost of the cheapest, divided by that of the best."""
        names, one, other = ("ms", "gflop", "megabytes"), asdict(self.cheapest.cost), asdict(self.best.cost)
        return {name: one[name] / other[name] for name in names}


def choose_supports(supports: Sequence[Support]) -> Choice:
    """Choose by validation scores and costs; test scores are not used."""
    best = min(supports, key=lambda support: (-support.valid.value, support.cost.gflop))
    faster = [each for each in supports if each.cost.ms <= (1 - MIN_SAVING) * best.cost.ms]
    sufficient = [each for each in faster if each.valid.value >= best.valid.interval[0]]
    return Choice(best, min(sufficient, key=lambda support: support.cost.ms, default=best))


def probe_supports(given: dict[str, Any], seed: int) -> str:
    """Run `run.py probe --temporal_support`, and return its report.

    Args:
        given: see `probing.options.ProbeOptions`.
        seed: of everything random.

    Raises:
        UserError: with every fault of the options, the data and the model.
    """
    options, clips, source = open_probe(given)
    probes = check_supports(options, clips, source, seed)
    supports = compare_supports(probes, seed)
    baseline = fit_baselines(clips) if options.baseline else None
    choice = choose_supports(supports)
    target = Path(options.outputpath) / f"{options.name}_support.json"
    clip_seconds = measure_median_seconds(clips)
    write_json(target, describe_supports(probes[0], supports, choice, clip_seconds, baseline))
    title = f"{options.name}: {source.model_name} on {clips.packs[clips.test_part].manifest.stem}"
    picture = render_png(draw_supports(supports, choice, clip_seconds, baseline, title))
    write_bytes(target.with_suffix(".png"), picture)
    table = format_supports(supports, choice, clip_seconds, baseline)
    best = next(probe for probe in probes if probe.options.chunk_length == choice.best.seconds)
    report = run_probe(best, baseline)
    return f"{table}\nfigures: {target}, picture: {target.with_suffix('.png')}\n\nthe head of the best:\n{report}"


def check_supports(options: ProbeOptions, clips: ProbeSet, source: EmbeddingSource, seed: int) -> list[Probe]:
    """Return the checked probe of each length, ascending; lengths above the longest clip all give whole clips.

    Raises:
        UserError: no length can be probed, for example since another head has the name.
    """
    longest = measure_longest_seconds(clips)
    lengths = sorted(set(options.temporal_support or ()))
    n_used = min(sum(length < longest for length in lengths) + 1, len(lengths))
    if dropped := lengths[n_used:]:
        names, held = ", ".join(f"{length:g}" for length in dropped), lengths[n_used - 1]
        logger.info("clips are at most %.2f s: %s s are left out, since they fit in %g s", longest, names, held)
    each = [options.model_copy(update={"chunk_length": length}) for length in lengths[:n_used]]
    probes = [check_probe(probed.model_copy(update={"overwrite": True}), clips, source, seed) for probed in each]
    # A head of that name may be of an earlier start of this command, made with the best length.
    if not any(probe.is_done for probe in probes):
        check_probe(each[-1], clips, source, seed)
    return probes


def compare_supports(probes: Sequence[Probe], seed: int) -> list[Support]:
    """Train and test heads, and measure the cost, for each length of windows.

    Args:
        probes: of each length, on the same clips and model.
        seed: of the intervals of mAP.
    """
    clips, model = probes[0].clips, probes[0].source.model
    assert model is not None
    scores = []
    for probe in probes:
        logger.info("windows of %g s", probe.options.chunk_length)
        scores.append(_score(probe, seed))
    lengths, clip_seconds = [probe.options.chunk_length for probe in probes], measure_median_seconds(clips)
    costs = measure_costs(model, clip_seconds, lengths, probes[0].options.mode)
    longest = measure_longest_seconds(clips)
    return [
        Support(
            seconds,
            model.n_steps(max(1, round(min(seconds, longest) * model.sample_rate))),
            *score,
            cost,
            describe_length(model, seconds, longest),
        )
        for seconds, score, cost in zip(lengths, scores, costs, strict=True)
    ]


def _score(probe: Probe, seed: int) -> tuple[Score, Score]:
    """Return the scores of the validation clips and of the test clips."""
    clips, options, settings = probe.clips, probe.options, probe.settings
    examples = {
        part: embed(probe.source, pack, clips.targets[part], options, settings) for part, pack in clips.packs.items()
    }
    trials, _ = run_trials(examples, clips, options.valid_fraction, settings, choose_device(options.device))
    metric: Metric = "accuracy" if clips.single else "mAP"
    tested = clips.targets[clips.test_part]
    valid, targets = _pool_validation(trials)
    return (
        compute_score(valid, targets, clips.labels, metric, seed),
        compute_score(collect_scores(trials, tested), tested, clips.labels, metric, seed),
    )


def _pool_validation(trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and targets (N,C) of the validation clips of all trials, each by the head that did not learn it.

    Raises:
        UserError: there are none.
    """
    parts = [(predict(trial.fitted.head, trial.valid), trial.valid.targets) for trial in trials if trial.valid]
    if not parts:
        raise UserError("no validation clips are left to choose by: raise --valid_fraction, or give --valid_data")
    scores, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
    return scores, targets


def measure_longest_seconds(clips: ProbeSet) -> float:
    """Return the length of the longest clip in seconds."""
    return max(float((pack.n_samples / pack.sample_rate).max()) for pack in clips.packs.values())


def measure_median_seconds(clips: ProbeSet) -> float:
    """Return the median length of the test clips in seconds."""
    pack = clips.packs[clips.test_part]
    return float(np.median(pack.n_samples) / pack.sample_rate)


def describe_length(model: AudioTagger, seconds: float, longest: float) -> str:
    """Describe windows that are padded or hold whole clips; empty for others."""
    least = model.front_end.min_samples / model.sample_rate
    if seconds < least:
        return f"padded to {least:.2f} s"
    return "whole clips" if seconds >= longest else ""


def describe_supports(
    probe: Probe, supports: Sequence[Support], choice: Choice, clip_seconds: float, baseline: float | None
) -> dict[str, Any]:
    """Return everything as plain values."""

    def describe(score: Score) -> dict[str, Any]:
        return {"value": score.value, "interval": list(score.interval), "n_clips": score.metrics.n_clips}

    rows = [
        {"seconds": each.seconds, "n_steps": each.n_steps, "note": each.note}
        | {"valid": describe(each.valid), "test": describe(each.test)}
        | asdict(each.cost)
        for each in supports
    ]
    first = supports[0].test
    made_with = {key: value for key, value in probe.provenance.items() if key != "settings"}
    settings = {key: value for key, value in probe.provenance["settings"].items() if key != "chunk_length"}
    return {
        "metric": first.metric,
        "chance": first.chance,
        "baseline": baseline,
        "clip_seconds": clip_seconds,
        "threads": torch.get_num_threads(),
        "device": probe.options.device,
        "supports": rows,
        "best": choice.best.seconds,
        "cheapest": choice.cheapest.seconds,
        "cost_ratios": choice.ratios,
        "made_with": made_with | {"settings": settings},
    }


def _format_score(score: Score) -> str:
    return "{:.4f} ({:.4f} to {:.4f})".format(score.value, *score.interval)


def format_supports(supports: Sequence[Support], choice: Choice, clip_seconds: float, baseline: float | None) -> str:
    """Lay out the table, how it was measured, and the choice."""
    metric = supports[0].test.metric
    header = ("window", "windows", "steps", f"validation {metric}", f"test {metric}", "GFLOP", "ms", "MB", "")
    rows = [header] + [
        (
            f"{each.seconds:g} s",
            str(each.cost.n_windows),
            str(each.n_steps),
            *map(_format_score, (each.valid, each.test)),
            f"{each.cost.gflop:.3g}",
            f"{each.cost.ms:.1f}",
            f"{each.cost.megabytes:.3g}",
            each.note,
        )
        for each in supports
    ]
    best, cheapest = choice.best, choice.cheapest
    lines = [
        align_columns(rows),
        f"windows, GFLOP, ms: of a clip of {clip_seconds:.2f} s (the median); ms: the median of {ROUNDS} passes, "
        f"{torch.get_num_threads()} thread(s), {BATCH} windows at once; MB: tensors of one window, without weights",
        f"chance {supports[0].test.chance:.4f}"
        + ("" if baseline is None else f", baseline {baseline:.4f} by simple features"),
        f"best by the validation clips: {best.seconds:g} s, test {metric} {best.test.value:.4f}",
    ]
    if cheapest is best:
        lines.append(f"no length within the interval of its validation score saves {MIN_SAVING:.0%} of the time")
    else:
        ratios = choice.ratios
        lines.append(
            f"cheapest within the interval of its validation score: {cheapest.seconds:g} s, test {metric} "
            f"{cheapest.test.value:.4f}: saves {1 - ratios['ms']:.0%} of the time, with {ratios['gflop']:.0%} of the "
            f"GFLOP and {ratios['megabytes']:.0%} of the memory (--chunk_length {cheapest.seconds:g})"
        )
    return "\n".join(lines)
