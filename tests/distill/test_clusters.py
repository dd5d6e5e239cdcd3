import json

import numpy as np
import pandas as pd
import pytest

from common.errors import UserError
from distill.clusters import Clusters, compute_balance, write_clusters

# three chunks of a long clip, one of a short one, and two clips of one stem in two folders
ROWS = pd.DataFrame(
    {
        "filename": ["d/long.wav", "d/short.wav", "d/long.wav", "d/long.wav", "x/same.wav", "y/same.wav"],
        "start": np.array([10, 0, 0, 20, 0, 0], np.float32),
        "end": np.array([20, 4, 10, 23.5, 10, 10], np.float32),
        "n_reference": 1,
    }
)
CLUSTER = np.array([4, 1, 0, 2, 1, 4])


@pytest.fixture
def written(tmp_path):
    write_clusters(tmp_path / "clusters_k6.parquet", ROWS, CLUSTER, {"k": 6, "silhouette": None, "seed": 42})
    return tmp_path / "clusters_k6.parquet"


def test_what_is_written_is_read(written):
    clusters = Clusters.read(written)
    assert clusters.cluster.tolist() == CLUSTER.tolist()
    assert clusters.cluster.dtype == np.int64
    assert (clusters.k, clusters.facts) == (6, {"k": 6, "silhouette": None, "seed": 42})
    pd.testing.assert_frame_equal(clusters.rows, ROWS[["filename", "start", "end"]], check_dtype=False)
    assert json.loads(written.with_suffix(".json").read_text()) == clusters.facts
    assert pd.read_parquet(written)["cluster"].dtype == np.int32
    assert len(list(written.parent.iterdir())) == 2


def test_items_find_the_chunk_that_they_start_in(written):
    clusters = Clusters.read(written)
    names = ["long.ogg", "long.ogg", "e/d/short.wav", "long.ogg", "long.ogg", "y/same.wav", "a/x/same.wav", "long.ogg"]
    starts = np.array([0, 10.0004, 0, 20, 9.994, 0, 0, 15])  # float32 blurs late starts; 5-s chunks lie in 10-s ones
    assert clusters.assign_items(names, starts).tolist() == [0, 4, 1, 2, 4, 4, 1, 4]
    assert clusters.assign_items(names, starts).dtype == np.int64


def test_items_without_a_cluster_are_named(written):
    clusters = Clusters.read(written)
    # unknown; behind the end; a stem that two clips have
    with pytest.raises(
        UserError, match=r"no cluster for 3 of 4 items: .*other.wav \(from 0 s\), .*long.wav \(from 30 s\)"
    ):
        clusters.assign_items(["d/short.wav", "other.wav", "d/long.wav", "same.wav"], np.array([0, 0, 30, 0]))


def test_a_file_of_other_making_needs_the_four_columns_only(tmp_path):
    path = tmp_path / "mine.parquet"
    ROWS.assign(cluster=CLUSTER).to_parquet(path, index=False)
    clusters = Clusters.read(path)
    assert (clusters.k, clusters.facts, clusters.cluster.tolist()) == (5, {}, CLUSTER.tolist())


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (ROWS, "missing cluster"),
        (ROWS.assign(cluster=CLUSTER - 1), "whole numbers"),
        (ROWS.assign(cluster=CLUSTER / 2), "whole numbers"),
        (ROWS.assign(cluster=CLUSTER)[:0], "expected one row or more"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, table, sentence):
    table.to_parquet(tmp_path / "c.parquet", index=False)
    with pytest.raises(UserError, match=f"c.parquet: .*{sentence}.*cluster_embeddings.py"):
        Clusters.read(tmp_path / "c.parquet")


def test_a_missing_or_broken_file_is_a_sentence(tmp_path, written):
    with pytest.raises(UserError, match="there is no such file; make it with"):
        Clusters.read(tmp_path / "none.parquet")
    written.write_bytes(written.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a parquet file of clusters"):
        Clusters.read(written)


def test_every_cluster_is_drawn_equally_often():
    cluster = np.repeat([3, 0, 8], [50, 5, 1])
    weights = compute_balance(cluster)
    assert weights.dtype == np.float64
    shares = np.bincount(cluster, weights / weights.sum())
    assert shares[[3, 0, 8]] == pytest.approx([1 / 3] * 3)
