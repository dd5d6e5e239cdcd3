"""Timing of whole processes that tag a folder of sounds, or one long file: see `scripts/benchmark.py tag`."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from audio.io import find_audio_files
from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from scripts.benchmarks.timing import format_table, run_rounds

ROOT = Path(__file__).resolve().parents[2]
RATE = 44100  # of the sounds made here
TOLERANCE = 1e-4  # largest difference between float32 probabilities and those of the plain script
MODELS = {"project, PyTorch": "torch", "project, ONNX fp32": "fp32", "project, ONNX int8": "int8"}


def make_sounds(folder: Path, n_files: int, seconds: float, seed: int) -> None:
    """Write noise with a slow swell, as 16-bit FLAC."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    time_axis = np.arange(round(seconds * RATE)) / RATE
    for number in range(n_files):
        swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.2, 3) * time_axis)
        soundfile.write(folder / f"{number:05}.flac", 0.3 * swell * rng.standard_normal(len(time_axis)), RATE)


def join_sounds(files: Sequence[Path], target: Path, seconds: float) -> None:
    """Write the first `seconds` of all files one after another into one FLAC file of one channel."""
    rate = soundfile.info(files[0]).samplerate
    with soundfile.SoundFile(target, "w", rate, 1, "PCM_16") as joined:
        for path in files:
            samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
            if file_rate != rate:
                raise UserError(f"{path} has {file_rate} Hz, {files[0]} has {rate}: sample rates must be the same")
            clip = np.zeros(round(seconds * rate), np.float32)
            clip[: len(samples)] = samples.mean(axis=1)[: len(clip)]
            joined.write(clip)


def prepare_models(model: str, work: Path) -> dict[str, Path]:
    """Write the checkpoint to tag with, and its ONNX exports (waveform in, float32 and int8).

    Args:
        model: a checkpoint, or a name, which then gets random weights.
        work: the folder to write to.
    """
    checkpoint = Path(model)
    if not checkpoint.exists():
        checkpoint = work / "model.pt"
        torch.manual_seed(0)
        save_checkpoint(checkpoint, create_model(model).eval())
    else:
        load_model(model)  # raises before anything is timed
    paths = {"torch": checkpoint}
    for precision in ("fp32", "int8"):
        paths[precision] = work / f"model.{precision}.onnx"
        words = ["-m", checkpoint, "--waveform", "--precision", precision, "--output", paths[precision]]
        _run([ROOT / "export_onnx.py", *words], work)
    return paths


def benchmark_tagging(sounds: str | None, model: str, chunk_seconds: float, rounds: int, work: Path) -> str:
    """Time all ways of tagging and lay out the results.

    Args:
        sounds: a folder; noise is made if None.
        model: see `prepare_models`.
        chunk_seconds: of a window.
        rounds: runs of each candidate.
        work: an empty folder.

    Raises:
        UserError: the sounds cannot be joined; or float32 probabilities differ from those of the plain script.
    """
    if sounds is None:
        make_sounds(work / "sounds", 400, chunk_seconds, seed=0)
    files = find_audio_files([sounds or work / "sounds"])
    join_sounds(files, work / "joined.flac", chunk_seconds)
    paths = prepare_models(model, work)
    labels = load_model(paths["torch"]).labels
    lines = [
        f"whole processes, {model}, {os.cpu_count()} cores, PyTorch {torch.__version__}, medians of {rounds} rounds"
    ]
    for title, inputs, tagged in (
        (f"{len(files)} files", files, sounds or work / "sounds"),
        ("one file", [work / "joined.flac"], work / "joined.flac"),
    ):
        tag = [ROOT / "inference.py", tagged, "-c", chunk_seconds, "--quiet", "--overwrite", "--device", "cpu"]
        plain = [ROOT / "scripts/benchmarks/plain_tag.py", paths["torch"], work / "plain.json", chunk_seconds, *inputs]
        commands: dict[str, list[object]] = {
            name: [*tag, "-m", paths[key], "--output", work / f"{key}.csv"] for name, key in MODELS.items()
        }
        candidates: dict[str, list[object]] = {"plain, one window at a time": plain, **commands}
        measured = run_rounds({name: partial(_run, words, work) for name, words in candidates.items()}, rounds)
        reference = json.loads((work / "plain.json").read_text())
        n_windows = sum(map(len, reference.values()))
        differences = dict.fromkeys(candidates, "")
        for name, words in commands.items():
            _run([*words, "-k", len(labels)], work)  # all classes, not timed
            largest = find_largest_difference(work / f"{MODELS[name]}.csv", reference, labels, chunk_seconds)
            if MODELS[name] != "int8" and largest > TOLERANCE:
                raise UserError(f"{name}: a probability differs by {largest:.1e} from that of the plain script")
            differences[name] = f"{largest:.1e}"
        lines.append(f"{title}, {n_windows} windows of {chunk_seconds:g} s")
        lines.append(_format_table(measured, n_windows, differences))
    return "\n".join(lines)


def find_largest_difference(
    table: Path, reference: dict[str, list[list[float]]], labels: list[str], chunk_seconds: float
) -> float:
    """Compare the probabilities of a CSV with those of the plain script, for each window and label."""
    index = {label: i for i, label in enumerate(labels)}
    largest = 0.0
    n_rows = 0
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            windows = reference[row["filename"]]
            number = round(float(row["start"]) / chunk_seconds)
            if number < len(windows):  # else a remainder, which the plain script skips
                difference = abs(float(row["probability"]) - windows[number][index[row["label"]]])
                largest = max(largest, difference)
                n_rows += 1
    if n_rows == 0:
        raise UserError(f"{table} has no row to compare")
    return largest


def _run(words: Sequence[object], folder: Path) -> tuple[float, float]:
    """Run a command and return its wall-clock seconds and its processor seconds."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(map(str, words[:8]))} failed:\n{done.stderr[-2000:]}")
    after = os.times()
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - start, processor


def _format_table(measured: dict[str, list[tuple[float, float]]], n_windows: int, differences: dict[str, str]) -> str:
    seconds, processor = ({name: [run[column] for run in runs] for name, runs in measured.items()} for column in (0, 1))
    columns = {
        "seconds": {name: f"{statistics.median(values):.1f}" for name, values in seconds.items()},
        "processor seconds": {name: f"{statistics.median(values):.1f}" for name, values in processor.items()},
        "largest difference": differences,
    }
    return format_table(seconds, next(iter(seconds)), n_windows, "windows/s", columns)
