"""Memory does not depend on how long a sound is."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from models import create_model, save_checkpoint
from tests.conftest import ROOT
from tests.tagging.sounds import silence


def peak_megabytes(*words):
    """Highest resident memory of inference.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "inference.py"), *map(str, words), "--quiet"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


def test_an_hour_takes_the_memory_of_ten_minutes(tmp_path, checkpoint):
    settings = "-m", checkpoint, "-c", "30"
    short, long = (
        peak_megabytes(
            silence(tmp_path / f"{seconds}.wav", seconds), *settings, "--output", tmp_path / f"{seconds}.csv"
        )
        for seconds in (600, 3600)
    )
    assert len((tmp_path / "3600.csv").read_text().splitlines()) == 1 + 3 * 120
    assert long < short + 24  # the samples alone would take 190 more


@pytest.mark.long
def test_three_hours_of_flac_take_the_memory_of_ten_minutes(tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", create_model("ced_tiny").eval(), {})
    minute = np.repeat(np.random.default_rng(0).uniform(-0.5, 0.5, (600, 2)), 4410, axis=0)  # a small file
    peaks = []
    for minutes in (10, 180):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 44100, 2) as file:
            for _ in range(minutes):
                file.write(minute)
        target = tmp_path / f"{minutes}.csv"
        peaks.append(peak_megabytes(path, "-m", tmp_path / "tiny.pt", "--output", target))
        assert len(target.read_text().splitlines()) == 1 + 3 * 6 * minutes
    assert peaks[1] < peaks[0] + 24  # the samples alone would take 620 more
