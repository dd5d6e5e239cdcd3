"""One test for each trap that packing and reading audio fell into in published code."""

import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile
from torch.utils.data import DataLoader

from audio.dataset import ClipDataset, Pack
from audio.manifest import NameIndex, read_manifest
from audio.pack import pack
from audio.shard_writer import ShardWriter
from common.errors import UserError
from tests.audio.test_io import peak_hertz, sine


def packed(folder: Path, names: list[str], **options) -> Pack:
    pd.DataFrame({"filename": names}).to_csv(folder / "list.tsv", sep="\t", index=False)
    path = folder / "list.tsv"
    pack(read_manifest(path), path, folder / "out", "list", n_workers=0, progress=False, **options)
    return Pack.open(folder / "out" / "labels" / "list.tsv")


def test_44_khz_sound_is_not_stored_as_16_khz(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(44100, seconds=2), 44100)
    opened = packed(tmp_path, ["a.wav"])
    assert (opened.sample_rate, opened.n_samples.tolist()) == (16000, [32000])
    assert peak_hertz(opened.read(0), 16000) == pytest.approx(1000, abs=1)


def test_one_bad_file_does_not_end_the_packing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.wav", sine(16000), 16000)
    (tmp_path / "bad.wav").write_text("no sound")
    assert packed(tmp_path, ["bad.wav", "good.wav", "absent.wav"]).names == ["good.wav"]


@pytest.mark.parametrize("layout", ["flat", "clips"])
def test_the_same_file_name_in_two_folders_is_two_clips(tmp_path: Path, layout: str) -> None:
    for i, folder in enumerate(("dogs", "cats")):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "1.wav", np.full(100, 500 * (i + 1), np.int16), 16000)
    opened = packed(tmp_path, ["dogs/1.wav", "cats/1.wav"], layout=layout)
    assert [opened.read(i)[0] * 32768 for i in range(2)] == [500, 1000]


def test_float_files_are_converted_to_int16_and_not_truncated_to_zeros(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(16000), 16000, subtype="FLOAT")
    np.testing.assert_allclose(packed(tmp_path, ["a.wav"]).read(0), sine(16000), atol=2**-15)


def published_store(folder: Path, samples: np.ndarray, name: str = "a.wav") -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file[name] = samples
    (folder / "a.tsv").write_text(f"filename\thdf5path\n{name}\t{folder / 'a.h5'}\n")
    return folder / "a.tsv"


def test_a_published_dump_in_float32_is_read_at_its_scale(tmp_path: Path) -> None:
    opened = Pack.open(published_store(tmp_path, sine(16000)))
    np.testing.assert_allclose(opened.read(0), sine(16000), atol=2**-15)


@pytest.mark.parametrize("wrong", [sine(16000) * 32768, np.full(100, np.nan, np.float32)])
def test_a_float_dump_at_an_unknown_scale_is_an_error_rather_than_noise(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"'a\.wav' has floats up to .*expected full scale 1\.0"):
        Pack.open(published_store(tmp_path, wrong.astype(np.float32))).read(0)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("Y-0DdlOuIFUI_50.000.wav", "data/balanced/-0DdlOuIFUI_50.000.wav"),
        ("-0DdlOuIFUI_50.000.wav", "Y-0DdlOuIFUI_50.000.flac"),
        ("1-100032-A.wav", "audio/1-100032-A.ogg"),
        ("1-100032-A", "1-100032-A.wav"),
    ],
)
def test_names_of_published_stores_raise_no_key_error(stored: str, wanted: str) -> None:
    assert NameIndex([stored]).find(wanted) == 0
    assert NameIndex([wanted]).find(stored) == 0


@pytest.mark.parametrize("layout", ["flat", "clips"])
def test_no_hdf5_handle_crosses_into_a_loader_worker(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path / "a.h5", 16000, layout) as writer:
        for i in range(8):
            writer.append(f"{i}.wav", np.full(50, i, np.int16))
    rows = [f"{i}.wav\t{tmp_path / 'a.h5'}" for i in range(8)]
    (tmp_path / "a.tsv").write_text("filename\thdf5path\n" + "\n".join(rows) + "\n")
    opened = Pack.open(tmp_path / "a.tsv")
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0  # opening a pack keeps no file open
    opened.read(0)  # a user looked at a clip before training started

    owners = []
    real = h5py.File

    class Noted(real):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            owners.append(os.getpid())
            self.owner = os.getpid()

        def __getitem__(self, key):
            assert self.owner == os.getpid(), "read by a handle that was opened before the fork"
            return super().__getitem__(key)

    fresh = Pack.open(tmp_path / "a.tsv")
    monkeypatch.setattr("audio.shards.h5py.File", Noted)
    fresh.read(0)
    items = list(DataLoader(ClipDataset(fresh, [16000]), batch_size=None, num_workers=2))
    assert [float(item["waveforms"][16000][0]) * 32768 for item in items] == list(range(8))
    assert len(owners) == (1 if layout == "clips" else 0)


def test_a_list_without_hdf5path_is_reported_with_how_to_pack_it(tmp_path: Path) -> None:
    (tmp_path / "mine.tsv").write_text("filename\tlabels\na.wav\t1\n")
    with pytest.raises(UserError) as caught:
        Pack.open(tmp_path / "mine.tsv")
    text = str(caught.value)
    assert "missing 'hdf5path'" in text
    assert (
        f"run `python scripts/wavlist_to_hdf5.py {tmp_path / 'mine.tsv'} OUTDIR`, then use OUTDIR/labels/mine.tsv"
        in text
    )
