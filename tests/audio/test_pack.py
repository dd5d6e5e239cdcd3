import os
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.dataset import Pack
from audio.io import WARNINGS
from audio.manifest import read_manifest
from audio.pack import Clip, load_clip, load_clips, pack
from audio.shards import Shard
from common.errors import UserError
from tests.audio.test_io import peak_hertz, sine, write_bad


def make_list(folder: Path, names: list[str], **columns: list[str]) -> tuple[pd.DataFrame, Path]:
    path = folder / "mine.tsv"
    pd.DataFrame({"filename": names, **columns}).to_csv(path, sep="\t", index=False)
    return read_manifest(path), path


def write_numbered(folder: Path, n: int) -> list[str]:
    """Clip i is constant and of its own length, so that no two can be confused."""
    for i in range(n):
        soundfile.write(folder / f"{i}.wav", np.full(200 + 10 * i, i, np.int16), 16000)
    return [f"{i}.wav" for i in range(n)]


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_order_is_that_of_the_list_with_any_number_of_workers(tmp_path: Path, n_workers: int) -> None:
    names = write_numbered(tmp_path, 40)[::-1]
    table, path = make_list(tmp_path, names)
    report = pack(table, path, tmp_path / "out", "x", size_per_file=15, n_workers=n_workers, progress=False)
    assert report.n_packed == 40
    shards = [Shard(tmp_path / "out" / "hdf5" / f"x_{i}.h5") for i in range(3)]
    assert [len(shard) for shard in shards] == [15, 15, 10]
    assert [name for shard in shards for name in shard.names] == names
    opened = Pack.open(tmp_path / "out" / "labels" / "x.tsv")
    assert opened.names == names
    assert [opened.read(i)[0] * 32768 for i in range(40)] == list(range(40))[::-1]


def slow_first(path: Path, cancelled: threading.Event) -> Clip:
    time.sleep(0.2 if path.name == "0" else 0)
    return Clip(samples=np.array([int(path.name)], np.int16))


def test_no_more_than_a_window_is_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Counting(list):
        def __getitem__(self, key):
            return Counting(list.__getitem__(self, key)) if isinstance(key, slice) else list.__getitem__(self, key)

        def __iter__(self):
            for item in list.__iter__(self):
                taken.append(item)
                yield item

    monkeypatch.setattr("audio.clips._CLIPS_IN_FLIGHT", 2)
    clips = load_clips(Counting(Path(str(i)) for i in range(50)), slow_first, n_workers=2)
    first = next(clips)
    assert first.samples is not None
    assert first.samples.tolist() == [0]
    assert len(taken) == 4
    assert [int(clip.samples[0]) for clip in clips if clip.samples is not None] == list(range(1, 50))


