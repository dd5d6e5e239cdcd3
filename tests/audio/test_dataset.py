import logging
import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from audio.cutting import Chunks
from audio.dataset import ClipDataset, Pack, pad_batch
from audio.shard_writer import ShardWriter
from audio.shards import LAYOUTS
from common.errors import UserError

N = 24


def samples_of(i: int) -> np.ndarray:
    """Each clip has its own length, and tells its number in every sample."""
    return np.full(100 + i, 1000 * (i + 1), np.int16)


def make_pack(folder: Path, layout: str = "flat", n_shards: int = 2, rates: tuple[int, ...] = (16000, 16000)) -> Path:
    names = [f"audio/{i:02d}.wav" for i in range(N)]
    paths = [str(folder / "hdf5" / f"x_{i % n_shards}.h5") for i in range(N)]
    for s in range(n_shards):
        with ShardWriter(folder / "hdf5" / f"x_{s}.h5", rates[s], layout) as writer:
            for i in range(s, N, n_shards):
                writer.append(names[i], samples_of(i))
    manifest = folder / "labels" / "x.tsv"
    manifest.parent.mkdir()
    table = pd.DataFrame({"filename": names, "labels": [str(i) for i in range(N)], "hdf5path": paths})
    table.to_csv(manifest, sep="\t", index=False)
    return manifest


def edit(manifest: Path, **columns: list[str] | None) -> None:
    table = pd.read_csv(manifest, sep="\t", dtype=str)
    for name, values in columns.items():
        table = table.drop(columns=name) if values is None else table.assign(**{name: values})
    table.to_csv(manifest, sep="\t", index=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pack_reads_each_clip_of_its_manifest(tmp_path: Path, layout: str) -> None:
    pack = Pack.open(make_pack(tmp_path, layout))
    assert (len(pack), pack.sample_rate, pack.n_missing) == (N, 16000, 0)
    assert pack.names[3] == "audio/03.wav"
    assert pack.table["labels"].tolist() == [str(i) for i in range(N)]
    assert pack.n_samples.dtype == np.int64
    assert pack.n_samples.tolist() == [100 + i for i in range(N)]
    for i in range(N):
        waveform = pack.read(i)
        assert waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, samples_of(i) / 32768)
    assert len(pack.read(5, 10, 30)) == 20


def read_in_child(pack: Pack, queue: multiprocessing.Queue) -> None:
    queue.put([float(pack.read(i)[0]) * 32768 for i in range(N)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pack_that_was_read_before_a_fork_reads_on_in_parent_and_children(tmp_path: Path, layout: str) -> None:
    pack = Pack.open(make_pack(tmp_path, layout))
    wanted = [1000.0 * (i + 1) for i in range(N)]
    assert [pack.read(i)[0] * 32768 for i in range(N)] == wanted
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(pack, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [pack.read(i)[0] * 32768 for i in range(N)] == wanted
    assert [queue.get(timeout=20) for _ in children] == [wanted] * 3
    for child in children:
        child.join()
    assert [pack.read(i)[0] * 32768 for i in range(N)] == wanted


@pytest.mark.parametrize(
    ("layout", "n_workers", "start"),
    [("flat", 0, None), ("flat", 1, "fork"), ("flat", 3, "fork"), ("clips", 3, "fork"), ("clips", 1, "spawn")],
)
def test_any_number_of_loader_workers_gives_the_same_items(
    tmp_path: Path, layout: str, n_workers: int, start: str | None
) -> None:
    pack = Pack.open(make_pack(tmp_path, layout))
    pack.read(0)
    dataset = ClipDataset(pack, [16000, 32000])
    loader = DataLoader(dataset, batch_size=None, num_workers=n_workers, multiprocessing_context=start)
    for _ in range(2 if start != "spawn" else 1):
        items = list(loader)
        assert [item["index"] for item in items] == list(range(N))
        assert [item["name"] for item in items] == pack.names
        for i, item in enumerate(items):
            np.testing.assert_array_equal(item["waveforms"][16000].numpy(), samples_of(i) / np.float32(32768))
            assert len(item["waveforms"][32000]) == 2 * (100 + i)


def test_chunks_choose_parts_of_clips_and_rates_resample_them(tmp_path: Path) -> None:
    pack = Pack.open(make_pack(tmp_path))
    chunks = Chunks(np.array([4, 2]), np.array([0, 20]), np.array([50, 102]), pack.sample_rate)
    dataset = ClipDataset(pack, [16000, 8000], chunks)
    assert len(dataset) == 2
    item = dataset[1]
    assert (item["index"], item["name"]) == (1, "audio/02.wav")
    assert item["waveforms"][16000].dtype == torch.float32
    assert item["waveforms"][16000].tolist() == [3000 / 32768] * 82
    assert len(item["waveforms"][8000]) == 41


def test_a_pickled_pack_reads_the_same(tmp_path: Path) -> None:
    pack = Pack.open(make_pack(tmp_path))
    pack.read(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pack)).read(7), pack.read(7))


def test_a_moved_pack_is_found_beside_its_manifest(tmp_path: Path) -> None:
    make_pack(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert len(Pack.open(tmp_path / "new" / "labels" / "x.tsv")) == N


def test_published_shards_without_a_rate_are_taken_as_16_khz_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_pack(tmp_path, "clips")
    for path in (tmp_path / "hdf5").iterdir():
        with h5py.File(path, "a") as file:
            del file.attrs["sample_rate"]
    with caplog.at_level(logging.WARNING):
        assert Pack.open(manifest).sample_rate == 16000
    assert "has no sample rate; 16000 Hz are assumed" in caplog.text


def test_clips_that_are_not_in_their_shard_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_pack(tmp_path)
    edit(manifest, filename=["gone.wav"] + [f"audio/{i:02d}.wav" for i in range(1, N)])
    with caplog.at_level(logging.WARNING):
        pack = Pack.open(manifest)
    assert (len(pack), pack.n_missing) == (N - 1, 1)
    assert (pack.names[0], pack.table["labels"][0]) == ("audio/01.wav", "1")
    np.testing.assert_array_equal(pack.read(0), samples_of(1) / 32768)
    assert "1 clips are not in their shards" in caplog.text
    assert "gone.wav" in caplog.text


def test_no_clip_in_the_shards_is_an_error_that_shows_both_spellings(tmp_path: Path) -> None:
    manifest = make_pack(tmp_path)
    edit(manifest, filename=[f"other_{i}.wav" for i in range(N)])
    with pytest.raises(UserError, match=r"none of its 24 clips.*'audio/00\.wav'.*expected 'other_0\.wav'"):
        Pack.open(manifest)


def test_all_absent_and_damaged_shards_are_reported_together(tmp_path: Path) -> None:
    manifest = make_pack(tmp_path, n_shards=3, rates=(16000,) * 3)
    (tmp_path / "hdf5" / "x_0.h5").unlink()
    (tmp_path / "hdf5" / "x_2.h5").write_text("hello")
    with pytest.raises(UserError, match="has 2 faults") as caught:
        Pack.open(manifest)
    assert "x_0.h5' does not exist (searched" in str(caught.value)
    assert "x_2.h5: is not an HDF5 file" in str(caught.value)


def test_shards_of_different_rates_are_no_pack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16000 Hz in x_0\.h5; 32000 Hz in x_1\.h5"):
        Pack.open(make_pack(tmp_path, rates=(16000, 32000)))


def test_a_batch_is_padded_with_zeros_behind_each_clip() -> None:
    batch, lengths = pad_batch([torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])])
    assert batch.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert lengths.tolist() == [2, 1, 3]
    assert lengths.dtype == torch.int64
