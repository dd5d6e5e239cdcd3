"""Areas under the ROC curve and equal error rates of many systems on the same clips, with a paired bootstrap.

The scores of the held-out clips of all folds are pooled before a rate is computed: with a few dozen positive clips, the
rates of single folds jump by several points. Confidence intervals are percentiles over sets of clips drawn with
replacement (Efron, "Bootstrap methods: another look at the jackknife", 1979). The sets are the same for all systems, so
that the difference of two systems has an interval as well.

Letters: N clips, S seeds, E events, R draws.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.columns import format_markdown_table
from common.errors import UserError, some
from probing.scores import COVERAGE, draw_weights
from scripts.sweeps.results import format_csv
from training.figures import COLOURS, INK, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.figure import Figure

N_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval of coverage `COVERAGE`."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> "Interval":
        """Return the interval of a value and its draws, (1 + R,): the first is that of the clips as they are."""
        tail = 50 * (1 - COVERAGE)
        return cls(float(draws[0]), *np.nanpercentile(draws[1:], [tail, 100 - tail]).tolist())


def pool_folds(parts: Iterable[tuple[list[str], np.ndarray]], names: list[str]) -> np.ndarray:
    """Join the scores of the held-out clips of each fold.

    Args:
        parts: names of the clips of a fold, and their scores (clips, E).
        names: of all N clips.

    Returns:
        (N,E) in the order of `names`.

    Raises:
        UserError: a clip is in no fold, in several, or unknown.
    """
    found, scores = [], []
    for clips, values in parts:
        found += clips
        scores += [values]
    expected, given = Counter(names), Counter(found)
    wrong = sorted(name for name in {*names, *found} if expected[name] != 1 or given[name] != 1)
    if wrong:
        raise UserError(f"the folds must have each of the {len(names)} clips once, unlike {some(wrong)}")
    row_of = {name: row for row, name in enumerate(found)}
    return np.concatenate(scores)[[row_of[name] for name in names]]


def draw_clips(n_clips: int, seed: int, n_draws: int = N_DRAWS) -> np.ndarray:
    """Return how often each clip is in each set, (N, 1 + R): once in the first set, then N drawn with replacement."""
    drawn = np.concatenate(list(draw_weights(n_clips, n_draws, seed)), axis=1)
    return np.concatenate([np.ones((n_clips, 1)), drawn], axis=1)


def compute_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve (R,) of sets that have each clip `weights` (N,R) times.

    The share of pairs of a positive and a negative clip with the higher score at the positive one, equal scores half.

    Args:
        scores: (N,).
        positive: (N,) bool.
        weights: a set without positive or negative clips gives NaN.
    """
    pairs = scores[positive][:, None] - scores[~positive]
    above = (pairs > 0) + 0.5 * (pairs == 0)  # (positives, negatives)
    ones, zeros = weights[positive], weights[~positive]
    with np.errstate(invalid="ignore"):
        return (ones * (above @ zeros)).sum(axis=0) / (ones.sum(axis=0) * zeros.sum(axis=0))


