"""Plots of a run: its curves and its confusion matrix, drawn without a display and without global state."""

import io
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.objectives.collapse import MIN_VARIANCE, VARIANCE, WATCHED

if TYPE_CHECKING:  # matplotlib takes a second to import: only functions that draw import it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_LOSSES: tuple[str, ...] = (
    "kind",
    "step",
    "epoch",
    "best",
    "learns",
    "lr",
    "clips_per_second",
    "wait_share",
    "cosine",
    "grad_norm",
    "constant_loss",  # drawn as a dotted line
    *WATCHED,
)
MAX_POINTS = 2000  # of a line: about the width of the plot in pixels
MAX_EPOCH_MARKS = 12
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)  # of Okabe and Ito
INK, FAINT = "#333333", "#DDDDDD"
LABEL_LENGTH = 26  # characters of a class name in a plot
REFERENCE_LINE: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": ":"}


def render_png(figure: "Figure") -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def curves_figure(entries: list[dict[str, Any]]) -> "Figure":
    """Return the curves of a run: losses, validation mAP, gradient norm, learning rate and speed over the steps.

    Args:
        entries: the lines of `metrics.jsonl`; panels without any value are left out.
    """
    from matplotlib.figure import Figure

    steps, epochs = ([entry for entry in entries if entry["kind"] == kind] for kind in ("step", "epoch"))
    panels = [(height, draw) for name, height, draw in PANELS if any(name in entry for entry in entries)]
    panels.insert(0, (3.0, _draw_losses))
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(10, 1 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (_, draw) in zip(axes, panels, strict=True):
        style(axis)
        draw(axis, steps, epochs)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize=8, frameon=False, labelcolor=INK)
    last = max((entry["step"] for entry in entries), default=1)
    axes[-1].set_xlim(0, last * 1.02)  # margin for the last point and its mark
    axes[-1].set_xlabel("step")
    _mark_epochs(axes, epochs)
    figure.align_ylabels(axes)
    return figure


