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

MAX_POINTS = 5000  # on the map
MAX_NUMBERED = 60  # clusters whose bars are numbered
_N_COMPONENTS = 50  # of the PCA before t-SNE
_FONT_SIZE = 9.0  # of cluster numbers on the map, in points
_MAP_SIZE = np.array([690.0, 580.0])  # in points
_GOLDEN_RATIO = 0.618034  # step of hue: consecutive numbers get different colours


def project(embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Project embeddings to two dimensions by PCA and t-SNE.

    Args:
        embeddings: (N, E).
        seed: of t-SNE, and of the sample if there are more than `MAX_POINTS`.

    Returns:
        (P,) indices of the sampled embeddings, ascending, and their positions (P, 2).
    """
    sample = np.arange(len(embeddings))
    if len(embeddings) > MAX_POINTS:
        sample = np.sort(np.random.default_rng(seed).choice(len(embeddings), MAX_POINTS, replace=False))
    points = embeddings[sample].astype(np.float64)
    spread = np.abs(points - points.mean(axis=0)).max()
    if len(points) < 4 or spread == 0:  # too few, or all equal: t-SNE would fail
        return sample, np.pad(points[:, :2] - points[:, :2].mean(axis=0), ((0, 0), (0, max(0, 2 - points.shape[1]))))
    points = PCA(min(_N_COMPONENTS, *points.shape), random_state=seed).fit_transform(points / spread)
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
    return sample, TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(points)


def draw_clusters(positions: np.ndarray, cluster: np.ndarray, sizes: np.ndarray, title: str) -> "Figure":
    """Draw a map of the clusters and, below it, their sizes, largest first.

    Args:
        positions: (P, 2) of the points on the map.
        cluster: (P,) of each point.
        sizes: (k,) of all clusters, over all embeddings.
        title: above the map.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 11.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.6, 1])
    colours = np.array([_choose_colour(number) for number in range(len(sizes))])
    _draw_map(above, positions, cluster, colours)
    note = "t-SNE: near points are similar; large distances and directions have no meaning"
    if len(cluster) < sizes.sum():
        note = f"{len(cluster):,} of {sizes.sum():,} embeddings, sampled at random. {note}"
    above.set_title(title, fontsize=12, color=INK, pad=10)
    above.set_xlabel(note, fontsize=9, color=INK)
    _draw_sizes(below, sizes, colours)
    return figure


def _choose_colour(number: int) -> tuple[float, float, float]:
    hue = number * _GOLDEN_RATIO % 1
    return colorsys.hsv_to_rgb(hue, (0.8, 0.5, 0.95)[number % 3], (0.85, 0.7, 0.55)[number // 3 % 3])


def _draw_map(axis: "Axes", positions: np.ndarray, cluster: np.ndarray, colours: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    area = float(np.clip(20_000 / max(len(cluster), 1), 7, 40))  # square points
    axis.scatter(positions[:, 0], positions[:, 1], s=area, c=colours[cluster], alpha=0.8, linewidths=0)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for number, x, y, dx, dy in _place_numbers(positions, cluster):
        axis.annotate(
            str(number), (x, y), (dx, dy), textcoords="offset points", ha="center", va="center",
            fontsize=_FONT_SIZE, color=INK, path_effects=halo,
        )  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.margins(0.02)


def _place_numbers(positions: np.ndarray, cluster: np.ndarray) -> Iterator[tuple[int, float, float, float, float]]:
    """Yield the cluster numbers with the point that each is attached to (x, y) and its offset from it, in points.

    A number is placed beside the member nearest to the median of its cluster, at the first offset where it overlaps no
    other number; without such an offset it is omitted. Large clusters come first.
    """
    found, sizes = np.unique(cluster, return_counts=True)
    scale = _MAP_SIZE / np.maximum(np.ptp(positions, axis=0), 1e-9)
    placed: list[np.ndarray] = []
    for number in found[np.argsort(-sizes, kind="stable")]:
        members = positions[cluster == number]
        middle = members[np.abs(members - np.median(members, axis=0)).sum(axis=1).argmin()]
        width = 0.65 * _FONT_SIZE * len(str(number))
        spacing = np.array([width + 2, 1.25 * _FONT_SIZE])  # between the centres of numbers
        for offset in ((0, 9), (0, -9), (6 + width / 2, 0), (-6 - width / 2, 0), (0, 20), (0, -20)):
            centre = middle * scale + offset
            if not any((np.abs(centre - other) < spacing).all() for other in placed):
                placed.append(centre)
                yield int(number), *middle, *offset
                break


def _draw_sizes(axis: "Axes", sizes: np.ndarray, colours: np.ndarray) -> None:
    style(axis)
    order = np.argsort(-sizes, kind="stable")
    axis.bar(range(len(sizes)), sizes[order], color=colours[order], width=0.85)
    mean = sizes.sum() / len(sizes)
    axis.axhline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean: {mean:,.1f}".removesuffix(".0"))
    if len(sizes) <= MAX_NUMBERED:
        axis.set_xticks(range(len(sizes)), [str(number) for number in order], fontsize=9 if len(sizes) <= 30 else 8)
        axis.set_xlabel("cluster, by its number on the map")
    else:
        axis.set_xticks([])
        axis.set_xlabel("clusters, largest first")
    axis.set_xlim(-0.6, len(sizes) - 0.4)
    axis.set_ylabel("embeddings")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper right")
