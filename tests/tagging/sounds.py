"""Sounds by formula, and an engine whose answers can be told from them."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000


class Meter:
    """An engine whose probabilities can be told from a clip: its mean, and whether it is short."""

    name = "meter"
    max_samples: int | None = None

    def __init__(self, n_threads: int = 1, sample_rate: int = RATE, pause: float = 0.0):
        self.labels = ["level", "short", "never"]
        self.n_threads, self.sample_rate, self.pause = n_threads, sample_rate, pause
        self.batches: list[list[np.ndarray]] = []
        self.lock = threading.Lock()

    def predict(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        with self.lock:
            self.batches.append(list(clips))
        time.sleep(self.pause)
        rows = [(clip.mean(), 0.9 * (len(clip) < self.sample_rate / 2), 0) for clip in clips]
        return np.array(rows, np.float32)


def steady(path: Path, levels: Sequence[float], rate: int = RATE, last: float = 1.0, subtype: str = "PCM_16") -> Path:
    """Write a file of one level for each second, the last one only in part."""
    samples = np.repeat(np.array(levels, np.float32), rate)
    soundfile.write(path, samples[: round((len(levels) - 1 + last) * rate)], rate, subtype=subtype)
    return path


def humming(number: int, seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A hum in noise that changes slowly, another for every number: (S,) or (S, channels)."""
    rng = np.random.default_rng(number)
    time = np.arange(round(seconds * rate)) / rate
    hum = np.sin(2 * np.pi * (150 + 70 * (number % 23)) * time) * np.sin(time * (1 + number % 5))
    sound = 0.4 * hum[:, None] + 0.05 * rng.standard_normal((len(time), channels))
    return (sound[:, 0] if channels == 1 else sound).astype(np.float32)


def hum_folder(folder: Path, n_files: int, seconds: float = 0.3) -> Path:
    """A folder of short hums."""
    folder.mkdir()
    for number in range(n_files):
        soundfile.write(folder / f"{number:03}.wav", humming(number, seconds), RATE)
    return folder


def silence(path: Path, seconds: int) -> Path:
    """A wav of zeros that takes no room on the disk, whatever its length."""
    soundfile.write(path, np.zeros(1, np.int16), RATE)
    size = 44 + 2 * RATE * seconds
    with open(path, "r+b") as file:
        file.seek(4)
        file.write((size - 8).to_bytes(4, "little"))
        file.seek(40)
        file.write((size - 44).to_bytes(4, "little"))
        file.truncate(size)
    return path
