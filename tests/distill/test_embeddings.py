"""The embedding store: the row asked for, whatever part and epoch it lies in; a clip is its chunks, by their length."""

import json

import numpy as np
import pandas as pd
import pytest

from audio.dataset import Pack
from audio.shard_writer import ShardWriter
from common.errors import UserError
from distill.embeddings import EmbeddingStore, StoredEmbeddings, compute_clip_embeddings
from distill.joined_embeddings import JoinedEmbeddings

RATE, WIDTH = 8000, 3


@pytest.fixture
def pack(tmp_path):
    """Three clips of 1, 2.5 and 0.5 s, and chunks of 1 s."""
    lines = ["filename\thdf5path"]
    with ShardWriter(tmp_path / "hdf5" / "p.h5", RATE) as writer:
        for name, seconds in (("a.wav", 1.0), ("b.wav", 2.5), ("c.wav", 0.5)):
            writer.append(name, np.full(round(seconds * RATE), 7, np.int16))
            lines.append(f"{name}\t{tmp_path / 'hdf5' / 'p.h5'}")
    (tmp_path / "p.tsv").write_text("\n".join(lines) + "\n")
    return Pack.open(tmp_path / "p.tsv")


CHUNKS = [("a.wav", 0.0, 1.0), ("b.wav", 0.0, 1.0), ("b.wav", 1.0, 2.0), ("b.wav", 2.0, 2.5), ("c.wav", 0.0, 0.5)]


def value(epoch: int, row: int) -> np.ndarray:
    return np.array([epoch, row, 0.5 * row], np.float32)


def make(folder, parts=((0, 1, 2), (3, 4)), epochs=2, chunks=CHUNKS, factor=1, first_seed=0, **facts):
    """A store whose epochs name the chunks in opposite orders."""
    for epoch in range(1, epochs + 1):
        order = list(range(len(chunks)))[:: 1 if epoch % 2 else -1]
        for part, places in enumerate(parts):
            rows = [order[place] for place in places]
            table = pd.DataFrame([chunks[row] for row in rows], columns=["filename", "start", "end"])
            table["n_reference"] = ((table["end"] - table["start"]) * 16000).astype(int)
            embedding = np.stack([factor * value(epoch, row) for row in rows])
            seeds = np.array([first_seed + 100 * epoch + r for r in rows])
            EmbeddingStore.write(folder, epoch, part, table, embedding=embedding, seeds=seeds)
    meta = {"wavtransforms": {}, "spectransforms": [], "parts": len(parts), "config": {"chunk_length": 1.0}}
    (folder / "meta.json").write_text(json.dumps(meta | facts))
    return EmbeddingStore(folder)


def test_every_item_gets_its_own_row_from_any_part_and_epoch(pack, tmp_path):
    source = StoredEmbeddings(make(tmp_path / "s"), pack)
    assert source.widths == (WIDTH,)
    assert list(source.chunks) == [
        (0, 0, 8000), (1, 0, 8000), (1, 8000, 16000), (1, 16000, 20000), (2, 0, 4000)
    ]  # fmt: skip
    for epoch in (1, 2, 3):  # two are stored: the third is the first again
        stored = 2 - epoch % 2
        for item in range(5):
            np.testing.assert_array_equal(source.target(epoch, item), value(stored, item))
            assert source.seed(epoch, item) == 100 * stored + item


def test_a_clip_is_the_mean_of_its_chunks_by_their_length(pack, tmp_path):
    store = make(tmp_path / "s")
    found = compute_clip_embeddings(store, pack)
    b = (value(1, 1) + value(1, 2) + 0.5 * value(1, 3)) / 2.5
    np.testing.assert_allclose(found, np.stack([value(1, 0), b, value(1, 4)]), rtol=1e-6)
    assert found.dtype == np.float32


def test_clip_embeddings_do_not_depend_on_the_blocks_that_chunks_are_averaged_in(pack, tmp_path, monkeypatch):
    store = make(tmp_path / "s")
    whole = compute_clip_embeddings(store, pack)
    monkeypatch.setattr("distill.embeddings._BLOCK", 2 * WIDTH)
    assert np.array_equal(compute_clip_embeddings(store, pack), whole)


