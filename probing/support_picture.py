"""The picture of temporal supports: score and cost over the length of the windows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.figures import COLOURS, INK, REFERENCE_LINE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probing.temporal_support import Choice, Support


def draw_supports(
    supports: Sequence["Support"], choice: "Choice", clip_seconds: float, baseline: float | None, title: str
) -> "Figure":
    """Draw the test and validation scores over the length of the windows, and below them the costs.

    Args:
        supports: ascending in length.
        choice: marked with a star (the best) and a circle (the cheapest).
        clip_seconds: length of the clip whose cost was measured.
        baseline: score of simple features; None without.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axis in axes:
        style(axis)
        axis.set_xscale("log")
    _draw_scores(axes[0], supports, choice, baseline)
    _draw_costs(axes[1], supports)
    lengths = [each.seconds for each in supports]
    axes[1].set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[1].set_xlabel("length of the windows in seconds")
    axes[1].set_ylabel(f"cost of a clip of {clip_seconds:.3g} s")
    axes[0].set_title(title, fontsize=10, color=INK, parse_math=False)
    for axis in axes:
        axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize=8, frameon=False, labelcolor=INK)
    figure.align_ylabels(axes)
    return figure


def _draw_scores(axis: "Axes", supports: Sequence["Support"], choice: "Choice", baseline: float | None) -> None:
    lengths = [each.seconds for each in supports]
    values = [each.test.value for each in supports]
    low, high = zip(*(each.test.interval for each in supports), strict=True)
    axis.plot(lengths, values, color=COLOURS[0], marker="o", markersize=4, label="test clips")
    axis.fill_between(lengths, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="95 % interval")
    valid = [each.valid.value for each in supports]
    axis.plot(lengths, valid, color=COLOURS[2], marker="o", markersize=3, linewidth=1, label="validation clips")
    for support, marker, label in ((choice.best, "*", "best"), (choice.cheapest, "o", "cheapest in its interval")):
        point: dict[str, Any] = {"color": COLOURS[1], "linestyle": "", "marker": marker, "markersize": 13}
        point |= {} if marker == "*" else {"markerfacecolor": "none"}
        axis.plot([support.seconds], [support.valid.value], **point, label=f"{label}: {support.seconds:g} s")
    if baseline is not None:
        axis.axhline(baseline, color=COLOURS[3], linewidth=1.2, linestyle="--", label=f"simple features {baseline:.3f}")
    chance = supports[0].test.chance
    axis.axhline(chance, **REFERENCE_LINE, label=f"chance {chance:.3f}")
    axis.set_ylim(0, 1.02)
    axis.set_ylabel(supports[0].test.metric)


def _draw_costs(axis: "Axes", supports: Sequence["Support"]) -> None:
    """Draw each cost relative to its largest."""
    lengths = [each.seconds for each in supports]
    costs = (("ms", "ms a clip", 1), ("gflop", "GFLOP a clip", 4), ("megabytes", "MB a window", 5))
    for name, label, colour in costs:
        values = [getattr(each.cost, name) for each in supports]
        largest = max(values)
        relative = [100 * value / largest for value in values]
        axis.plot(
            lengths, relative, color=COLOURS[colour], marker="o", markersize=4, label=f"{label}: 100 % = {largest:.3g}"
        )
    axis.set_ylim(0, 108)
    axis.yaxis.set_major_formatter("{x:.0f} %")
