"""Cluster the embeddings of a store, for training that samples evenly from the clusters.

    python scripts/cluster_embeddings.py embeddings/my_teacher/chunk_10 --k 50
    python scripts/cluster_embeddings.py embeddings/my_teacher/chunk_10 --k 10,25,50,100,200

writes beside the store's files, for each k, clusters_kK.parquet (the cluster of every chunk, for `run.py train
--clusters`), clusters_kK.json (sizes and quality) and clusters_kK.png (a map of the clusters, and their sizes). Several
k are compared in a table. k-means with the settings of S-SONDO, over the store's first epoch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import os
import shlex
from typing import Annotated, Any, ClassVar

from common.errors import UserError

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from pydantic import Field

from common.columns import align_columns
from common.files import sha256, write_bytes
from common.options import Options, parse_arguments
from distill.clusters import write_clusters
from distill.embeddings import EmbeddingStore
from scripts.clusters.kmeans import MAX_COMPARED, compute_quality, find_clusters
from scripts.clusters.picture import draw_clusters, project
from training.figures import render_png

logger = logging.getLogger(__name__)


class ClusterOptions(Options):
    """The options of cluster_embeddings.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("store",)

    store: str  # folder of embeddings that save_logits.py wrote
    k: list[Annotated[int, Field(ge=2)]] = Field([50], min_length=1)  # numbers of clusters, separated by commas
    seed: int = Field(42, ge=0, lt=2**32)  # of centres, batches and map
    batch_size: int = Field(10_000, ge=1)  # embeddings a step
    normalize: bool = False  # scale embeddings to length one first, so that their directions are clustered


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Cluster for every k, and print the table and the next command."""
    options = parse_arguments(ClusterOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    store = EmbeddingStore(options.store)
    embeddings = _read_embeddings(store, max(options.k))
    if options.normalize:
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    logger.info("clustering %d embeddings of width %d", *embeddings.shape)
    on_map, positions = project(embeddings, options.seed)
    titles = ("k", "smallest", "median", "largest", "empty", "silhouette", "Calinski-H.", "Davies-B.", "inertia")
    lines, written = [list(titles)], []
    for k in sorted(set(options.k)):
        cluster, inertia = find_clusters(embeddings, k, options.seed, options.batch_size)
        sizes = np.bincount(cluster, minlength=k)
        quality = compute_quality(embeddings, cluster, options.seed)
        facts = {"k": k, "inertia": inertia} | quality | _describe_run(options, store, embeddings, sizes)
        path = store.folder / f"clusters_k{k}.parquet"
        write_clusters(path, store.read_rows(store.epochs[0]), cluster, facts)
        scores = [
            "-" if value is None else f"{value:{form}}"
            for value, form in zip(quality.values(), (".3f", ",.1f", ".2f"), strict=True)
        ]
        title = f"{k} clusters of {len(cluster):,} embeddings\n" + "   ".join(
            map(" ".join, zip(("silhouette", "Calinski-Harabasz", "Davies-Bouldin"), scores, strict=True))
        )
        write_bytes(path.with_suffix(".png"), render_png(draw_clusters(positions, cluster[on_map], sizes, title)))
        counts = [f"{n:,.0f}" for n in (sizes.min(), np.median(sizes), sizes.max(), (sizes == 0).sum())]
        lines.append([str(k), *counts, *scores, f"{inertia:.5g}"])
        written.append(path)
    print(align_columns(lines, ">"))
    print(
        f"silhouette ({MAX_COMPARED:,} embeddings at most) and Calinski-Harabasz: higher is better; Davies-Bouldin: "
        "lower is better"
    )
    print("written     " + "\n            ".join(f"{path}, .json, .png" for path in written))
    print("next        sample training clips evenly from the clusters of one of them:")
    print(f"            python run.py train CONFIG.yaml --clusters {shlex.quote(str(written[0]))} --sampler clusters")


def _read_embeddings(store: EmbeddingStore, n_clusters: int) -> np.ndarray:
    """Return the embeddings (N, E) of a store's first epoch.

    Raises:
        UserError: there are fewer than `n_clusters`, or some are not finite.
    """
    n_rows = len(store.read_rows(store.epochs[0]))
    if n_clusters > n_rows:
        raise UserError(
            f"--k {n_clusters} is more than the number of embeddings in {store.folder}, {n_rows}; use a tenth of "
            "these at most, or store more"
        )
    return store.read(store.epochs[0])


def _describe_run(
    options: ClusterOptions, store: EmbeddingStore, embeddings: np.ndarray, sizes: np.ndarray
) -> dict[str, Any]:
    words = ["python", "scripts/cluster_embeddings.py", options.store, "--k", str(len(sizes))]
    for name in ("seed", "batch_size", "normalize"):
        words += [f"--{name}", str(getattr(options, name)).lower()]
    return {
        "sizes": sizes.tolist(),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "normalize": options.normalize,
        "n_embeddings": len(embeddings),
        "width": store.width,
        "epoch": store.epochs[0],
        "command": shlex.join(words),
        "store_meta_sha256": next(sha256(path) for path in store.folder.glob("meta.*")),
    }


if __name__ == "__main__":
    main()