def compute_eer(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the equal error rate (R,) of sets of clips, with arguments as `compute_auc`.

    Where the ROC curve, its points joined by straight lines, has as many false alarms as misses.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last clip of each distinct score
    with np.errstate(invalid="ignore"):
        hits, alarms = (
            np.cumsum(np.where(kind[order, None], weights[order], 0), axis=0)[ends] / weights[kind].sum(axis=0)
            for kind in (positive, ~positive)
        )
    hits, alarms = (np.concatenate([np.zeros((1, weights.shape[1])), rates]) for rates in (hits, alarms))
    after = np.argmax(alarms >= 1 - hits, axis=0)  # the first point past the crossing; never the first of the curve
    columns = np.arange(weights.shape[1])
    low, high = ((alarms - (1 - hits))[rows, columns] for rows in (after - 1, after))
    start, end = (alarms[rows, columns] for rows in (after - 1, after))
    with np.errstate(invalid="ignore"):
        return start + (end - start) * -low / (high - low)


def compute_mean_rates(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean AUC and EER over seeds and events of sets of clips.

    Args:
        scores: (S,N,E) of one system.
        positive: (N,E) bool.
        weights: (N, 1 + R), see `draw_clips`.

    Returns:
        "AUC" and "EER" → (1 + R,).
    """
    single = {"AUC": compute_auc, "EER": compute_eer}
    n_seeds, _, n_events = scores.shape
    cells = [(seed, event) for seed in range(n_seeds) for event in range(n_events)]
    return {
        name: np.mean([compute(scores[s][:, e], positive[:, e], weights) for s, e in cells], axis=0)
        for name, compute in single.items()
    }


@dataclass(frozen=True)
class System:
    """The scores of a system on all clips.

    Attributes:
        name: such as "distilled" or "joint4".
        scores: (S,N,E).
        n_bytes: size of the model; None where it is not a network.
    """

    name: str
    scores: np.ndarray
    n_bytes: int | None = None


def list_comparisons(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of systems whose difference is of interest, the second one being the reference."""
    pairs = [("mixtures", "alone"), ("distilled", "alone"), ("distilled", "mixtures"), ("continued", "distilled")]
    known = set(names)
    for name in names:
        if name.startswith("joint"):
            pairs += [(name, "distilled"), (name, "continued"), (name, name.replace("joint", "after"))]
    return [pair for pair in pairs if known.issuperset(pair)]


def describe_systems(systems: list[System], positive: np.ndarray, seed: int = 0) -> tuple[str, str]:
    """Return two tables as Markdown, of systems and of their differences, and both as one CSV.

    Args:
        systems: on the same clips.
        positive: (N,E) bool.
        seed: of the bootstrap.
    """
    weights = draw_clips(len(positive), seed)
    scores = {system.name: system.scores for system in systems}
    rates = {name: compute_mean_rates(values, positive, weights) for name, values in scores.items()}
    rows = [["system", "kB", "seeds", "AUC", "EER, %"]]
    lines: list[tuple[object, ...]] = []
    for system in systems:
        row = [system.name, "" if system.n_bytes is None else f"{system.n_bytes / 1000:.1f}", str(len(system.scores))]
        for metric, scale, digits in (("AUC", 1, 4), ("EER", 100, 2)):
            found = Interval.of(scale * rates[system.name][metric])
            row.append(f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})")
            lines.append((system.name, "", metric, found.value, found.low, found.high))
        rows.append(row)
    changes = [["system", "compared with", "AUC, change in %", "EER, change in points", "EER, change in %"]]
    for name, reference in list_comparisons(rates):
        n_seeds = min(len(scores[name]), len(scores[reference]))  # compared seed by seed
        new, old = (compute_mean_rates(scores[each][:n_seeds], positive, weights) for each in (name, reference))
        row = [name, reference]
        for metric, draws in (
            ("AUC, %", 100 * (new["AUC"] / old["AUC"] - 1)),
            ("EER, points", 100 * (new["EER"] - old["EER"])),
            ("EER, %", 100 * (new["EER"] / np.where(old["EER"] > 0, old["EER"], np.nan) - 1)),
        ):
            found = Interval.of(draws)
            digits = 0 if metric == "EER, %" else 2
            row.append(f"{found.value:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})")
            lines.append((name, reference, metric, found.value, found.low, found.high))
        changes.append(row)
    text = f"{format_markdown_table(rows)}\n\n{format_markdown_table(changes, '<<>')}\n"
    return text, format_csv(lines, ["system", "compared_with", "metric", "value", "low", "high"])


def draw_systems(systems: list[System], positive: np.ndarray, seed: int = 0) -> "Figure":
    """Draw AUC and EER of networks over their size, with intervals."""
    from matplotlib.figure import Figure

    weights = draw_clips(len(positive), seed)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    sized = [system for system in systems if system.n_bytes]
    kinds = list(dict.fromkeys(system.name.rstrip("0123456789") for system in sized))
    for axis in axes:
        style(axis)
        axis.set_xscale("log")
        axis.set_xlabel("kB, without front-end")
        axis.set_xticks([100, 200, 500, 1000, 2000, 5000], ["100", "200", "500", "1000", "2000", "5000"])
    for index, kind in enumerate(kinds):
        members = [system for system in sized if system.name.rstrip("0123456789") == kind]
        rates = [compute_mean_rates(system.scores, positive, weights) for system in members]
        for axis, metric, scale in ((axes[0], "EER", 100), (axes[1], "AUC", 1)):
            found = [Interval.of(scale * each[metric]) for each in rates]
            values = [each.value for each in found]
            spread = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
            shift = 1 + 0.025 * (index - len(kinds) / 2)  # else intervals of one size cover each other
            sizes = [shift * (system.n_bytes or 0) / 1000 for system in members]
            colour, line = (*COLOURS, INK)[index % (len(COLOURS) + 1)], "-" if len(members) > 1 else ""
            axis.errorbar(sizes, values, spread, color=colour, marker="o", linestyle=line, capsize=3, label=kind)
    axes[0].set_ylabel("EER, %")
    axes[1].set_ylabel("AUC")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, labelcolor=INK)
    return figure
