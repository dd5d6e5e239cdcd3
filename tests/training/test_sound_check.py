"""A store belongs to sounds, not to names: a pack made anew with other sounds is refused, in training and on resume."""

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from audio.dataset import Pack
from audio.shard_writer import ShardWriter
from audio.shards import Shard
from common.errors import UserError
from distill.embeddings import EmbeddingStore, StoredEmbeddings
from distill.sound_check import COMPARED, compute_fingerprint
from distill.targets import SoftTargetStore, StoredTargets
from models import Ensemble, create_model
from training.config import SoftTargetConfig
from training.store_writer import EmbeddingContent, SoftTargetContent, StoreWriter

N, RATE = 100, 16000


def write_pack(folder: Path, changes: dict[int, np.ndarray] | None = None, rate: int = RATE, n: int = N) -> Pack:
    """Noise of 1.6 to 2.6 s, one clip of which may be another."""
    rng = np.random.default_rng(0)
    sounds = [rng.integers(-9999, 9999, round(rate * (1.6 + i % 5 / 4))).astype(np.int16) for i in range(n)]
    for clip, samples in (changes or {}).items():
        sounds[clip] = samples
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder / "hdf5" / "x_0.h5", rate) as writer:
        for clip, samples in enumerate(sounds):
            writer.append(f"s/{clip:03}.wav", samples)
    rows = "".join(f"s/{clip:03}.wav\t{folder / 'hdf5' / 'x_0.h5'}\n" for clip in range(n))
    (folder / "labels" / "x.tsv").write_text("filename\thdf5path\n" + rows)
    return Pack.open(folder / "labels" / "x.tsv")


def altered(pack: Pack, clip: int, place: int) -> dict[int, np.ndarray]:
    """The clip with one sample changed by one step of 16 bits."""
    samples = np.round(pack.read(clip) * 32768).astype(np.int16)
    samples[place] ^= 1
    return {clip: samples}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Ensemble([create_model("audiotransformer_pico", num_classes=3)])


def save(pack: Pack, teacher: Ensemble, folder: Path, targets: str = "probabilities", **changes):
    settings = {"epochs": 1, "batch_size": 64, "num_workers": 0, "topk": 3, "device": "cpu", "chunk_length": 1.0}
    config = SoftTargetConfig(train_data=str(pack.manifest), model="x", targets=targets, **settings | changes)
    content = SoftTargetContent(teacher, 3) if targets == "probabilities" else EmbeddingContent(teacher)
    return StoreWriter(config, pack, content, folder).save()