def style(axis: "Axes") -> None:
    """Set the common style of curves: faint horizontal lines, no frame, whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_epochs(axes: np.ndarray, epochs: list[dict[str, Any]]) -> None:
    """Mark the ends of epochs, at most a dozen, on every panel, and number them above the first one."""
    if not epochs:
        return
    every = _round_interval(epochs[-1]["epoch"] / MAX_EPOCH_MARKS)
    marked = [entry for entry in epochs if entry["epoch"] % every == 0] or epochs[-1:]
    for axis in axes:
        for entry in marked:
            axis.axvline(entry["step"], color=FAINT, linewidth=0.6, zorder=0)
    top = axes[0].secondary_xaxis("top")
    top.set_xticks([entry["step"] for entry in marked], [str(entry["epoch"]) for entry in marked])
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=8, colors=INK, length=2)
    top.set_xlabel("epoch (its end)", fontsize=9)


def _round_interval(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def downsample_line(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `max_points` points of a line: the minimum and maximum of each interval, which keeps spikes."""
    if len(x) <= max_points:
        return x, y
    bounds = np.linspace(0, len(x), max_points // 2 + 1).astype(int)
    extrema = {
        int(start + pick(y[start:end])) for start, end in itertools.pairwise(bounds) for pick in (np.argmin, np.argmax)
    }
    order = sorted(extrema)
    return x[order], y[order]


def _draw_line(
    axis: "Axes", entries: list[dict[str, Any]], name: str, max_marks: int = 40, **options: Any
) -> np.ndarray:
    """Draw the finite values of one metric over the steps, with marks up to so many points; return these values."""
    pairs = [(entry["step"], entry[name]) for entry in entries if name in entry and math.isfinite(entry[name])]
    x, y = downsample_line(*np.array(pairs, float).reshape(-1, 2).T)
    if len(x):
        marks: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(x) <= max_marks else {}
        axis.plot(x, y, **({"linewidth": 1.4} | marks | options))
    return y


def _draw_losses(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    names = [
        name
        for name in dict.fromkeys(name for entry in [*steps[:1], *epochs[:1]] for name in entry)
        if name not in NOT_LOSSES and not name.startswith(("valid_", "cosine_"))
    ]
    values = []
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        alpha = 0.45 if len(steps) < MAX_POINTS // 2 else 0.25  # a line that fills an area must not hide the others
        values.append(_draw_line(axis, steps, name, 1, color=colour, linewidth=0.8, alpha=alpha))
        values.append(_draw_line(axis, epochs, name, color=colour, linewidth=2.2, label=name))
    if names:
        axis.plot([], [], color=INK, linewidth=2.2, label="mean over an epoch")
        axis.plot([], [], color=INK, linewidth=0.8, alpha=0.6, label="mean over a few steps")
    values.append(_draw_line(axis, epochs, "constant_loss", 0, **REFERENCE_LINE, label="constant output"))
    _log_scale_if_wide(axis, np.concatenate(values))
    axis.set_ylabel("loss")


def _log_scale_if_wide(axis: "Axes", values: np.ndarray) -> None:
    """Use a logarithmic scale if the values are positive and span more than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not len(values) or values.min() <= 0 or values.max() <= 10 * values.min():
        return
    axis.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_cosine(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    each = [name for name in dict.fromkeys(name for entry in epochs[:1] for name in entry) if "cosine_" in name]
    label = "student and teacher" if not each else "mean over the teachers"
    _draw_line(axis, epochs, "cosine", color=COLOURS[2], linewidth=1.8, label=label)
    for index, name in enumerate(each):
        colour = COLOURS[(index + 3) % len(COLOURS)]
        _draw_line(axis, epochs, name, color=colour, linewidth=1.2, label=f"teacher {name.removeprefix('cosine_')}")
    axis.set_ylabel("cosine")


def _draw_variance(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    for name, colour in zip(WATCHED, COLOURS[: len(WATCHED)], strict=True):
        _draw_line(axis, epochs, name, color=colour, linewidth=1.8, label=name.replace("_", " "))
    axis.axhline(MIN_VARIANCE, **REFERENCE_LINE, label="variance: collapse")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("collapse")


def _draw_validation(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    _draw_line(axis, epochs, "valid_mAP", color=COLOURS[2], linewidth=1.8, label="validation")
    best = max((entry for entry in epochs if "valid_mAP" in entry), key=lambda entry: entry["valid_mAP"])
    label = f"best: {best['valid_mAP']:.4f}\n(epoch {best['epoch']})"
    star: dict[str, Any] = {"color": COLOURS[1], "marker": "*", "markersize": 13, "linestyle": ""}
    axis.plot(best["step"], best["valid_mAP"], **star, label=label)
    _draw_line(axis, epochs, "valid_chance_mAP", 0, **REFERENCE_LINE, label="chance (upper bound)")
    axis.set_ylabel("mAP")
    axis.margins(y=0.12)  # margin for the star


def _draw_gradient(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    values = _draw_line(axis, steps, "grad_norm", 1, color=COLOURS[4], linewidth=0.8, alpha=0.6)
    means = _draw_line(axis, epochs, "grad_norm", color=COLOURS[4], linewidth=1.8)
    _log_scale_if_wide(axis, np.concatenate([values, means]))
    axis.set_ylabel("gradient norm")


def _draw_learning_rate(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    _draw_line(axis, steps or epochs, "lr", 1, color=COLOURS[0], clip_on=False)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.set_ylabel("learning rate")


def _draw_speed(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    speeds = [entry["clips_per_second"] for entry in epochs if "clips_per_second" in entry]
    _draw_line(axis, epochs, "clips_per_second", color=COLOURS[3], label=f"median {np.median(speeds):,.0f}")
    waits = [entry["wait_share"] for entry in epochs if "wait_share" in entry]
    if waits:
        axis.plot([], [], linestyle="", label=f"waiting for data: {np.mean(waits):.1%}")
    axis.set_ylim(0, max(*speeds, 1) * 1.15)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axis.set_ylabel("clips/s")


# Further panels: the metric that it needs, its height in inches, and the function that draws it.
PANELS: tuple[tuple[str, float, Callable[["Axes", list[dict[str, Any]], list[dict[str, Any]]], None]], ...] = (
    ("valid_mAP", 2.2, _draw_validation),
    ("cosine", 1.8, _draw_cosine),
    (VARIANCE, 1.8, _draw_variance),
    ("grad_norm", 1.3, _draw_gradient),
    ("lr", 1.3, _draw_learning_rate),
    ("clips_per_second", 1.3, _draw_speed),
)


def confusion_figure(confusion: np.ndarray, labels: list[str]) -> "Figure":
    """Return the plot of a confusion matrix: shares of each true class as colours, counts of clips as numbers.

    Args:
        confusion: (C, C) counts, rows the true class; readable up to about 50 classes.
        labels: the C class names.
    """
    from matplotlib.figure import Figure

    n_classes = len(labels)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    cell = min(0.62, max(0.24, 9 / n_classes))  # inches
    digits = len(str(confusion.max()))
    size = min(9.0, cell * 72 / (0.75 * max(digits, 2)))  # points, so that the longest number fits its cell
    side = cell * n_classes + 2.4
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else INK
        axis.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=size, color=colour)
    names = drawable_labels(labels)
    # parse_math: two dollar signs in a class name would start a formula.
    options: dict[str, Any] = {"fontsize": 9 if n_classes <= 25 else 7.5, "color": INK, "parse_math": False}
    axis.set_yticks(range(n_classes), names, **options)
    axis.set_xticks(range(n_classes), names, rotation=90 if max(map(len, names)) > 5 else 0, **options)
    axis.set_xticks(np.arange(n_classes - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(n_classes - 1) + 0.5, minor=True)
    axis.grid(which="minor", color=FAINT, linewidth=0.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_color(FAINT)
    axis.set_xlabel("predicted class (highest score)")
    axis.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02, format=lambda value, _: f"{value:.0%}")
    bar.set_label("share of the clips of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def drawable_labels(labels: list[str]) -> list[str]:
    """Return the class names for a plot: long ones are cut, those with characters missing in the font are numbered."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    available = get_font(findfont(FontProperties())).get_charmap()
    return [
        f"class {index}"
        if any(ord(character) not in available for character in label)
        else label
        if len(label) <= LABEL_LENGTH
        else label[: LABEL_LENGTH - 3] + "..."
        for index, label in enumerate(labels)
    ]
