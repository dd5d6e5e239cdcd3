"""Clusters of chunks: their files, and weights for drawing clips evenly over clusters.

A file `clusters_kK.parquet` has the rows of an embedding store (`filename`, `start` and `end` in seconds) and the
`cluster` of each, int32; its metadata, and the `.json` beside it, have the settings and the quality of the clusters. A
parquet file of another program needs the four columns only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from audio.manifest import NameIndex
from common.errors import UserError, some
from common.files import whole_file, write_json
from common.parquet import PARQUET_ERRORS, read_parquet
from common.parsing import parse_json

_COLUMNS = {"filename": "text", "start": "number", "end": "number", "cluster": "integer"}
_KEY = b"clusters"  # of the facts in the parquet file's metadata
_MAX_LENGTH = 2**40  # milliseconds of a clip; combines clip and start in one number
_TOLERANCE = 10  # milliseconds: stores have float32 seconds, packs have samples


def write_clusters(path: str | Path, rows: pd.DataFrame, cluster: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write a cluster file and the `.json` beside it, atomically.

    Args:
        path: of the parquet file.
        rows: `filename`, `start`, `end` (seconds) of the N chunks.
        cluster: (N,) from 0.
        facts: plain values: `k`, and further settings and scores.
    """
    table = pyarrow.Table.from_pandas(
        rows[["filename", "start", "end"]].assign(cluster=cluster.astype(np.int32)), preserve_index=False
    )
    metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(facts).encode()}
    path = Path(path)
    write_json(path.with_suffix(".json"), dict(facts))
    with whole_file(path) as file:  # with the facts, so that they always belong to the rows
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), file, compression="brotli")


@dataclass(frozen=True)
class Clusters:
    """The clusters of a store's chunks.

    Attributes:
        path: of the file.
        rows: `filename`, `start`, `end` (seconds) of the N chunks.
        cluster: (N,) int64, from 0.
        k: number of clusters; some may be empty.
        facts: settings and scores; {} in files of another program.
    """

    path: Path
    rows: pd.DataFrame
    cluster: np.ndarray
    k: int
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> "Clusters":
        """Open and check a cluster file.

        Raises:
            UserError: it does not exist, or is not a cluster file.
        """
        path = Path(path)
        make = "make it with `python scripts/cluster_embeddings.py STORE --k 50`, which prints the file it writes"
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; {make}")
        try:
            table = read_parquet(path, _COLUMNS)
            facts = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
            k = int(facts.get("k", 0))
        except PARQUET_ERRORS as error:
            raise UserError(f"{path}: cannot be read as a parquet file of clusters ({error}); {make}") from None
        frame = table.to_pandas()
        cluster = frame["cluster"]
        if not len(cluster) or cluster.min() < 0:
            raise UserError(f"{path}: expected one row or more, and in `cluster` whole numbers from 0; {make}")
        seconds = frame[["start", "end"]].to_numpy(np.float64)
        if not ((seconds >= 0) & (seconds < _MAX_LENGTH / 1000)).all():  # also where one is NaN
            raise UserError(f"{path}: expected in `start` and `end` seconds from the start of a clip; {make}")
        return cls(path, frame[list(_COLUMNS)[:3]], cluster.to_numpy(np.int64), max(k, int(cluster.max()) + 1), facts)

    def assign_items(self, names: Sequence[str], starts: np.ndarray) -> np.ndarray:
        """Return the cluster of each item: that of the stored chunk that contains its start.

        Args:
            names: of the clip that each of the M items is cut from, matched as for soft targets (see `NameIndex`).
            starts: (M,) seconds from the clip's start.

        Returns:
            (M,) int64.

        Raises:
            UserError: items outside all stored chunks.
        """
        codes, unique = pd.factorize(np.asarray(names, dtype=object))
        index = NameIndex([str(name) for name in unique])
        clips = index.find_all(map(str, unique))[codes]  # names that differ only in "./" are one clip
        row_codes, row_names = pd.factorize(self.rows["filename"])
        row_clips = index.find_all(map(str, row_names))[row_codes]
        row_keys = row_clips * _MAX_LENGTH + _milliseconds(self.rows["start"])
        order = np.argsort(row_keys, kind="stable")
        begins = _milliseconds(starts)
        place = np.searchsorted(row_keys[order], clips * _MAX_LENGTH + begins + _TOLERANCE, side="right") - 1
        row = order[np.maximum(place, 0)]
        is_found = (place >= 0) & (row_clips[row] == clips) & (begins < _milliseconds(self.rows["end"])[row])
        if not is_found.all():
            missing = [f"{names[item]} (from {starts[item]:g} s)" for item in np.flatnonzero(~is_found).tolist()]
            raise UserError(
                f"{self.path} has no cluster for {len(missing)} of {len(is_found)} items: {some(missing, 3)}; it has "
                f"{some(row_names, 3)}; make clusters from a store of this pack's embeddings"
            )
        return self.cluster[row]


def _milliseconds(seconds: Any) -> np.ndarray:
    return np.round(np.asarray(seconds, dtype=np.float64) * 1000).astype(np.int64)


def compute_balance(cluster: np.ndarray) -> np.ndarray:
    """Return for each item 1 / (number of given items in its cluster): (M,) float64.

    With these weights, every cluster that occurs is drawn equally often (S-SONDO's balanced data sampling).
    """
    _, inverse, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    return 1.0 / sizes[inverse]