@pytest.fixture(scope="module")
def original(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("original")
    pack = write_pack(folder / "pack")
    save(pack, teacher, folder / "store")
    return folder


@pytest.fixture
def there(original, tmp_path):
    """A copy of store and pack; the pack may then be made anew in the same place."""
    shutil.copytree(original, tmp_path / "x")
    write_pack(tmp_path / "x/pack")
    return tmp_path / "x"


def match(folder: Path, pack: Pack, **options) -> StoredTargets:
    return StoredTargets(SoftTargetStore(folder / "store"), pack, 3, "zero", **options)


def test_a_store_keeps_length_and_hash_of_each_chunk(original):
    rows = SoftTargetStore(original / "store").read_rows(1)
    shard = Shard(original / "pack/hdf5/x_0.h5")
    assert len(rows) == 220  # 1.6 s to 2.35 s are two chunks of 1 s (tails below 0.5 s are left out), 2.6 s three
    for row in rows.iloc[[0, 1, 99, -1]].itertuples():
        samples = shard.read(shard.find(row.filename))
        assert row.clip_samples == len(samples)
        part = samples[round(row.start * RATE) : round(row.end * RATE)]
        digest = hashlib.blake2b(part.astype("<i2").tobytes(), digest_size=8).digest()
        assert row.sound_hash == int.from_bytes(digest, "little", signed=True)


def test_the_same_sounds_in_another_pack_are_taken(there, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert match(there, write_pack(tmp_path / "elsewhere")).n_clips == N
    assert match(there, write_pack(tmp_path / "elsewhere"), check="all").n_clips == N
    assert "not checked" not in caplog.text


def test_another_length_is_refused_with_clip_found_and_expected(there):
    pack = write_pack(there / "pack", {7: np.zeros(33_600 + 1, np.int16)})
    with pytest.raises(UserError) as caught:
        match(there, pack)
    text = str(caught.value)
    assert "of 100 clips whose lengths were compared, 1 differ" in text
    assert "s/007.wav (found 2.100 s (33601 samples), expected 2.100 s (33600))" in text
    assert "delete the folder and run save_logits.py" in text
    assert "check_sounds: none" in text


def test_other_sounds_of_the_same_lengths_are_refused(there):
    rng = np.random.default_rng(1)
    lengths = Pack.open(there / "pack/labels/x.tsv").n_samples
    pack = write_pack(there / "pack", {i: rng.integers(-99, 99, n).astype(np.int16) for i, n in enumerate(lengths)})
    with pytest.raises(
        UserError, match=r"clips whose samples were compared, \d+ differ: s/000\.wav \(from 0 s on found"
    ):
        match(there, pack)
    assert match(there, pack, check="none").n_clips == N


def test_one_bit_anywhere_is_seen_in_a_small_store_and_by_all_in_a_large_one(there, monkeypatch):
    pack = Pack.open(there / "pack/labels/x.tsv")
    with pytest.raises(UserError, match=r"1 differ: s/000\.wav"):
        match(there, write_pack(there / "pack", altered(pack, 0, 5)))
    store = SoftTargetStore(there / "store")
    chosen = np.unique(np.linspace(0, 219, COMPARED).round().astype(int))
    unseen = next(row for row in range(220) if row not in chosen)
    row = store.read_rows(1).iloc[unseen]
    changed = altered(pack, int(row["filename"][2:5]), round(row["start"] * RATE))
    pack = write_pack(there / "pack", changed)
    with pytest.raises(UserError, match=rf"1 differ: {row['filename']}"):
        match(there, pack)
    monkeypatch.setattr("distill.sound_check.ALL_COMPARED", 219)
    assert match(there, pack).n_clips == N  # as documented, a sample
    with pytest.raises(UserError, match=rf"1 differ: {row['filename']} \(from {row['start']:g} s on"):
        match(there, pack, check="all")


def test_a_pack_at_another_rate_has_other_samples_and_is_not_compared(there, tmp_path):
    assert match(there, write_pack(tmp_path / "at 8 kHz", rate=8000)).n_clips == N


def test_a_store_of_an_earlier_version_is_used_and_this_is_reported(there, caplog):
    caplog.set_level(logging.INFO)
    path = there / "store/logits_ep1_0.parquet"
    pd.read_parquet(path).drop(columns=["clip_samples", "sound_hash"]).to_parquet(path, index=False)
    pack = write_pack(there / "pack", altered(Pack.open(there / "pack/labels/x.tsv"), 0, 5))
    assert match(there, pack).n_clips == N
    assert "has no lengths and hashes of its sounds" in caplog.text
    with pytest.raises(UserError, match=r"check_sounds: all compares sounds with their hashes, which .* does not have"):
        match(there, pack, check="all")


def test_embeddings_are_checked_alike(there, teacher):
    pack = Pack.open(there / "pack/labels/x.tsv")
    save(pack, teacher, there / "embeddings", "embeddings")
    assert StoredEmbeddings(EmbeddingStore(there / "embeddings"), pack).n_clips == N
    changed = write_pack(there / "pack", altered(pack, 0, 5))
    with pytest.raises(UserError, match="has other sounds than those of the embeddings"):
        StoredEmbeddings(EmbeddingStore(there / "embeddings"), changed)


@pytest.mark.parametrize("layout", ["native", "published"])
def test_saving_goes_on_with_the_same_sounds_alone(tmp_path, teacher, layout):
    pack = write_pack(tmp_path / "pack", n=10)
    save(pack, teacher, tmp_path / "store", layout=layout)
    save(write_pack(tmp_path / "pack", n=10), teacher, tmp_path / "store", epochs=2, layout=layout)
    written = (tmp_path / "store/logits_ep1_0.h5").read_bytes()
    for changed in (altered(pack, 9, 3), {4: np.zeros(7, np.int16)}):
        other = write_pack(tmp_path / "pack", changed, n=10)
        with pytest.raises(UserError, match="was started with other sounds than") as caught:
            save(other, teacher, tmp_path / "store", epochs=3, layout=layout)
        assert "delete the folder to save the soft targets again" in str(caught.value)
    assert (tmp_path / "store/logits_ep1_0.h5").read_bytes() == written
    assert not (tmp_path / "store/logits_ep3_0.h5").exists()


def test_a_folder_begun_by_an_earlier_version_goes_on(tmp_path, teacher):
    pack = write_pack(tmp_path / "pack", n=10)
    save(pack, teacher, tmp_path / "store")
    meta = (tmp_path / "store/meta.json").read_text()
    (tmp_path / "store/meta.json").write_text(meta.replace('"sounds_sha256"', '"something_else"'))
    path = tmp_path / "store/logits_ep1_0.parquet"
    pd.read_parquet(path).drop(columns=["clip_samples", "sound_hash"]).to_parquet(path, index=False)
    save(pack, teacher, tmp_path / "store", epochs=2)
    assert SoftTargetStore(tmp_path / "store").epochs == [1, 2]


def test_a_fingerprint_is_of_lengths_and_samples(tmp_path):
    pack = write_pack(tmp_path / "a")
    found = compute_fingerprint(pack)
    assert compute_fingerprint(write_pack(tmp_path / "b")) == found
    assert compute_fingerprint(write_pack(tmp_path / "b", altered(pack, 99, 0))) != found
    assert compute_fingerprint(write_pack(tmp_path / "b", {50: np.zeros(5, np.int16)})) != found
