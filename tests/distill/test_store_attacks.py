"""Stores of others: what is wrong in a file is a sentence, before it is used and before it takes memory."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio.dataset import Pack
from audio.shard_writer import ShardWriter
from common.errors import UserError
from distill.clusters import Clusters, write_clusters
from distill.embeddings import EmbeddingStore, StoredEmbeddings, compute_clip_embeddings
from distill.store_checks import find_faulty_class, find_faulty_probability, find_non_finite
from distill.targets import SoftTargetStore, StoredTargets
from tests.hdf5_files import link_dataset, make_virtual, peak_mb, replace_dataset

N = 6
MEMORY_MB = 600  # that a refused file may add to the process


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("pack")
    with ShardWriter(folder / "p_0.h5", 16000) as writer:
        for number in range(N):
            writer.append(f"clip_{number}.wav", np.zeros(16000, np.int16))
    lines = [f"clip_{number}.wav\t{folder / 'p_0.h5'}" for number in range(N)]
    (folder / "p.tsv").write_text("filename\thdf5path\n" + "\n".join(lines) + "\n")
    return Pack.open(folder / "p.tsv")


def make_rows(**changes: Any) -> pd.DataFrame:
    rows = {"filename": [f"clip_{number}.wav" for number in range(N)], "start": np.zeros(N), "end": np.ones(N)}
    rows |= {"n_reference": np.full(N, 16000), "clip_samples": np.full(N, 16000), **changes}
    return pd.DataFrame(rows)


def make_meta(**changes: Any) -> dict[str, Any]:
    meta = {"wavtransforms": {}, "spectransforms": [], "num_classes": 9, "parts": 1, "world_size": 1}
    return meta | {"labels": list("abcdefghi"), "config": {"chunk_length": 1.0, "epochs": 1}} | changes


def write_targets(folder: Path) -> Path:
    indexes = np.tile([3, 1, 8], (N, 1))
    SoftTargetStore.write(
        folder,
        1,
        0,
        make_rows(),
        topk_values=np.tile([0.5, 0.25, 0.125], (N, 1)),
        topk_indexes=indexes,
        seeds=range_of(),
    )
    (folder / "meta.json").write_text(json.dumps(make_meta()))
    return folder


def write_embeddings(folder: Path) -> Path:
    EmbeddingStore.write(folder, 1, 0, make_rows(), embedding=np.ones((N, 4)), seeds=range_of())
    (folder / "meta.json").write_text(json.dumps(make_meta()))
    return folder


def range_of() -> np.ndarray:
    return np.arange(N)


def use_targets(folder: Path, pack: Pack) -> list[float]:
    """Open a store as training does; return what it gives."""
    targets = StoredTargets(SoftTargetStore(folder), pack, 9, "zero", check="none")
    found = [float(value) for item in range(len(targets.chunks)) for value in targets.target(1, item)]
    draws = [targets.replay.draw(targets.seed(1, item), int(targets.n_reference[item])) for item in range(N)]
    assert len(draws) == N
    return found


def use_embeddings(folder: Path, pack: Pack) -> list[float]:
    stored = StoredEmbeddings(EmbeddingStore(folder), pack, check="none")
    [float(value) for item in range(len(stored.chunks)) for value in stored.target(1, item)]
    return compute_clip_embeddings(stored.store, pack).ravel().tolist()


VALUES, INDEXES = np.full((N, 3), 0.5, "f2"), np.tile([3, 1, 8], (N, 1)).astype("i2")


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[2, 1] = value
    return changed


HUGE = (10**9, 3)
HDF5_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a negative class": (
        lambda p: replace_dataset(p, "topk_indexes", data=with_value(INDEXES, -1)),
        r"row 2 \(clip_2.wav\) has the class -1; expected 0 to 8",
    ),
    "a class too high": (lambda p: replace_dataset(p, "topk_indexes", data=with_value(INDEXES, 9)), "has the class 9"),
    "a class twice": (lambda p: replace_dataset(p, "topk_indexes", data=with_value(INDEXES, 3)), "class twice"),
    "a value of 7": (lambda p: replace_dataset(p, "topk_values", data=with_value(VALUES, 7)), "has the value 7"),
    "a negative value": (lambda p: replace_dataset(p, "topk_values", data=with_value(VALUES, -0.1)), "value -0.0999"),
    "NaN": (lambda p: replace_dataset(p, "topk_values", data=with_value(VALUES, np.nan)), "has the value nan"),
    "NaN in double precision": (
        lambda p: replace_dataset(p, "topk_values", data=with_value(VALUES.astype("f8"), np.nan)),
        "has the value nan",
    ),
    "seeds as text": (lambda p: replace_dataset(p, "seeds", data=["a"] * N), "expected integers"),
    "seeds as floats": (lambda p: replace_dataset(p, "seeds", data=np.ones(N)), "expected integers"),
    "a negative seed": (lambda p: replace_dataset(p, "seeds", data=np.arange(N) - 1), "has the seed -1"),
    "more values than classes": (
        lambda p: [replace_dataset(p, name, data=np.zeros((N, 10), kind)) for name, kind in
                   (("topk_values", "f2"), ("topk_indexes", "i2"))],
        "1 to 9 values a row",
    ),
    "fewer rows": (lambda p: replace_dataset(p, "topk_values", data=VALUES[1:]), "differ in length|same shape"),
    "values in three dimensions": (lambda p: replace_dataset(p, "topk_values", data=VALUES[..., None]), "dimensions"),
    "no seeds": (lambda p: link_dataset(p, "seeds", np.arange(1)[:0]), "differ in length"),
    "40 GB that are not there": (lambda p: replace_dataset(p, "topk_values", shape=HUGE, dtype="f2"), "declares 6,000"),
    "compressed chunks that are not there": (
        lambda p: replace_dataset(p, "topk_values", shape=HUGE, dtype="f2", compression="gzip"),
        "has only 0 of its",
    ),
    "one chunk that fills the memory": (
        lambda p: replace_dataset(p, "seeds", shape=(N,), maxshape=(None,), chunks=(10**9,), dtype="i4"),
        "chunks of",
    ),
    "a compressed bomb": (
        lambda p: replace_dataset(p, "topk_values", data=np.zeros((1 << 24, 3), "f2"), compression="gzip"),
        "declares 100,663,296 bytes",
    ),
    "another file as values": (
        lambda p: replace_dataset(p, "seeds", shape=(N,), dtype="i4", external=[("/etc/passwd", 0, 4 * N)]),
        "takes its values from other files",
    ),
    "a link to another file": (lambda p: link_dataset(p, "seeds", h5py.ExternalLink("/tmp/x.h5", "y")), "not followed"),
    "a link to another place": (lambda p: link_dataset(p, "seeds", h5py.SoftLink("/topk_values")), "not followed"),
    "a virtual dataset": (lambda p: make_virtual(p, "topk_values", (N, 3), "f2"), "takes its values from other files"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HDF5_ATTACKS)
def test_what_is_wrong_in_an_hdf5_file_is_a_sentence(tmp_path: Path, pack: Pack, attack: str) -> None:
    change, sentence = HDF5_ATTACKS[attack]
    write_targets(tmp_path / "s")
    change(tmp_path / "s" / "logits_ep1_0.h5")
    before = peak_mb()
    with pytest.raises(UserError, match=sentence):
        use_targets(tmp_path / "s", pack)
    assert peak_mb() - before < MEMORY_MB


ROW_ATTACKS = {
    "n_reference -1": (make_rows(n_reference=np.full(N, -1)), r"row 0 \(clip_0.wav\) has n_reference -1; expected 160"),
    "another n_reference": (make_rows(n_reference=np.full(N, 8000)), "n_reference 8000"),
    "text as n_reference": (make_rows(n_reference=["x"] * N), "'n_reference' has the type .*string.*whole numbers"),
    "no names": (make_rows().drop(columns="filename"), "missing filename"),
    "no start": (make_rows().drop(columns="start"), "missing start"),
    "start as text": (make_rows(start=["0"] * N), "'start' has the type"),
    "a negative start": (make_rows(start=np.full(N, -1.0)), "expected seconds from 0"),
    "NaN as start": (make_rows(start=np.full(N, np.nan)), "lacks 6 values|expected seconds from 0"),
    "an endless chunk": (make_rows(end=np.full(N, np.inf)), "expected seconds from 0"),
    "a start beyond all": (make_rows(start=np.full(N, 1e300), end=np.full(N, 2e300)), "expected seconds from 0"),
    "an end before its start": (make_rows(start=np.ones(N), end=np.zeros(N)), "the end after the start"),
    "chunks too long": (make_rows(end=np.full(N, 3.0), n_reference=np.full(N, 48000)), "at most 1 s"),
    "a missing name": (make_rows(filename=[None, *["x"] * (N - 1)]), "'filename' lacks 1 values"),
    "numbers as names": (make_rows(filename=range(N)), "'filename' has the type"),
    "names of a megabyte": (make_rows(filename=["x" * 2**20] * N), "a text of 1,048,576 bytes"),
    "a row too few": (make_rows()[1:], "differ in length"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ROW_ATTACKS)
def test_what_is_wrong_in_the_rows_is_a_sentence(tmp_path: Path, pack: Pack, attack: str) -> None:
    rows, sentence = ROW_ATTACKS[attack]
    write_targets(tmp_path / "s")
    rows.to_parquet(tmp_path / "s" / "logits_ep1_0.parquet", index=False)
    with pytest.raises(UserError, match=sentence):
        use_targets(tmp_path / "s", pack)


def test_a_billion_rows_in_a_few_kilobytes_are_refused_unread(tmp_path: Path, pack: Pack) -> None:
    write_targets(tmp_path / "s")
    path = tmp_path / "s" / "logits_ep1_0.parquet"
    block = pa.table({name: pa.repeat(value, 10**7) for name, value in (("start", 0.0), ("end", 1.0))})
    with pq.ParquetWriter(path, block.schema) as writer:
        for _ in range(5):
            writer.write_table(block, row_group_size=10**7)
    before = peak_mb()
    with pytest.raises(UserError, match="declares 50,000,000 rows in"):
        use_targets(tmp_path / "s", pack)
    assert peak_mb() - before < MEMORY_MB


META_ATTACKS: dict[str, tuple[Any, str]] = {
    "a billion parts": (make_meta(parts=10**9), "parts is 1000000000: .*less than or equal to 65536"),
    "no part": (make_meta(parts=0), "parts is 0"),
    "parts as text": (make_meta(parts="1"), "parts is '1'"),
    "a number as labels": (make_meta(labels=3), "labels is 3"),
    "numbers among the labels": (make_meta(labels=[1, 2]), "labels.0 is 1"),
    "labels for other classes": (make_meta(labels=["a"]), "1 labels for num_classes 9"),
    "a billion classes": (make_meta(num_classes=10**9), "num_classes is"),
    "no chunk length": (make_meta(config={"chunk_length": 0}), "chunk_length is 0"),
    "a chunk length as text": (make_meta(config={"chunk_length": "1"}), "chunk_length is '1'"),
    "an endless chunk": (make_meta(config={"chunk_length": float("inf")}), "chunk_length is inf"),
    "NaN": (make_meta(config={"chunk_length": float("nan")}), "NaN is no number"),
    "a list": ([1], "it holds a list, expected a mapping"),
    "transforms that there are not": (make_meta(wavtransforms={"System": {}}), "unknown transform 'System'"),
    "transforms as a list": (make_meta(wavtransforms=["Shift"]), "wavtransforms is"),
    "a shift of all samples there are": (make_meta(wavtransforms={"Shift": {"max_shift": 1e300}}), "Shift: "),
    "a mask of all frames there are": (make_meta(spectransforms=[{"TimeMasking": {"time_mask_param": 10**30}}]),
                                       "whole number"),
}  # fmt: skip
TEXT_ATTACKS = {
    "brackets": ('{"config": ' + "[" * 3000 + "]" * 3000 + "}", "nested deeper than 64"),
    "brackets that never close": ("[" * 100_000, "nested deeper than 64|cannot be read as JSON"),
    "a number of 5,000 digits": ('{"parts": ' + "1" * 5000 + "}", "5000 digits"),
    "a key twice": ('{"parts": 1, "parts": 1}', "'parts' is there more than once"),
    "no text": (b"\xff\xfe\0\1", "cannot be read as JSON"),
    "nothing": ("", "cannot be read as JSON"),
}


@pytest.mark.parametrize("attack", [*META_ATTACKS, *TEXT_ATTACKS])
def test_what_is_wrong_in_meta_json_is_a_sentence(tmp_path: Path, pack: Pack, attack: str) -> None:
    write_targets(tmp_path / "s")
    content, sentence = META_ATTACKS[attack] if attack in META_ATTACKS else TEXT_ATTACKS[attack]
    text = json.dumps(content) if attack in META_ATTACKS else content
    (tmp_path / "s" / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        use_targets(tmp_path / "s", pack)


@pytest.mark.parametrize("name", ["logits_ep999999999999_0.h5", "logits_ep1_99999999999.h5", "logits_ep\u0661_0.h5"])
def test_a_file_of_an_absurd_number_is_no_part(tmp_path: Path, pack: Pack, name: str) -> None:
    expected = use_targets(write_targets(tmp_path / "s"), pack)
    (tmp_path / "s" / name).write_bytes(b"")
    assert use_targets(tmp_path / "s", pack) == expected


def test_a_class_beyond_the_training_is_found_in_every_epoch(tmp_path: Path, pack: Pack) -> None:
    folder = write_targets(tmp_path / "s")
    meta = make_meta()
    del meta["num_classes"], meta["labels"]
    (folder / "meta.json").write_text(json.dumps(meta))
    arrays = {"topk_values": VALUES, "topk_indexes": with_value(INDEXES, 400), "seeds": np.arange(N)}
    SoftTargetStore.write(folder, 2, 0, make_rows(), **arrays)
    targets = StoredTargets(SoftTargetStore(folder), pack, 9, "zero", check="none")
    targets.target(1, 0)
    with pytest.raises(UserError, match="has targets of class 400, but there are 9 classes"):
        targets.target(2, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path, pack: Pack, value: float) -> None:
    folder = write_embeddings(tmp_path / "e")
    array = np.ones((N, 4), "f2")
    array[4, 2] = value
    replace_dataset(folder / "embeddings_ep1_0.h5", "embedding", data=array)
    with pytest.raises(UserError, match=r"row 4 \(clip_4.wav\) has values that are not finite"):
        compute_clip_embeddings(EmbeddingStore(folder), pack)
    with pytest.raises(UserError, match="row 4 has values that are not finite"):
        StoredEmbeddings(EmbeddingStore(folder), pack, check="none").target(1, 4)


def test_the_fast_checks_are_those_of_their_definition() -> None:
    """All 65,536 values of half precision; random classes with and without repetitions."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for value in every:
        array = np.full((3, 2), 0.5, np.float16)
        array[1, 1] = value
        is_probability = bool(0 <= value <= 1) and not (value == 0 and np.signbit(value))
        assert (find_faulty_probability(array) is None) == (is_probability or value == 0)
        assert (find_non_finite(array) is None) == bool(np.isfinite(value))
    rng = np.random.default_rng(0)
    for n_classes in (3, 30, 100):
        for _ in range(50):
            array = rng.integers(0, 200, (5000, n_classes)).astype(np.int16)
            array = np.argsort(rng.random((50, 200)), axis=1)[:, :n_classes].astype(np.int16)
            row, (one, other) = int(rng.integers(50)), rng.choice(n_classes, 2, replace=False)
            assert find_faulty_class(array, 200) is None
            array[row, one] = array[row, other]
            fault = find_faulty_class(array, 200)
            assert fault is not None
            assert fault.row == row


