"""k-means over embeddings, and figures that say how well its clusters are told apart."""

import warnings

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

MOST_COMPARED = 10_000  # embeddings for the silhouette, which compares each with each


def find_clusters(embeddings: np.ndarray, k: int, seed: int, batch_size: int = 10_000) -> tuple[np.ndarray, float]:
    """Cluster by mini-batch k-means with the settings of S-SONDO.

    Args:
        embeddings: (N, E).
        k: how many clusters, N at most; fewer hold anything where embeddings are equal.
        seed: of the starting centres and the batches.
        batch_size: embeddings a step.

    Returns:
        (N,) int64, the cluster of each from 0; and the inertia, the sum of squared distances to the centres.
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
        warnings.simplefilter("ignore", ConvergenceWarning)  # of equal embeddings: the table counts empty clusters
        kmeans.fit(embeddings)
    return kmeans.labels_.astype(np.int64), float(kmeans.inertia_)


def quality(embeddings: np.ndarray, cluster: np.ndarray, seed: int) -> dict[str, float | None]:
    """Judge clusters (N,) of embeddings (N, E); None where a figure has no meaning.

    Returns:
        `silhouette`: -1 to 1, higher is better, over `MOST_COMPARED` embeddings that `seed` draws at most;
        `calinski_harabasz`: spread between clusters over spread within, higher is better; `davies_bouldin`: likeness of
        each cluster to its nearest other, lower is better.
    """
    chosen = np.arange(len(cluster))
    if len(cluster) > MOST_COMPARED:
        chosen = np.random.default_rng(seed).choice(len(cluster), MOST_COMPARED, replace=False)
    return {
        "silhouette": float(silhouette_score(embeddings[chosen], cluster[chosen])) if _told(cluster[chosen]) else None,
        "calinski_harabasz": float(calinski_harabasz_score(embeddings, cluster)) if _told(cluster) else None,
        "davies_bouldin": float(davies_bouldin_score(embeddings, cluster)) if _told(cluster) else None,
    }


def _told(cluster: np.ndarray) -> bool:
    """Whether there are several clusters, one of them with several members."""
    return 1 < len(np.unique(cluster)) < len(cluster)
