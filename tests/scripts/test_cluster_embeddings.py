import json

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from common.files import sha256
from distill.clusters import Clusters
from distill.embeddings import EmbeddingStore
from scripts.cluster_embeddings import main
from scripts.clusters.kmeans import compute_quality, find_clusters
from scripts.clusters.picture import draw_clusters, project

GROUPS = np.repeat([0, 1, 2, 3], [18, 10, 6, 6])


def embeddings_of(groups, width=6, noise=0.05, seed=0):
    """Groups far apart, each around a corner of its own."""
    generator = np.random.default_rng(seed)
    return 4 * np.eye(8, width)[groups] + noise * generator.standard_normal((len(groups), width))


def store_of(folder, embeddings):
    folder.mkdir(parents=True)
    n, cut = len(embeddings), len(embeddings) // 3
    rows = pd.DataFrame(
        {"filename": [f"clip_{i}.wav" for i in range(n)], "start": 0.0, "end": 10.0, "n_reference": 160000}
    )
    for part, own in enumerate((slice(0, cut), slice(cut, n))):
        EmbeddingStore.write(folder, 1, part, rows[own], embedding=embeddings[own], seeds=np.zeros(n)[own])
    (folder / "meta.json").write_text(json.dumps({"parts": 2}))
    return folder


def same_partition(one, other):
    return len(set(zip(one.tolist(), other.tolist(), strict=True))) == len(set(one)) == len(set(other))


def test_the_command_writes_clusters_that_training_reads(tmp_path, capsys):
    store = store_of(tmp_path / "my store", embeddings_of(GROUPS))
    main([str(store), "--k", "4,2", "--seed", "1"])
    clusters = Clusters.read(store / "clusters_k4.parquet")
    assert same_partition(clusters.cluster, GROUPS)
    assert (
        clusters.assign_items([f"clip_{i}.ogg" for i in range(40)], np.zeros(40)).tolist() == clusters.cluster.tolist()
    )
    facts = clusters.facts
    assert facts == json.loads((store / "clusters_k4.json").read_text())
    assert sorted(facts["sizes"]) == [6, 6, 10, 18]
    assert (facts["k"], facts["seed"], facts["n_embeddings"], facts["width"]) == (4, 1, 40, 6)
    assert facts["store_meta_sha256"] == sha256(store / "meta.json")
    assert facts["silhouette"] > 0.95
    assert f"'{store}' --k 4 --seed 1" in facts["command"]
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()[1:3]]
    assert [line[0] for line in table] == ["2", "4"]
    assert table[1][1:5] == ["6", "8", "18", "0"]
    assert f"run.py train CONFIG.yaml --clusters '{store}/clusters_k2.parquet' --sampler clusters" in out
    assert matplotlib.image.imread(store / "clusters_k4.png").shape[0] > 1000
    assert EmbeddingStore(store).epochs == [1]  # what lies beside its files is none of its own


def test_directions_are_clustered_with_normalize(tmp_path, capsys):
    """Two directions, each at two lengths: by themselves it is the lengths that tell, normalised the directions."""
    length, way = np.repeat([1, 1, 30, 30], 6), np.tile([0, 1], 12)
    store = store_of(tmp_path / "store", length[:, None] * np.array([[1.0, 0.1], [0.1, 1.0]])[way])
    main([str(store), "--k", "2", "--normalize", "true"])
    assert same_partition(Clusters.read(store / "clusters_k2.parquet").cluster, way)
    assert Clusters.read(store / "clusters_k2.parquet").facts["normalize"] is True


def test_the_same_seed_finds_the_same_clusters():
    embeddings = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    (one, inertia), (again, _) = (find_clusters(embeddings, 9, seed=5, batch_size=64) for _ in range(2))
    assert np.array_equal(one, again)
    centres = np.stack([embeddings[one == c].mean(axis=0) for c in range(9)])
    to_each = ((embeddings[:, None] - centres) ** 2).sum(axis=2)
    assert inertia == pytest.approx(to_each[np.arange(300), one].sum(), rel=0.05)


def test_quality_is_the_definition_and_nothing_where_it_has_no_meaning():
    embeddings, cluster = np.array([[0.0], [1.0], [4.0], [6.0]]), np.array([0, 0, 1, 1])
    inside, outside = np.array([1, 1, 2, 2]), np.array([5, 4, 3.5, 5.5])  # mean distances, by hand
    found = compute_quality(embeddings, cluster, seed=0)
    assert found["silhouette"] == pytest.approx(((outside - inside) / outside).mean())
    assert found["davies_bouldin"] == pytest.approx((0.5 + 1.0) / 4.5)
    assert found["calinski_harabasz"] == pytest.approx((4 * 2.25**2) / (2.5 / 2))
    for alone in ([0, 0, 0, 0], [0, 1, 2, 3]):
        assert set(compute_quality(embeddings, np.array(alone), seed=0).values()) == {None}


def test_the_picture_has_every_point_every_size_and_every_number():
    sizes = np.array([5, 1, 0, 14])
    own = np.repeat([0, 1, 3], [5, 1, 14])
    above, below = draw_clusters(np.random.default_rng(0).standard_normal((20, 2)), own, sizes, "title").axes
    assert len(above.collections[0].get_offsets()) == 20
    assert {text.get_text() for text in above.texts} == {"0", "1", "3"}
    assert [bar.get_height() for bar in below.patches] == [14, 5, 1, 0]
    assert [label.get_text() for label in below.get_xticklabels()] == ["3", "0", "1", "2"]
    assert below.get_legend().get_texts()[0].get_text() == "mean: 5"


@pytest.mark.parametrize("embeddings", [np.ones((30, 3)), np.eye(2, 1), np.arange(12.0)[:, None]])
def test_the_map_of_few_equal_or_narrow_embeddings_is_finite(embeddings):
    chosen, place = project(embeddings, 0)
    assert (chosen.tolist(), place.shape) == (list(range(len(embeddings))), (len(embeddings), 2))
    assert np.isfinite(place).all()


def test_faults_are_reported_before_any_work(tmp_path, capsys):
    store = store_of(tmp_path / "store", embeddings_of(GROUPS))
    for words, parts in (
        ((store, "--k", "1,x,50", "--batch_size", "0"), ("--k is 1; expected list of whole number", "--batch_size")),
        ((store, "--k", "2,50"), ("more than the number of embeddings", "40;")),
        ((tmp_path / "none",), ("is not a folder",)),
    ):
        with pytest.raises(SystemExit):
            main([str(word) for word in words])
        message = capsys.readouterr().err
        assert all(part in message for part in parts), message
    assert not list(store.glob("clusters*"))


def test_embeddings_that_are_not_finite_are_named(tmp_path, capsys):
    embeddings = embeddings_of(GROUPS)
    embeddings[20, 1] = np.nan
    with pytest.raises(SystemExit):
        main([str(store_of(tmp_path / "store", embeddings)), "--k", "2"])
    assert "(clip_20.wav) has values that are not finite" in capsys.readouterr().err