# --- Mutations ---


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        place = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            changed[place : place + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"))[
                : len(changed) - place
            ]
        elif kind == 3:
            del changed[place : place + rng.randrange(1, 64)]
        else:
            other = rng.randrange(len(changed))
            changed[place : place + 16] = changed[other : other + 16]
        if not changed:
            return b""
    return bytes(changed)


def check_mutation(folder: Path, path: Path, use: Callable[[Path, Pack], list[float]], pack: Pack, seed: int) -> bool:
    """Change a file; return whether it was refused. What is accepted has finite values in their range."""
    original = path.read_bytes()
    path.write_bytes(mutate_bytes(original, random.Random(seed)))
    try:
        found = use(folder, pack)
    except UserError:
        return True
    finally:
        path.write_bytes(original)
    assert all(np.isfinite(found))
    return False


def mutate_store(folder: Path, pack: Pack, seeds: range) -> None:
    targets, embeddings = write_targets(folder / "s"), write_embeddings(folder / "e")
    files = [(targets / "logits_ep1_0.h5", use_targets), (targets / "logits_ep1_0.parquet", use_targets),
             (targets / "meta.json", use_targets), (embeddings / "embeddings_ep1_0.h5", use_embeddings)]  # fmt: skip
    before, n_refused = peak_mb(), 0
    for seed in seeds:
        path, use = files[seed % len(files)]
        n_refused += check_mutation(path.parent, path, use, pack, seed)
    assert peak_mb() - before < MEMORY_MB
    assert n_refused > len(seeds) // 10


