"""k-means over embeddings, and scores of its clusters."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

MAX_COMPARED = 10_000  # embeddings for the silhouette, which takes quadratic time


def find_clusters(embeddings: np.ndarray, k: int, seed: int, batch_size: int = 10_000) -> tuple[np.ndarray, float]:
    """Cluster by mini-batch k-means with the settings of S-SONDO.

    Args:
        embeddings: (N, E).
        k: number of clusters, N at most; some are empty if embeddings are equal.
        seed: of the initial centres and the batches.
        batch_size: embeddings a step.

    Returns:
        (N,) int64, the cluster of each, from 0; and the inertia, the sum of squared distances to the centres.
    """
    kmeans = MiniBatchKMeans(
        k,
        init="k-means++",
        n_init=10,
        max_iter=100,
        batch_size=batch_size,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal embeddings; the table counts empty clusters
        kmeans.fit(embeddings)
    return kmeans.labels_.astype(np.int64), float(kmeans.inertia_)


def compute_quality(embeddings: np.ndarray, cluster: np.ndarray, seed: int) -> dict[str, float | None]:
    """Compute scores of clusters (N,) of embeddings (N, E); None where a score is not defined.

    Returns:
        `silhouette`: -1 to 1, higher is better, over at most `MAX_COMPARED` embeddings, sampled by `seed`;
        `calinski_harabasz`: variance between clusters over variance within, higher is better; `davies_bouldin`: mean
        similarity of each cluster to the most similar other one, lower is better.
    """

    def compute(score: Callable[[np.ndarray, np.ndarray], float], rows: np.ndarray | slice) -> float | None:
        is_defined = 1 < len(np.unique(cluster[rows])) < len(cluster[rows])
        return float(score(embeddings[rows], cluster[rows])) if is_defined else None

    every: np.ndarray | slice = slice(None)
    sample = every
    if len(cluster) > MAX_COMPARED:
        sample = np.random.default_rng(seed).choice(len(cluster), MAX_COMPARED, replace=False)
    return {
        "silhouette": compute(silhouette_score, sample),
        "calinski_harabasz": compute(calinski_harabasz_score, every),
        "davies_bouldin": compute(davies_bouldin_score, every),
    }
