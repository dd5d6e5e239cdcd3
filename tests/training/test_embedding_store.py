"""Embeddings from a model, a folder of files or a function, stored by save_logits.py."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml

from audio.cutting import Chunks
from audio.dataset import Pack
from common.errors import UserError
from distill.embeddings import EmbeddingStore, StoredEmbeddings
from distill.replay import Replay
from models import create_model
from tests.batches import make_batch
from tests.conftest import run_command
from training.config import SoftTargetConfig
from training.embedders import FunctionEmbedder, NpzEmbedder, open_embedder
from training.store_writer import EmbeddingContent, SoftTargetContent, StoreWriter, store_embeddings


@pytest.fixture
def pack(tone_pack):
    return Pack.open(tone_pack)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("audiotransformer_pico", num_classes=7, depth=1).eval()


def config(pack, **changes):
    settings = {"train_data": str(pack.manifest), "targets": "embeddings", "batch_size": 8, "num_workers": 0}
    return SoftTargetConfig.model_validate(settings | {"device": "cpu"} | changes)


def test_stored_embeddings_are_the_models_own(pack, model, tmp_path):
    store = store_embeddings(model, pack, tmp_path, num_workers=0, batch_size=5, device="cpu")
    assert (store.width, store.epochs, store.replay) == (model.embed_dim, [1], Replay({}, []))
    source = StoredEmbeddings(store, pack)
    for item in (0, 13, 27):
        wave = torch.from_numpy(pack.read(item))[None]
        with torch.no_grad():
            alone = model.embed(wave)[0][0]
        np.testing.assert_allclose(source.target(1, item), alone, atol=2e-3, rtol=1e-3)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["values"] == "embeddings"
    assert meta["teacher"][0]["model"] == "audiotransformer_pico"
    assert len(meta["teacher"][0]["sha256"]) == 64


def test_what_is_written_stays_and_what_is_missing_is_made_by_any_number_of_processes(pack, model, tmp_path):
    settings = config(pack, model="x", part_size=8)
    asked = EmbeddingContent(open_of(model), 8)
    whole = EmbeddingStore(StoreWriter(settings, pack, asked, tmp_path / "one").save())
    assert sorted(p.name for p in (tmp_path / "one").glob("*.h5")) == [f"embeddings_ep1_{part}.h5" for part in range(4)]
    two = tmp_path / "two"
    for rank in (0, 1):
        StoreWriter(settings, pack, asked, two, rank, 2).save()
    lost = two / "embeddings_ep1_2.h5"
    kept = {path.name: path.stat().st_mtime_ns for path in two.glob("*.h5") if path != lost}
    lost.unlink()
    StoreWriter(settings, pack, asked, two).save()  # one process goes on where two were
    assert kept == {path.name: path.stat().st_mtime_ns for path in two.glob("*.h5") if path != lost}
    np.testing.assert_array_equal(EmbeddingStore(two).read(1), whole.read(1))
    other = create_model("audiotransformer_pico", num_classes=7, depth=1).eval()
    with pytest.raises(UserError, match="has embeddings made with another teacher"):
        store_embeddings(other, pack, two, num_workers=0)


def open_of(model):
    from models import Ensemble

    return Ensemble([model])


def write_npz(folder, pack, of_clip):
    folder.mkdir()
    for number, name in enumerate(pack.names):
        np.savez(folder / f"{name.rpartition('/')[2].removesuffix('.wav')}.npz", embed=of_clip(number))


def test_npz_files_are_found_by_name_and_need_no_model(tone_pack, pack, tmp_path, monkeypatch):
    write_npz(tmp_path / "teacher", pack, lambda n: np.array([[n, 2.0 * n, -1.0]]))  # S-SONDO's (1, E)
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump({"train_data": str(tone_pack), "targets": "embeddings", "npz": str(tmp_path / "teacher")})
    )
    result = run_command("save_logits.py", path, "--outputpath", tmp_path / "out", "--num_workers", "0")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "teacher" / "tones" / "chunk_10"
    assert f"--embeddingspath {folder}" in result.stdout
    store = EmbeddingStore(folder)
    np.testing.assert_array_equal(store.read(1), [[n, 2.0 * n, -1.0] for n in range(28)])
    assert store.meta["teacher"][0]["files"] == 28


def test_npz_rows_are_the_chunks_of_their_clip(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.arange(6).reshape(3, 2) + 10 * n)
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, 0.4)  # 1 s: two whole chunks and a half one
    assert len(chunks) == 3 * 28
    found = NpzEmbedder(tmp_path / "t", pack, chunks).embeddings(make_batch(item=torch.tensor([4, 3, 83])), None)
    assert found.tolist() == [[12, 13], [10, 11], [274, 275]]
    whole = Chunks.cut(pack.n_samples, pack.sample_rate, 0.2)
    with pytest.raises(
        UserError, match=r"'embed' has 3 rows, but .*tone_000\.wav has 5 chunks(?s:.*)and 25 more of these"
    ):
        NpzEmbedder(tmp_path / "t", pack, whole)
    alone = Chunks.cut(pack.n_samples, pack.sample_rate, 10.0)
    with pytest.raises(UserError, match=r"'embed' has 3 rows, but .* has 1 chunks"):
        NpzEmbedder(tmp_path / "t", pack, alone).embeddings(make_batch(item=torch.tensor([0])), None)


def test_a_tail_without_a_row_is_left_out_of_the_store(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.arange(4).reshape(2, 2) + 10 * n)  # S-SONDO drops tails
    settings = config(pack, npz=str(tmp_path / "t"), chunk_length=0.4)
    store = EmbeddingStore(
        StoreWriter(settings, pack, EmbeddingContent(open_embedder(settings, pack), 5), tmp_path / "s").save()
    )
    assert store.read_rows(1)["start"].round(3).tolist() == [0.0, 0.4] * 28
    np.testing.assert_array_equal(store.read(1)[2:4], [[10, 11], [12, 13]])


def test_files_of_one_name_are_reported_apart_by_their_folders(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.array([n, 0.0]))
    for folder, value in (("sounds", 5.0), ("others", 7.0)):
        (tmp_path / "t" / folder).mkdir()
        np.savez(tmp_path / "t" / folder / "tone_003.npz", embed=np.array([value, value]))
    (tmp_path / "t" / "tone_003.npz").unlink()
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, 10.0)
    found = NpzEmbedder(tmp_path / "t", pack, chunks).embeddings(make_batch(item=torch.tensor([3])), None)
    assert found.tolist() == [[5, 5]]


def test_files_of_other_widths_are_named(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.zeros(2 + (n == 4)))
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, 10.0)
    with pytest.raises(
        UserError, match=r"tone_004\.npz: 'embed' has width 3, that of .*tone_003\.npz 2; expected the same width"
    ):
        NpzEmbedder(tmp_path / "t", pack, chunks).embeddings(make_batch(item=torch.tensor([3, 4])), None)


def test_a_damaged_file_is_named(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.zeros(500))
    path = tmp_path / "t" / "tone_002.npz"
    path.write_bytes(path.read_bytes()[:1000])
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, 10.0)
    with pytest.raises(UserError, match=r"tone_002\.npz: expected an array 'embed' of numbers"):
        NpzEmbedder(tmp_path / "t", pack, chunks).embeddings(make_batch(item=torch.tensor([2])), None)


def test_missing_files_and_arrays_are_named(pack, tmp_path):
    write_npz(tmp_path / "t", pack, lambda n: np.zeros(2))
    (tmp_path / "t" / "tone_005.npz").unlink()
    chunks = Chunks.cut(pack.n_samples, pack.sample_rate, 10.0)
    with pytest.raises(UserError, match=r"1 of the 28 clips of .* have no \.npz file: sounds/tone_005\.wav"):
        NpzEmbedder(tmp_path / "t", pack, chunks)
    np.savez(tmp_path / "t" / "tone_005.npz", embedding=np.zeros(2))
    with pytest.raises(UserError, match=r"tone_005\.npz: expected an array 'embed'"):
        NpzEmbedder(tmp_path / "t", pack, chunks).embeddings(make_batch(item=torch.tensor([5])), None)


MODULE = """
import torch

