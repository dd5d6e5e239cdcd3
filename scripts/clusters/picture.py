"""A map of clusters in two dimensions, and their sizes."""

import colorsys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from training.figures import INK, style

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 5000  # on the map
MOST_NUMBERS = 60  # clusters whose bars are numbered
_N_COMPONENTS = 50  # what PCA leaves for t-SNE
_FONT_SIZE = 9.0  # of their numbers on the map, in points
_MAP_POINTS = np.array([690.0, 580.0])  # the map's size, in points
_GOLDEN = 0.618034  # of a turn of hue: neighbouring numbers get colours far apart


def flatten(embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Place embeddings on a plane: PCA, then t-SNE, so that neighbours stay neighbours.

    Args:
        embeddings: (N, E).
        seed: of t-SNE, and of the choice where there are more than `MOST_POINTS`.

    Returns:
        (P,) which embeddings are on the map, ascending, and (P, 2) where.
    """
    chosen = np.arange(len(embeddings))
    if len(embeddings) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(embeddings), MOST_POINTS, replace=False))
    points = embeddings[chosen].astype(np.float64)
    spread = np.abs(points - points.mean(axis=0)).max()
    if len(points) < 4 or spread == 0:  # too few, or all alike: nothing to lay out
        return chosen, np.pad(points[:, :2] - points[:, :2].mean(axis=0), ((0, 0), (0, max(0, 2 - points.shape[1]))))
    points = PCA(min(_N_COMPONENTS, *points.shape), random_state=seed).fit_transform(points / spread)
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
    return chosen, TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(points)


def figure(place: np.ndarray, own: np.ndarray, sizes: np.ndarray, title: str) -> "Figure":
    """Draw the map and, below it, the sizes of the clusters, largest first.

    Args:
        place: (P, 2) where the points on the map are.
        own: (P,) their clusters.
        sizes: (k,) of all clusters, counted over all embeddings.
        title: above the map.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 11.5), layout="constrained")
    above, below = drawn.subplots(2, 1, height_ratios=[3.6, 1])
    colours = np.array([_colour(number) for number in range(len(sizes))])
    _draw_map(above, place, own, colours)
    some = "" if len(own) == sizes.sum() else f"{len(own):,} of {sizes.sum():,} embeddings, drawn at random. "
    note = f"{some}t-SNE: near points are alike; large distances and directions mean nothing"
    above.set_title(title, fontsize=12, color=INK, pad=10)
    above.set_xlabel(note, fontsize=9, color=INK)
    _draw_sizes(below, sizes, colours)
    return drawn


def _colour(number: int) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(number * _GOLDEN % 1, (0.8, 0.5, 0.95)[number % 3], (0.85, 0.7, 0.55)[number // 3 % 3])


def _draw_map(axis: "Axes", place: np.ndarray, own: np.ndarray, colours: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    area = float(np.clip(20_000 / max(len(own), 1), 7, 40))  # square points
    axis.scatter(place[:, 0], place[:, 1], s=area, c=colours[own], alpha=0.8, linewidths=0)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for number, x, y, dx, dy in _numbers(place, own):
        axis.annotate(
            str(number), (x, y), (dx, dy), textcoords="offset points", ha="center", va="center",
            fontsize=_FONT_SIZE, color=INK, path_effects=halo,
        )  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.margins(0.02)


def _numbers(place: np.ndarray, own: np.ndarray) -> Iterator[tuple[int, float, float, float, float]]:
    """Yield where the clusters' numbers go: the number, the point it belongs to, and how far from that, in points.

    The number stands beside the member nearest to the middle of its cluster, on a side where it covers no other number;
    where there is none, it is left out. Large clusters come first.
    """
    found, sizes = np.unique(own, return_counts=True)
    scale = _MAP_POINTS / np.maximum(np.ptp(place, axis=0), 1e-9)
    taken: list[np.ndarray] = []
    for number in found[np.argsort(-sizes, kind="stable")]:
        members = place[own == number]
        middle = members[np.abs(members - np.median(members, axis=0)).sum(axis=1).argmin()]
        width = 0.65 * _FONT_SIZE * len(str(number))
        room = np.array([width + 2, 1.25 * _FONT_SIZE])  # that numbers keep between their centres
        for offset in ((0, 9), (0, -9), (6 + width / 2, 0), (-6 - width / 2, 0), (0, 20), (0, -20)):
            centre = middle * scale + offset
            if not any((np.abs(centre - other) < room).all() for other in taken):
                taken.append(centre)
                yield int(number), *middle, *offset
                break


def _draw_sizes(axis: "Axes", sizes: np.ndarray, colours: np.ndarray) -> None:
    style(axis)
    order = np.argsort(-sizes, kind="stable")
    axis.bar(range(len(sizes)), sizes[order], color=colours[order], width=0.85)
    even = sizes.sum() / len(sizes)
    axis.axhline(
        even, color=INK, linewidth=1, linestyle="--", label=f"if all were equal: {even:,.1f}".removesuffix(".0")
    )
    if len(sizes) <= MOST_NUMBERS:
        axis.set_xticks(range(len(sizes)), [str(number) for number in order], fontsize=9 if len(sizes) <= 30 else 8)
        axis.set_xlabel("cluster, by its number on the map")
    else:
        axis.set_xticks([])
        axis.set_xlabel("clusters, largest first")
    axis.set_xlim(-0.6, len(sizes) - 0.4)
    axis.set_ylabel("embeddings")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper right")
