"""The pictures of a run: its curves and its confusion matrix, drawn without a display and without global state."""

import io
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import, which only those who draw should wait for
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
    "constant_loss",  # has a line of its own kind
)
MAX_POINTS = 2000  # of a line; about as many as the picture has columns
MAX_EPOCH_MARKS = 12
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # told apart also by the colour-blind
INK, FAINT = "#333333", "#DDDDDD"
LABEL_LENGTH = 26  # characters of a class name in a picture


def render_png(figure: "Figure") -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def curves_figure(entries: list[dict[str, Any]]) -> "Figure":
    """Return the curves of a run: losses, validation mAP, gradient norm, rate and speed, over steps and epochs.

    Args:
        entries: the lines of `metrics.jsonl`; panels without any value are left out.
    """
    from matplotlib.figure import Figure

    steps, epochs = ([entry for entry in entries if entry["kind"] == kind] for kind in ("step", "epoch"))
    panels = [(_draw_losses, 3.0)]
    if any("valid_mAP" in entry for entry in epochs):
        panels.append((_draw_validation, 2.2))
    if any("cosine" in entry for entry in epochs):
        panels.append((_draw_cosine, 1.8))
    if any("grad_norm" in entry for entry in epochs):
        panels.append((_draw_gradient, 1.3))
    if any("lr" in entry for entry in entries):
        panels.append((_draw_learning_rate, 1.3))
    if any("clips_per_second" in entry for entry in epochs):
        panels.append((_draw_speed, 1.3))
    heights = [height for _, height in panels]
    figure = Figure(figsize=(10, 1 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (draw, _) in zip(axes, panels, strict=True):
        style(axis)
        draw(axis, steps, epochs)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize=8, frameon=False, labelcolor=INK)
    last = max((entry["step"] for entry in entries), default=1)
    axes[-1].set_xlim(0, last * 1.02)  # the last point and its mark stay inside
    axes[-1].set_xlabel("step")
    _mark_epochs(axes, epochs)
    figure.align_ylabels(axes)
    return figure


def style(axis: "Axes") -> None:
    """Give axes the look of all curves here: faint lines across, no frame, whole numbers below."""
    from matplotlib.ticker import MaxNLocator

    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_epochs(axes: np.ndarray, epochs: list[dict[str, Any]]) -> None:
    """Draw the ends of epochs, at most a dozen, on every panel and name them above the first."""
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
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _line(entries: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the finite values of one figure, few enough to draw."""
    pairs = [(entry["step"], entry[name]) for entry in entries if name in entry and math.isfinite(entry[name])]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    return downsample_line(x, y)


def downsample_line(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points of a line: the lowest and the highest of each stretch, so that spikes stay."""
    if len(x) <= most:
        return x, y
    bounds = np.linspace(0, len(x), most // 2 + 1).astype(int)
    kept = {
        int(start + pick(y[start:end])) for start, end in itertools.pairwise(bounds) for pick in (np.argmin, np.argmax)
    }
    order = sorted(kept)
    return x[order], y[order]


def _plot(axis: "Axes", x: np.ndarray, y: np.ndarray, **options: Any) -> None:
    """Draw a line; with marks where the points are few, since a single one would not show."""
    marks: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(x) <= 40 else {}
    axis.plot(x, y, **(marks | options))


def _draw_losses(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    names = [
        name
        for name in dict.fromkeys(name for entry in [*steps[:1], *epochs[:1]] for name in entry)
        if name not in NOT_LOSSES and not name.startswith("valid_")
    ]
    values = []
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        x, y = _line(steps, name)
        alpha = 0.45 if len(x) < MAX_POINTS // 2 else 0.25  # where a line fills an area, what is behind it shows
        _plot(axis, x, y, color=colour, linewidth=0.8, alpha=alpha, marker="" if len(x) > 1 else "o")
        values.append(y)
        x, y = _line(epochs, name)
        _plot(axis, x, y, color=colour, linewidth=2.2, label=name)
        values.append(y)
    if names:
        axis.plot([], [], color=INK, linewidth=2.2, label="mean of an epoch")
        axis.plot([], [], color=INK, linewidth=0.8, alpha=0.6, label="of a few steps")
    x, y = _line(epochs, "constant_loss")
    if len(x):
        _plot(axis, x, y, color=INK, linewidth=1.2, linestyle=":", marker="", label="constant answers")
    _log_scale_if_wide(axis, np.concatenate([*values, np.empty(0)]))
    axis.set_ylabel("loss")


def _log_scale_if_wide(axis: "Axes", values: np.ndarray) -> None:
    """Use a logarithmic scale where the values, all positive, span more than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not len(values) or values.min() <= 0 or values.max() <= 10 * values.min():
        return
    axis.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_cosine(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    x, y = _line(epochs, "cosine")
    _plot(axis, x, y, color=COLOURS[2], linewidth=1.8, label="student and teacher")
    axis.set_ylabel("cosine")


def _draw_validation(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    x, y = _line(epochs, "valid_mAP")
    _plot(axis, x, y, color=COLOURS[2], linewidth=1.8, label="validation")
    best = max((entry for entry in epochs if "valid_mAP" in entry), key=lambda entry: entry["valid_mAP"])
    axis.plot(
        best["step"],
        best["valid_mAP"],
        color=COLOURS[1],
        marker="*",
        markersize=13,
        linestyle="",
        label=f"best: {best['valid_mAP']:.4f}\n(epoch {best['epoch']})",
    )
    x, y = _line(epochs, "valid_chance_mAP")
    if len(x):
        _plot(axis, x, y, color=INK, linewidth=1.2, linestyle=":", marker="", label="chance, at most")
    axis.set_ylabel("mAP")
    axis.margins(y=0.12)  # the star stays inside


def _draw_gradient(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    x, y = _line(steps, "grad_norm")
    _plot(axis, x, y, color=COLOURS[4], linewidth=0.8, alpha=0.6, marker="" if len(x) > 1 else "o")
    x, means = _line(epochs, "grad_norm")
    _plot(axis, x, means, color=COLOURS[4], linewidth=1.8)
    _log_scale_if_wide(axis, np.concatenate([y, means]))
    axis.set_ylabel("gradient norm")


def _draw_learning_rate(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    x, y = _line(steps if any("lr" in entry for entry in steps) else epochs, "lr")
    _plot(axis, x, y, color=COLOURS[0], linewidth=1.4, marker="" if len(x) > 1 else "o", clip_on=False)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.set_ylabel("learning rate")


def _draw_speed(axis: "Axes", steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    x, y = _line(epochs, "clips_per_second")
    _plot(axis, x, y, color=COLOURS[3], linewidth=1.4, label=f"median {np.median(y):,.0f}" if len(y) else "")
    waits = [entry["wait_share"] for entry in epochs if "wait_share" in entry]
    if waits:
        axis.plot([], [], linestyle="", label=f"waiting for data: {np.mean(waits):.1%}")
    axis.set_ylim(0, max(y.max() * 1.15, 1) if len(y) else 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axis.set_ylabel("clips/s")


def confusion_figure(confusion: np.ndarray, labels: list[str]) -> "Figure":
    """Return the confusion matrix as a picture: shares of each true class as shades, counts of clips as numbers.

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
    # Names are no formulas: without parse_math, two dollar signs in one would start one.
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
    """Return the class names as the font can draw them, long ones cut; a class's number where it cannot."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return [
        f"class {index}"
        if any(ord(character) not in known for character in label)
        else label
        if len(label) <= LABEL_LENGTH
        else label[: LABEL_LENGTH - 3] + "..."
        for index, label in enumerate(labels)
    ]