def statistics(waveform, lengths):
    return torch.stack([torch.stack([w[:n].mean(), w[:n].std()]) for w, n in zip(waveform, lengths)])

def make(scale):
    return lambda waveform, lengths: scale * statistics(waveform, lengths)

def wrong(waveform, lengths):
    return waveform.mean()
"""


def test_a_function_gets_waveforms_at_its_rate_and_lengths(pack, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = config(pack, callable="mine:make", callable_args={"scale": 2.0})
    store = EmbeddingStore(
        StoreWriter(settings, pack, EmbeddingContent(open_embedder(settings, pack)), tmp_path / "s").save()
    )
    wave = pack.read(11)
    np.testing.assert_allclose(store.read(1)[11], [2 * wave.mean(), 2 * wave.std(ddof=1)], rtol=2e-3, atol=1e-6)
    wrong = FunctionEmbedder("mine:wrong", None, 16000)
    with pytest.raises(UserError, match=r"returned \(\) for waveforms \(2, 5\); expected one embedding a clip"):
        wrong.embeddings(make_batch(waveforms={16000: torch.zeros(2, 5)}), None)
    with pytest.raises(UserError, match="callable mine:nothing"):
        FunctionEmbedder("mine:nothing", None, 16000)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": "probabilities", "npz": "x"}, "npz can only give embeddings; set targets: embeddings"),
        ({"model": "a", "npz": "x"}, "give model, npz or callable, not model and npz"),
        ({}, "give model, npz or callable, not none"),
        ({"npz": "x", "epochs": 2}, "npz files hold embeddings of clips without augmentation"),
        ({"npz": "x", "sample_rate": 8000}, "sample_rate can only be given with callable"),
    ],
)
def test_one_source_is_required(pack, changes, sentence):
    assert any(sentence in conflict for conflict in config(pack, **changes).conflicts())


def test_embeddings_beyond_half_precision_are_clipped_and_reported(pack, model, tmp_path, monkeypatch, caplog):
    asked = EmbeddingContent(open_of(model))
    monkeypatch.setattr(asked.source, "embeddings", lambda batch, hear: torch.full((len(batch), 2), -1e6))
    with caplog.at_level("WARNING"):
        store = EmbeddingStore(StoreWriter(config(pack, model="x"), pack, asked, tmp_path / "a").save())
    assert (store.read(1) == -65504).all()
    assert "8 embeddings exceed the range of half precision and are clipped at 65504" in caplog.text
    monkeypatch.setattr(asked.source, "embeddings", lambda batch, hear: torch.full((len(batch), 2), torch.nan))
    with pytest.raises(UserError, match=r"output for sounds/tone_\d+\.wav is not finite"):
        StoreWriter(config(pack, model="x"), pack, asked, tmp_path / "b").save()


def test_a_store_in_use_keeps_its_description_and_small_ones_are_shared(pack, model, tmp_path):
    asked = EmbeddingContent(open_of(model))
    folder = StoreWriter(config(pack, model="x"), pack, asked, tmp_path).save()
    before = (folder / "meta.json").read_bytes()
    StoreWriter(config(pack, model="x", batch_size=3), pack, asked, tmp_path, 1, 2).save()
    assert (folder / "meta.json").read_bytes() == before
    assert [asked.n_parts(n, 1) for n in (0, 255, 2000, 2_000_000)] == [1, 1, 7, 245]


def test_a_checkpoint_that_a_function_reads_is_part_of_what_it_is(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def make(checkpoint):\n    return lambda w, n: w[:, :2]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    message = []
    for weights in (b"one", b"two"):
        (tmp_path / "w.bin").write_bytes(weights)
        message.append(FunctionEmbedder("mine:make", {"checkpoint": str(tmp_path / "w.bin")}, 16000).describe())
    assert message[0] != message[1]


def test_a_model_without_classes_is_not_used_for_any():
    embeds = create_model("audiotransformer_pico", num_classes=0, depth=1)
    with pytest.raises(UserError, match="embeds and has no classes"):
        SoftTargetContent(open_of(embeds), 5)
