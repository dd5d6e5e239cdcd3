"""Whole processes that tag a folder of sounds, and the same sound in one long file: see `scripts/benchmark.py tag`."""

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
from common.columns import align_columns
from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from scripts.benchmarks.turns import alternate, describe_spread, ratios

ROOT = Path(__file__).resolve().parents[2]
RATE = 44100  # of sounds made here
EQUAL = 1e-4  # how far probabilities in float32 may lie from those of the plain way


def make_sounds(folder: Path, n_files: int, seconds: float, seed: int) -> None:
    """Write noise that comes and goes, as 16-bit FLAC."""
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
            samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
            if own_rate != rate:
                raise UserError(f"{path} has {own_rate} Hz and {files[0]} {rate}: give sounds of one sample rate")
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
        load_model(model)  # tells what is wrong with it before anything is timed
    paths = {"torch": checkpoint}
    for precision in ("fp32", "int8"):
        paths[precision] = work / f"model.{precision}.onnx"
        words = ["-m", checkpoint, "--waveform", "--precision", precision, "--output", paths[precision]]
        _run([ROOT / "export_onnx.py", *words], work)
    return paths


def tag_benchmark(sounds: str | None, model: str, chunk_seconds: float, rounds: int, work: Path) -> str:
    """Time all ways of tagging and lay out what was measured.

    Args:
        sounds: a folder; noise is made where None.
        model: see `prepare_models`.
        chunk_seconds: of a window.
        rounds: turns of each contender.
        work: an empty folder.

    Raises:
        UserError: the sounds cannot be joined; or probabilities that should be equal are not.
    """
    if sounds is None:
        make_sounds(work / "sounds", 400, chunk_seconds, seed=0)
    files = find_audio_files([sounds or work / "sounds"])
    join_sounds(files, work / "joined.flac", chunk_seconds)
    paths = prepare_models(model, work)
    parts = []
    for what, inputs, tagged in (
        (f"{len(files)} files", files, sounds or work / "sounds"),
        ("one file", [work / "joined.flac"], work / "joined.flac"),
    ):
        ours = [ROOT / "inference.py", tagged, "-c", chunk_seconds, "--quiet", "--overwrite", "--device", "cpu"]
        plain = [ROOT / "scripts/benchmarks/plain_tag.py", paths["torch"], work / "plain.json", chunk_seconds, *inputs]
        contenders = {"plain, one window at a time": plain}
        for name, path in (
            ("project, PyTorch", "torch"),
            ("project, ONNX fp32", "fp32"),
            ("project, ONNX int8", "int8"),
        ):
            contenders[name] = [*ours, "-m", paths[path], "--output", work / f"{path}.csv"]
        seconds = alternate({name: partial(_run, words, work) for name, words in contenders.items()}, rounds)
        reference = json.loads((work / "plain.json").read_text())
        n_windows = sum(map(len, reference.values()))
        labels = load_model(paths["torch"]).labels
        far = {}
        for name, path in zip(list(contenders)[1:], ("torch", "fp32", "int8"), strict=True):
            _run([*contenders[name], "-k", len(labels)], work)  # all classes, not timed
            far[name] = largest_difference(work / f"{path}.csv", reference, labels, chunk_seconds)
            if path != "int8" and far[name] > EQUAL:
                raise UserError(f"{name}: a probability lies {far[name]:.1e} from that of the plain way")
        parts.append(f"{what}, {n_windows} windows of {chunk_seconds:g} s")
        parts.append(_table(seconds, far, n_windows))
    threads = os.cpu_count()
    head = f"whole processes, {model}, {threads} cores, PyTorch {torch.__version__}, medians of {rounds} rounds"
    return "\n".join([head, *parts])


def largest_difference(
    table: Path, reference: dict[str, list[list[float]]], labels: list[str], chunk_seconds: float
) -> float:
    """How far the probabilities of a CSV lie from those of the plain way, window by window and label by label."""
    index = {label: i for i, label in enumerate(labels)}
    far = 0.0
    n_rows = 0
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            windows = reference[row["filename"]]
            number = round(float(row["start"]) / chunk_seconds)
            if number < len(windows):  # else a remainder, which the plain way leaves out
                far = max(far, abs(float(row["probability"]) - windows[number][index[row["label"]]]))
                n_rows += 1
    if n_rows == 0:
        raise UserError(f"{table} has no row to compare")
    return far


def _run(words: Sequence[object], folder: Path) -> tuple[float, float]:
    """Run a command to its end and return its seconds on the clock and of the processors."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{' '.join(map(str, words[:8]))} failed:\n{done.stderr[-2000:]}")
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - began, spent


def _table(seconds: dict[str, list[tuple[float, float]]], far: dict[str, float], n_windows: int) -> str:
    baseline = [clock for clock, _ in next(iter(seconds.values()))]
    head = ["", "seconds", "(lowest, highest)", "windows/s", "ratio", "(lowest, highest)"]
    rows = [[*head, "processor seconds", "largest difference"]]
    for name, measured in seconds.items():
        times, spent = zip(*measured, strict=True)
        row = [name, *describe_spread(times, 1), f"{n_windows / statistics.median(times):.1f}"]
        row += describe_spread(ratios(baseline, times), 2)
        rows.append([*row, f"{statistics.median(spent):.1f}", f"{far[name]:.1e}" if name in far else ""])
    return "\n".join(align_columns(rows, between="   "))
