"""Group the embeddings of a store into clusters, from which training can draw evenly.

    python scripts/cluster_embeddings.py embeddings/my_teacher/chunk_10 --k 50
    python scripts/cluster_embeddings.py embeddings/my_teacher/chunk_10 --k 10,25,50,100,200

writes beside the store's files, for each k, clusters_kK.parquet (the cluster of every chunk; give this one to
training), clusters_kK.json (sizes and figures of quality) and clusters_kK.png (a map of the clusters, and their sizes).
Several k at once make a table to choose from. k-means as S-SONDO has it, over the store's first epoch.
"""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

# As in run.py: before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

from common.columns import align_columns
from common.errors import Faults, UserError, print_user_errors
from common.files import sha256, whole_file
from common.options import Options, parse_arguments
from distill.clusters import write_clusters
from distill.embeddings import EmbeddingStore
from scripts.clusters.kmeans import MOST_COMPARED, find_clusters, quality
from scripts.clusters.picture import figure, flatten
from training.figures import png

logger = logging.getLogger(__name__)

_COLUMNS = ("k", "smallest", "median", "largest", "empty", "silhouette", "Calinski-H.", "Davies-B.", "inertia")


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
    """Cluster for every k, and print the table and what to do next."""
    options = parse_arguments(ClusterOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    store, embeddings, ks = _opened(options)
    if options.normalize:
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    logger.info("clustering %d embeddings of width %d", *embeddings.shape)
    on_map, place = flatten(embeddings, options.seed)
    lines, written = [], []
    for k in ks:
        cluster, inertia = find_clusters(embeddings, k, options.seed, options.batch_size)
        sizes = np.bincount(cluster, minlength=k)
        said = {"k": k, "inertia": inertia} | quality(embeddings, cluster, options.seed)
        path = store.folder / f"clusters_k{k}.parquet"
        write_clusters(path, store.rows(store.epochs[0]), cluster, said | _facts(options, store, embeddings, sizes))
        with whole_file(path.with_suffix(".png")) as partial:
            partial.write_bytes(png(figure(place, cluster[on_map], sizes, _title(said, len(cluster)))))
        lines.append(_line(said, sizes))
        written.append(path)
    print("\n".join(align_columns([_COLUMNS, *lines], ">", ">")))
    print(
        f"silhouette ({MOST_COMPARED:,} embeddings at most) and Calinski-Harabasz: higher is better; Davies-Bouldin: "
        "lower is better"
    )
    print("written     " + "\n            ".join(f"{path}, .json, .png" for path in written))
    print("next        draw training clips evenly over the clusters of one of them:")
    print(f"            python run.py train CONFIG.yaml --clusters {shlex.quote(str(written[0]))} --sampler clusters")


def _opened(options: ClusterOptions) -> tuple[EmbeddingStore, np.ndarray, list[int]]:
    """Return the store, its embeddings (N, E) and the k asked for; tell all that is wrong at once."""
    faults = Faults("the command")
    ks = sorted(set(options.k))
    store = None
    with faults.noted():
        store = EmbeddingStore(options.store)
        n_embeddings = len(store.rows(store.epochs[0]))
        if max(ks, default=0) > n_embeddings:
            faults.add(
                f"--k {max(ks)} wants more clusters than there are embeddings in {store.folder}, {n_embeddings}; give "
                "fewer, a tenth of these at most, say, or store more"
            )
    faults.raise_if_any()
    if store is None:
        raise RuntimeError("a store that cannot be opened is a fault")
    embeddings = store.read(store.epochs[0])
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        names = store.rows(store.epochs[0])["filename"]
        raise UserError(
            f"{store.folder}: {len(wrong)} of its {len(embeddings)} embeddings hold values that are not finite, the "
            f"first of {names[wrong[0]]}; float16 ends at 65504: scale the teacher's embeddings down, save them again"
        )
    return store, embeddings, ks


def _facts(options: ClusterOptions, store: EmbeddingStore, embeddings: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    words = ["python", "scripts/cluster_embeddings.py", options.store, "--k", str(len(sizes))]
    words += [
        "--seed",
        str(options.seed),
        "--batch_size",
        str(options.batch_size),
        "--normalize",
        str(options.normalize).lower(),
    ]
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


def _title(said: dict[str, Any], n_embeddings: int) -> str:
    figures = {
        "silhouette": _text(said["silhouette"], ".3f"),
        "Calinski-Harabasz": _text(said["calinski_harabasz"], ",.1f"),
        "Davies-Bouldin": _text(said["davies_bouldin"], ".2f"),
    }
    shown = "   ".join(f"{name} {value}" for name, value in figures.items())
    return f"{said['k']} clusters of {n_embeddings:,} embeddings\n{shown}"


def _line(said: dict[str, Any], sizes: np.ndarray) -> list[str]:
    return [
        str(said["k"]),
        *(f"{value:,.0f}" for value in (sizes.min(), np.median(sizes), sizes.max(), (sizes == 0).sum())),
        _text(said["silhouette"], ".3f"),
        _text(said["calinski_harabasz"], ",.1f"),
        _text(said["davies_bouldin"], ".2f"),
        f"{said['inertia']:.5g}",
    ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
