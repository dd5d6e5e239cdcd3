"""The plot of ROC and DET curves of single classes."""

from typing import TYPE_CHECKING, Any

import numpy as np

from training.figures import COLOURS, FAINT, INK, drawable_labels
from training.ranking import Curve

if TYPE_CHECKING:  # matplotlib takes a second to import: only functions that draw import it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rates at the ticks of a DET plot; both axes begin at the first that is below all rates that occur, at 2 % at most.
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
LARGEST = 0.6  # at the other end, unless an equal error rate is higher
STYLES = ("-", "--")  # there are fewer colours than curves


def detection_figure(curves: list[Curve]) -> "Figure":
    """Return the plot of ROC curves and, on the right, of DET curves, with equal error rates as dots.

    A DET plot has the rates of false alarms and misses on normal-deviate axes, where the curve of normally distributed
    scores is straight (Martin, Doddington, Kamm, Ordowski and Przybocki, "The DET curve in assessment of detection
    task performance", Eurospeech 1997). A rate of 0 is at its edge.

    Args:
        curves: up to a dozen are readable.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    roc, det = figure.subplots(1, 2)
    lowest, largest = _choose_limits(curves)
    _set_up_roc(roc)
    _set_up_det(det, lowest, largest)
    names = drawable_labels([curve.name for curve in curves])
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        label = name if curve.eer is None else f"{name} (EER {curve.eer:.1%})"
        line: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.6}
        line["linestyle"] = STYLES[index // len(COLOURS) % len(STYLES)]
        roc.plot(curve.false_alarms, 1 - curve.misses, **line)
        det.plot(_deviate(curve.false_alarms, lowest), _deviate(curve.misses, lowest), **line, label=label)
        if curve.eer is not None:
            dot: dict[str, Any] = {"color": line["color"], "marker": "o", "clip_on": False, "zorder": 3}
            roc.plot(curve.eer, 1 - curve.eer, **dot, markersize=5)
            det.plot(_deviate(curve.eer, lowest), _deviate(curve.eer, lowest), **dot, markersize=5)
    # parse_math of texts cannot be set in a legend: a dollar sign would start a formula
    legend = figure.legend(loc="outside right center", fontsize=8.5, frameon=False, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _choose_limits(curves: list[Curve]) -> tuple[float, float]:
    """Return the lowest and the highest rate of the DET plot."""
    rates = np.concatenate([side for curve in curves for side in (curve.false_alarms, curve.misses)])
    smallest = float(rates[rates > 0].min())
    worst = max((curve.eer for curve in curves if curve.eer is not None), default=0.0)
    lowest = max((tick for tick in TICKS if tick <= smallest), default=TICKS[0])
    return min(lowest, 0.02), max(LARGEST, min(0.98, 1.2 * worst))


def _deviate(rate: Any, lowest: float) -> Any:
    """Return the normal deviate of rates, those of 0 and 1 at the edges of the plot."""
    from scipy.special import ndtri

    return ndtri(np.clip(rate, lowest, 1 - lowest))


def _set_up_roc(axis: "Axes") -> None:
    axis.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")  # random scores
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarms (% of the negatives)", title="ROC")
    axis.set_ylabel("detections (% of the positives)")
    _set_ticks(axis, np.linspace(0, 1, 6), ["0", "20", "40", "60", "80", "100"])


def _set_up_det(axis: "Axes", lowest: float, largest: float) -> None:
    ticks = [tick for tick in TICKS if lowest <= tick <= largest]
    limits = (_deviate(lowest, lowest), _deviate(largest, lowest))
    axis.plot(limits, limits, color=INK, linewidth=1, linestyle=":")  # equal rates
    axis.set(xlim=limits, ylim=limits, xlabel="false alarms (% of the negatives)", title="DET")
    axis.set_ylabel("misses (% of the positives)")
    _set_ticks(axis, _deviate(ticks, lowest), [f"{100 * tick:g}" for tick in ticks])


def _set_ticks(axis: "Axes", places: Any, texts: list[str]) -> None:
    axis.set_xticks(places, texts)
    axis.set_yticks(places, texts)
    axis.set_aspect("equal")
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.title.set_fontsize(11)