def test_a_changed_file_gives_valid_values_or_a_sentence(tmp_path: Path, pack: Pack) -> None:
    mutate_store(tmp_path, pack, range(120))


@pytest.mark.long
def test_thousands_of_changed_files_give_valid_values_or_a_sentence(
    tmp_path: Path, pack: Pack, record_property: Callable[[str, object], None]
) -> None:
    mutate_store(tmp_path, pack, range(1000, 9000))
    record_property("damaged files of stores", 8000)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TOP_KEYS = ("wavtransforms", "spectransforms", "mask_fill", "num_classes", "parts", "world_size", "labels", "config",
            "topk", "pack_rate", "activation", "teacher")  # fmt: skip
INNER_KEYS = ("config.chunk_length", "config.epochs", "config.model", "wavtransforms.Shift",
              "wavtransforms.Shift.max_shift", "wavtransforms.Shift.p")  # fmt: skip
KEYS = TOP_KEYS + INNER_KEYS


def check_meta(folder: Path, pack: Pack, key: str, value: Any) -> None:
    meta = make_meta(wavtransforms={"Shift": {"max_shift": 0.5, "p": 1.0}})
    *parents, last = key.split(".")
    inner = meta
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    with contextlib.suppress(UserError):
        assert all(np.isfinite(use_targets(folder, pack)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(KEYS), value=JSON_VALUES)
def test_any_value_of_meta_json_is_used_or_a_sentence(tmp_path_factory: Any, pack: Pack, key: str, value: Any) -> None:
    check_meta(write_targets(tmp_path_factory.getbasetemp() / "meta"), pack, key, value)


@pytest.mark.long
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(KEYS), value=JSON_VALUES)
def test_thousands_of_values_of_meta_json_are_used_or_a_sentence(
    tmp_path_factory: Any, pack: Pack, key: str, value: Any
) -> None:
    check_meta(write_targets(tmp_path_factory.getbasetemp() / "meta_long"), pack, key, value)


def test_clusters_of_others_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_clusters(path, make_rows(), np.arange(N), {"k": N})
    table = pq.read_table(path)
    for changed, sentence in (
        (table.replace_schema_metadata({b"clusters": b"[" * 3000 + b"]" * 3000}), "nested deeper"),
        (table.replace_schema_metadata({b"clusters": b'{"k": "x"}'}), "cannot be read as a parquet file of clusters"),
        (table.set_column(1, "start", pa.array([1e300] * N)), "expected in `start` and `end` seconds"),
        (table.set_column(0, "filename", pa.array(["x" * 10**6] * N)), "a text of 1,000,000 bytes"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(UserError, match=sentence):
            Clusters.read(path)
