"""Timing of several candidates in alternation, and tables of the results."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from common.columns import align_columns

T = TypeVar("T")
WARMUP_STEPS = 2  # of each candidate, not timed; compilation happens here


def time_steps(
    candidates: Mapping[str, Callable[[Any], object]],
    batch: Any,
    rounds: int,
    steps: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Time `steps` steps of each candidate in each round; return the seconds of one step, a value for each round."""

    def measure(step: Callable[[Any], object], n_steps: int) -> float:
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(n_steps):
            step(batch)
        _synchronise(device)
        return (time.perf_counter() - start) / n_steps

    for step in candidates.values():
        measure(step, WARMUP_STEPS)
    return run_rounds({name: partial(measure, step, steps) for name, step in candidates.items()}, rounds)


def run_rounds(candidates: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call each candidate once in each round and return the results.

    Every other round runs in reverse order, so that no candidate always follows the same one.
    """
    results: dict[str, list[T]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(candidates[name]())
    return results


def time_once(function: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_speedups(baseline: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Return the seconds of the baseline over those of a candidate, for each round."""
    return [slow / fast for slow, fast in zip(baseline, seconds, strict=True)]


def format_table(
    seconds: Mapping[str, Sequence[float]],
    baseline: str,
    n_items: int,
    unit: str,
    columns: Mapping[str, Mapping[str, str]],
) -> str:
    """Lay out throughput and speedup of each candidate.

    Args:
        seconds: candidate → seconds, one value for each round.
        baseline: the candidate that the others are compared with, round by round.
        n_items: items processed in that time.
        unit: heading of the throughput.
        columns: further columns: heading → candidate → cell.
    """
    rows = [["", unit, "(lowest, highest)", "ratio", "(lowest, highest)", *columns]]
    for name, times in seconds.items():
        throughput = format_spread([n_items / t for t in times], 1)
        speedup = format_spread(compute_speedups(seconds[baseline], times), 2)
        rows.append([name, *throughput, *speedup, *(cells[name] for cells in columns.values())])
    return align_columns(rows)


def compute_tflops(seconds: Mapping[str, Sequence[float]], flops: Mapping[str, int]) -> dict[str, float]:
    """Return the median TFLOP/s of each candidate, whose step takes `flops` floating-point operations."""
    return {name: flops[name] / statistics.median(times) / 1e12 for name, times in seconds.items()}


def format_spread(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Return the median, and the range in brackets."""
    return f"{statistics.median(values):.{digits}f}", f"({min(values):.{digits}f}, {max(values):.{digits}f})"


def describe_device(device: torch.device) -> str:
    """Return the number of CPU threads, or the name of the GPU."""
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
