"""The picture of a head: which classes it confuses, or how well it knows each."""

from typing import TYPE_CHECKING

import numpy as np

from probing.scores import Score
from training.figures import COLOURS, INK, confusion_figure, drawable_labels, style
from training.report import MAX_DRAWN_CLASSES

if TYPE_CHECKING:  # matplotlib takes a second to import, which only those who draw should wait for
    from matplotlib.figure import Figure

MOST_BARS = 60


def probe_figure(result: Score, labels: list[str], title: str) -> "Figure":
    """Return the confusion matrix where clips have one label and it can be read, else average precision a class.

    Args:
        result: of the test clips.
        labels: the C class names.
        title: of the picture.
    """
    confusion = result.metrics.confusion
    if result.metric == "accuracy" and confusion is not None and len(labels) <= MAX_DRAWN_CLASSES:
        figure = confusion_figure(confusion, labels)
        figure.axes[0].set_title(title, fontsize=10, color=INK, parse_math=False)
        return figure
    return precision_figure(result, labels, title)


def precision_figure(result: Score, labels: list[str], title: str) -> "Figure":
    """Return a bar a class, its average precision, best first; of very many classes the best and the worst."""
    from matplotlib.figure import Figure

    precisions = result.metrics.per_class["AP"].to_numpy()
    order = np.argsort(-precisions, kind="stable")[: int(np.isfinite(precisions).sum())]  # NaN sorts last: absent
    if len(order) > MOST_BARS:
        title += f"\nthe {MOST_BARS // 2} classes it knows best, and the {MOST_BARS // 2} it knows worst"
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
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
