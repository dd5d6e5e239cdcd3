"""Size, time and accuracy of exported files: float32, 8 bits by ONNX Runtime, and quantized weights as trained."""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.columns import align_columns
from models import create_model, load_model
from models.onnx import export_onnx
from models.parametrizations import bake_parametrizations
from models.quantization import quantize_model
from models.quantization_recipe import Quantization
from scripts.benchmarks.timing import run_rounds, time_once
from tagging.onnx_engine import OnnxEngine


def benchmark_export(source: str, bits: Sequence[int], seconds: float, rounds: int, folder: Path) -> str:
    """Export a model in all ways and time the files, one thread and one clip at a time.

    Args:
        source: a checkpoint of float weights, or a name, which then gets random weights.
        bits: of the weights, quantized after training.
        seconds: length of the clip, whose spectrogram is the input.
        rounds: of all files.
        folder: for the files.

    Returns:
        A table: kB, ratio of sizes, the lowest and the median milliseconds, and the largest difference of a probability
        from PyTorch's with the same weights.
    """
    torch.manual_seed(0)
    model = (load_model(source) if Path(source).exists() else create_model(source)).eval()
    files = {"fp32": folder / "fp32.onnx", "int8": folder / "int8.onnx"}
    exported = export_onnx(model, {"fp32": files["fp32"], "int8": files["int8"]})
    differences: dict[str, float] = {str(precision): value for precision, value in exported.items()}
    for k in bits:
        quantized = copy.deepcopy(model)
        quantize_model(quantized, Quantization(weights=k))
        bake_parametrizations(quantized)
        name = f"{k} bits, as trained"
        files[name] = folder / f"{k}.onnx"
        differences[name] = export_onnx(quantized, {"quantized": files[name]})["quantized"]
    wave = torch.randn(1, round(seconds * model.sample_rate), generator=torch.Generator().manual_seed(0)) * 0.1
    mel = model.front_end(wave).numpy()
    candidates = {name: _make_candidate(path, mel) for name, path in files.items()}
    measured = run_rounds(candidates, rounds)
    rows = [[source, "kB", "of fp32", "lowest ms", "median ms", "from PyTorch"]]
    for name, times in measured.items():
        size, whole = files[name].stat().st_size, files["fp32"].stat().st_size
        milliseconds = [1000 * time for time in times]
        rows.append(
            [
                name,
                f"{size / 1000:.1f}",
                f"{100 * size / whole:.1f} %",
                f"{min(milliseconds):.2f}",
                f"{statistics.median(milliseconds):.2f}",
                f"{differences[name]:.1g}",
            ]
        )
    return align_columns(rows)


def _make_candidate(path: Path, mel: np.ndarray) -> Callable[[], float]:
    """Return a function that times one pass of a file on one thread; the first pass is done."""
    engine = OnnxEngine(path, n_threads=1024)  # calls at once, among which the cores are divided
    engine.predict_spectrogram(mel)
    return partial(time_once, partial(engine.predict_spectrogram, mel))