def test_clips_without_an_embedding_are_named(pack, tmp_path):
    store = make(tmp_path / "s", parts=((0, 1, 2, 3),), epochs=1)
    with pytest.raises(UserError, match=r"lacks the embeddings of 1 of the 3 clips of .*p\.tsv: c\.wav"):
        compute_clip_embeddings(store, pack)


def test_a_store_that_lacks_a_part_or_mixes_teachers_is_refused(tmp_path):
    make(tmp_path / "s")
    (tmp_path / "s" / "embeddings_ep2_1.h5").unlink()
    with pytest.raises(UserError, match=r"epoch 2 lacks the file of part 1; run save_logits\.py again"):
        EmbeddingStore(tmp_path / "s")
    store = make(tmp_path / "t")
    table = store.read_rows(1).iloc[3:]
    EmbeddingStore.write(tmp_path / "t", 1, 1, table, embedding=np.zeros((2, 9)), seeds=np.zeros(2))
    with pytest.raises(UserError, match=r"shapes \(3,\), \(9,\); expected one width"):
        EmbeddingStore(tmp_path / "t")
    with pytest.raises(UserError, match="has no files embeddings_ep"):
        EmbeddingStore(tmp_path)


MASKED = {"spectransforms": [{"TimeMasking": {"time_mask_param": 9}}]}


def join(pack, *stores, **options):
    return JoinedEmbeddings([StoredEmbeddings(store, pack, **options) for store in stores], pack)


@pytest.mark.parametrize("facts", [{}, MASKED])
def test_an_item_of_several_stores_has_the_embeddings_of_each_in_their_order(pack, tmp_path, facts):
    """Whatever the order of their rows."""
    one = make(tmp_path / "one", **facts)
    other = make(tmp_path / "other", parts=((4, 0), (2, 1, 3)), factor=10, **facts)
    source = join(pack, one, other)
    assert (source.widths, source.chunk_seconds) == ((WIDTH, WIDTH), 1.0)
    for epoch in (1, 2, 3):
        stored = 2 - epoch % 2
        for item, (clip, start, _) in enumerate(source.chunks):
            row = next(i for i, c in enumerate(CHUNKS) if c[:2] == (pack.names[clip], start / RATE))
            expected = [*value(stored, row), *(10 * value(stored, row))]
            np.testing.assert_array_equal(source.target(epoch, item), expected)
            assert source.seed(epoch, item) == 100 * stored + row


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            {"chunks": CHUNKS[:4], "parts": ((0, 1), (2, 3))},
            r"of 5 chunks .*of 4; 1 are in one .* first of c\.wav: make",
        ),
        ({"epochs": 1}, r"one has 2 epochs \(from 1\), .*other 1 .* or use those that all have: --max_aug_epochs"),
        ({"config": {"chunk_length": 2.0}, "chunks": [("a.wav", 0, 1)], "parts": ((0,),)}, "are 1 s, those of .* 2 s"),
        (MASKED, "one and .*other were stored with different transforms"),
    ],
)
def test_stores_that_do_not_go_together_are_a_sentence(pack, tmp_path, facts, sentence):
    with pytest.raises(UserError, match=sentence):
        join(pack, make(tmp_path / "one"), make(tmp_path / "other", **facts))


def test_stores_of_other_seeds_go_together_without_augmentation_alone(pack, tmp_path):
    join(pack, make(tmp_path / "a"), make(tmp_path / "b", first_seed=1))
    masked = [make(tmp_path / name, first_seed=seed, **MASKED) for name, seed in (("c", 0), ("d", 1))]
    with pytest.raises(UserError, match="different augmentation seeds, so no student's input fits both; make both"):
        join(pack, *masked)
    join(pack, make(tmp_path / "e", epochs=3), make(tmp_path / "f"), max_epochs=2)