def test_the_report_counts_and_names_every_kind_of_clip(tmp_path: Path) -> None:
    for what in ("text", "0 bytes", "no samples", "nan", "missing"):
        write_bad(tmp_path / f"{what}.wav", what)
    soundfile.write(tmp_path / "good.wav", sine(16000), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(1600), 16000)
    soundfile.write(tmp_path / "clipped.wav", sine(16000, peak=2.0), 16000)
    soundfile.write(tmp_path / "high.wav", sine(44100), 44100)
    soundfile.write(tmp_path / "cut.wav", sine(16000), 16000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:3244])
    names = ["good", "text", "0 bytes", "no samples", "nan", "silent", "clipped", "high", "missing", "cut", "good"]
    table, path = make_list(tmp_path, [f"{name}.wav" for name in names], labels=[str(i) for i in range(11)])
    report = pack(table, path, tmp_path / "out", "x", n_workers=2, add_duration=True, progress=False)
    message = report.as_json()
    assert (message["listed"], message["packed"], message["resampled"]) == (11, 5, 1)
    assert message["left_out"] == {"unreadable": 2, "empty": 2, "nan": 1, "duplicate": 1}
    noted = {"silent": ["silent.wav"], "clipped": ["clipped.wav"], "truncated": ["cut.wav"]}
    assert message["noted"] == dict.fromkeys(WARNINGS, 0) | dict.fromkeys(noted, 1)
    assert message["source_rates"] == {"16000": 4, "44100": 1}
    assert report.hours == pytest.approx((3 + 0.1 + 0.1) / 3600)
    assert [row["filename"] for row in message["left_out_clips"]["empty"]] == ["0 bytes.wav", "no samples.wav"]
    assert message["left_out_clips"]["duplicate"][0]["reason"] == "listed again in row 11; the first was kept"
    assert message["noted_clips"] == {kind: [] for kind in WARNINGS} | noted
    (warning,) = message["warnings"]
    assert (warning["filename"], warning["kind"]) == ("cut.wav", "truncated")
    assert warning["what"] == "ends before the length that its header announces (0.10 of 1.00 s)"
    manifest = read_manifest(tmp_path / "out" / "labels" / "x.tsv")
    assert manifest["labels"].tolist() == ["0", "5", "6", "7", "9"]
    assert manifest["duration"].tolist() == ["1", "0.1", "1", "1", "0.1"]
    for line in (
        "packed      5 of 11 clips, 3.2 seconds at 16000 Hz",
        "resampled   1 (1 from 44100 Hz)",
        "NaN         1",
    ):
        assert line in report.summary()


@pytest.mark.parametrize(
    ("waveform", "clipped"),
    [
        (sine(16000, peak=1.5), True),
        (np.clip(sine(16000, peak=4), -1, 1), True),  # clipped before it came here
        (sine(16000, peak=1.0), False),  # a full-scale peak is not clipping
        (np.array([0.9, 1.005, 0.9]), False),  # what resampling may do
        (np.array([1.0]), False),
    ],
)
def test_clipped_means_passing_full_scale_or_staying_at_it(tmp_path: Path, waveform: np.ndarray, clipped: bool) -> None:
    soundfile.write(tmp_path / "x.wav", waveform, 16000, subtype="FLOAT")
    assert load_clip(tmp_path / "x.wav", 16000).clipped is clipped


@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_two_channels_are_kept_in_the_clips_layout(tmp_path: Path, n_channels: int) -> None:
    sound = np.stack([np.full(300, 1000 * (k + 1), np.int16) for k in range(n_channels)], axis=1)
    soundfile.write(tmp_path / "x.wav", sound, 16000)
    table, path = make_list(tmp_path, ["x.wav"])
    pack(table, path, tmp_path / "out", "x", layout="clips", stereo=True, n_workers=0, progress=False)
    shard = Shard(tmp_path / "out" / "hdf5" / "x_0.h5")
    stored = shard._dataset(0)[:]
    assert stored.shape == (2, 300)
    assert stored[:, 0].tolist() == {1: [1000, 1000], 2: [1000, 2000], 6: [3500, 3500]}[n_channels]
    assert shard.n_samples(0) == 300


def test_two_channels_in_the_flat_layout_are_refused_in_words(tmp_path: Path) -> None:
    table, path = make_list(tmp_path, write_numbered(tmp_path, 1))
    with pytest.raises(UserError, match="clips layout only: add --layout clips"):
        pack(table, path, tmp_path / "out", "x", stereo=True)


def test_names_that_cannot_stand_side_by_side_cost_only_the_later_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "b", sine(16000), 16000, format="WAV")
    names = ["a/b", str(tmp_path / "a" / "b"), "./a/b"]
    table, path = make_list(tmp_path, [*names, "/" + str(tmp_path / "a" / "b").lstrip("/")])
    report = pack(table, path, tmp_path / "out", "x", layout="clips", n_workers=0, progress=False)
    assert report.n_packed == 2
    assert [name for name, _ in report.left_out["duplicate"]] == ["./a/b", str(tmp_path / "a" / "b")]


