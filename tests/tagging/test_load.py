"""Many files, and a file of a day, in memory and open files that stay the same."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.clips import load_clip, load_clips
from audio.decoder_processes import _end_all, _idle
from audio.manifest import read_manifest
from audio.pack import pack
from tagging.files import TagOptions, tag_files
from tests.tagging.sounds import RATE, Meter


def resident_mb(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.fixture(autouse=True)
def new_decoders() -> None:
    """End the decoders of earlier tests, which may have decoded larger sounds."""
    _end_all()


def measure() -> tuple[float, float, int]:
    """Memory of this process and of its largest decoder in MB, and its open files."""
    decoders = max([resident_mb(process.pid) for process in _idle], default=0.0)
    return resident_mb(), decoders, len(os.listdir("/proc/self/fd"))


class Day(Meter):
    """A meter that keeps no clips."""

    def predict(self, clips):
        rows = super().predict(clips)
        self.batches.clear()
        return rows


def make_files(folder: Path, n: int) -> list[Path]:
    """Short sounds in several formats, under as many names."""
    folder.mkdir()
    kinds = ("wav", "flac", "ogg", "mp3")
    for kind in kinds:
        soundfile.write(folder / f"x.{kind}", np.random.default_rng(0).uniform(-0.5, 0.5, 1600), RATE)
    paths = [folder / f"{i}.{kinds[i % 4]}" for i in range(n)]
    for path in paths:
        os.link(folder / f"x{path.suffix}", path)
    return paths


@pytest.mark.parametrize(("n_first", "n_files"), [(100, 500), pytest.param(5_000, 50_000, marks=pytest.mark.long)])
def test_memory_and_open_files_do_not_grow_with_the_number_of_files(tmp_path: Path, n_first: int, n_files: int) -> None:
    paths = make_files(tmp_path / "sounds", n_files)
    measured = []
    for number, file in enumerate(tag_files(Day(), paths, TagOptions(1)), 1):
        assert (file.fault, len(file.windows)) == (None, 1)
        if number in (n_first, n_files):
            measured.append(measure())
    for number, clip in enumerate(load_clips(paths, load_isolated, 2), 1):
        assert clip.samples is not None
        if number in (n_first, n_files):
            measured.append(measure())
    print("MB, MB of decoders, open files:", [tuple(map(round, each)) for each in measured])
    for (before, decoders, n_open), (after, later, n_open_later) in (measured[:2], measured[2:]):
        assert after < before + 24
        assert later < max(decoders, 60) + 24
        assert n_open_later <= n_open + 2


def load_isolated(path: Path, cancelled):
    return load_clip(path, RATE, isolated=True, cancelled=cancelled)


@pytest.mark.long
def test_fifty_thousand_files_are_packed_in_order(tmp_path: Path) -> None:
    paths = make_files(tmp_path / "sounds", 50_000)
    pd.DataFrame({"filename": [f"sounds/{path.name}" for path in paths]}).to_csv(
        tmp_path / "x.tsv", sep="\t", index=False
    )
    table = read_manifest(tmp_path / "x.tsv")
    before = resident_mb()
    report = pack(table, tmp_path / "x.tsv", tmp_path / "out", "x", n_workers=2, size_per_file=10_000, progress=False)
    print("MB before and after:", before, resident_mb())
    assert report.n_packed == 50_000
    assert resident_mb() < before + 150  # names, rows and the report


@pytest.mark.parametrize("hours", [1, pytest.param(24, marks=pytest.mark.long)])
def test_a_file_of_a_day_takes_the_memory_of_a_file_of_minutes(tmp_path: Path, hours: int) -> None:
    tone = (0.25 * np.sin(np.arange(RATE * 60) * 0.05)).astype(np.float32)
    path = tmp_path / "day.flac"
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16", format="FLAC") as file:
        for minute in range(60 * hours):
            file.write(tone if minute % 30 == 0 else np.zeros_like(tone))
    short = tmp_path / "short.flac"
    soundfile.write(short, np.zeros(RATE * 600), RATE)
    list(tag_files(Day(), [short], TagOptions(1)))
    before = measure()
    (day,) = tag_files(Day(), [path], TagOptions(1))
    after = measure()
    print("MB, MB of decoders, open files:", before, after)
    assert (day.fault, day.warnings, len(day.windows)) == (None, {}, 360 * hours)
    assert [window.end for window in day.windows] == [10.0 * (i + 1) for i in range(360 * hours)]
    assert after[0] < before[0] + 24 + hours
    assert after[1] < before[1] + 24
