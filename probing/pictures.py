"""The figure of a head: its confusion matrix, or its average precision for each class."""

from typing import TYPE_CHECKING

import numpy as np

from probing.scores import Score
from training.figures import COLOURS, INK, confusion_figure, drawable_labels, style
from training.report import MAX_DRAWN_CLASSES

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.figure import Figure

MAX_BARS = 60


def draw_probe(result: Score, labels: list[str], title: str) -> "Figure":
    """Draw the confusion matrix for clips of one label and few classes, else the average precision of each class.

    Args:
        result: of the test clips.
        labels: the C class names.
        title: of the figure.
    """
    confusion = result.metrics.confusion
    if result.metric == "accuracy" and confusion is not None and len(labels) <= MAX_DRAWN_CLASSES:
        figure = confusion_figure(confusion, labels)
        figure.axes[0].set_title(title, fontsize=10, color=INK, parse_math=False)
        return figure
    return draw_precisions(result, labels, title)


def draw_precisions(result: Score, labels: list[str], title: str) -> "Figure":
    """Draw the average precision of each class as a bar, best first; of very many classes the best and the worst."""
    from matplotlib.figure import Figure

    precisions = result.metrics.per_class["AP"].to_numpy()
    # Classes without clips are NaN, which sorts last.
    order = np.argsort(-precisions, kind="stable")[: int(np.isfinite(precisions).sum())]
    if len(order) > MAX_BARS:
        title += f"\nthe {MAX_BARS // 2} best classes and the {MAX_BARS // 2} worst"
        order = np.concatenate([order[: MAX_BARS // 2], order[-MAX_BARS // 2 :]])
    names = drawable_labels(labels)
    counts = result.metrics.per_class["n_positive"].to_numpy()
    figure = Figure(figsize=(8, 1.4 + 0.22 * len(order)), layout="constrained")
    axis = figure.subplots()
    style(axis)
    places = np.arange(len(order))
    axis.barh(places, precisions[order], color=COLOURS[4], height=0.7)
    for place, row in enumerate(order):
        axis.text(1.02, place, f"{precisions[row]:.2f}", va="center", fontsize=7, color=INK)
    ticks = [f"{names[row]} ({counts[row]})" for row in order]
    axis.set_yticks(places, ticks, fontsize=8, color=INK, parse_math=False)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.grid(visible=False, axis="y")
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.xaxis.set_major_formatter("{x:.1f}")
    axis.set_xlim(0, 1.08)
    mean = result.metrics.mAP
    axis.axvline(mean, color=COLOURS[1], linewidth=1.2, label=f"mean over classes (mAP) {mean:.3f}")
    axis.axvline(result.chance, color=INK, linewidth=1, linestyle=":", label=f"chance {result.chance:.3f}")
    axis.set_xlabel("average precision (in brackets: clips of the class)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axis.set_title(title, fontsize=10, color=INK, parse_math=False)
    return figure