def test_packing_again_replaces_the_whole_pack(tmp_path: Path) -> None:
    table, path = make_list(tmp_path, write_numbered(tmp_path, 6))
    pack(table, path, tmp_path / "out", "x", size_per_file=2, n_workers=0, progress=False)
    pack(table.iloc[:3], path, tmp_path / "out", "x", sample_rate=8000, size_per_file=2, n_workers=0, progress=False)
    assert sorted(os.listdir(tmp_path / "out" / "hdf5")) == ["x_0.h5", "x_1.h5"]
    again = Pack.open(tmp_path / "out" / "labels" / "x.tsv")
    assert (len(again), again.sample_rate, again.n_samples[0]) == (3, 8000, 100)


def read_pack(folder: Path) -> dict[str, bytes]:
    """The files of finished packs, by name."""
    return {file.name: file.read_bytes() for pattern in ("hdf5/*.h5", "labels/*") for file in folder.glob(pattern)}


def test_a_failure_midway_leaves_the_earlier_pack_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, path = make_list(tmp_path, write_numbered(tmp_path, 6))
    pack(table, path, tmp_path / "out", "x", size_per_file=2, n_workers=0, progress=False)
    before = read_pack(tmp_path / "out")
    real = load_clip

    def fail_on_last(path: Path, **settings) -> Clip:
        if path.name == "5.wav":
            raise KeyboardInterrupt
        return real(path, **settings)

    monkeypatch.setattr("audio.pack.load_clip", fail_on_last)
    with pytest.raises(KeyboardInterrupt):
        pack(table, path, tmp_path / "out", "x", sample_rate=8000, size_per_file=2, n_workers=0, progress=False)
    assert read_pack(tmp_path / "out") == before


def test_nothing_to_pack_leaves_nothing_and_reports_where_it_looked(tmp_path: Path) -> None:
    table, path = make_list(tmp_path, ["absent.wav", "gone.wav"])
    with pytest.raises(UserError, match=r"none of its 2 clips could be packed.*no such file.*searched in") as caught:
        pack(table, path, tmp_path / "out", "x", n_workers=2, progress=False)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pack_never_replaces_its_own_list(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    table, path = make_list(tmp_path / "labels", ["a.wav"])
    with pytest.raises(UserError, match="would replace the list itself"):
        pack(table, path, tmp_path, "mine")


def test_published_clips_are_packed_at_the_pack_rate(tmp_path: Path, shared: Path) -> None:
    path = shared / "data" / "esc10" / "esc10.tsv"
    table = read_manifest(path).iloc[:20]
    report = pack(table, path, tmp_path, "esc10", sample_rate=32000, n_workers=2, progress=False)
    assert (report.n_packed, report.n_resampled) == (20, 20)
    opened = Pack.open(tmp_path / "labels" / "esc10.tsv")
    assert opened.names == table["filename"].tolist()
    assert opened.table["category"].tolist() == table["category"].tolist()
    for i in range(20):
        source, rate = soundfile.read(path.parent / opened.names[i], dtype="float32")
        assert opened.n_samples[i] == pytest.approx(len(source) * 32000 / rate, abs=1)
        loud = float(np.sqrt((source**2).mean()))
        assert float(np.sqrt((opened.read(i) ** 2).mean())) == pytest.approx(loud, rel=0.1, abs=1e-3)
    assert opened.read(0).dtype == np.float32


def test_a_44_khz_sine_is_still_a_1_khz_sine_in_the_pack(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.flac", sine(44100), 44100)
    table, path = make_list(tmp_path, ["x.flac"])
    pack(table, path, tmp_path / "out", "x", n_workers=0, progress=False)
    waveform = Pack.open(tmp_path / "out" / "labels" / "x.tsv").read(0)
    assert len(waveform) == 16000
    assert peak_hertz(waveform, 16000) == pytest.approx(1000, abs=1)
