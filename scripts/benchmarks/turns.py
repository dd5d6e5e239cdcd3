"""Contenders that take turns in one process, and the table of what they took: for all benchmarks of steps."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from common.columns import align_columns

T = TypeVar("T")
WARMUP_STEPS = 2  # of each contender, not timed; compilation happens here


def take_turns(
    contenders: Mapping[str, Callable[[Any], object]],
    batch: Any,
    rounds: int,
    steps: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Time `steps` steps of each contender in turn, `rounds` times; return the seconds of a step, one for each round.

    Every other round runs in reverse order, so that none always follows the same one.
    """

    def timed(step: Callable[[Any], object], n_steps: int) -> float:
        _synchronise(device)
        began = time.perf_counter()
        for _ in range(n_steps):
            step(batch)
        _synchronise(device)
        return (time.perf_counter() - began) / n_steps

    for step in contenders.values():
        timed(step, WARMUP_STEPS)
    return alternate({name: partial(timed, step, steps) for name, step in contenders.items()}, rounds)


def alternate(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call each contender `rounds` times and return what it gave, every other round in reverse order."""
    measured: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            measured[name].append(contenders[name]())
    return measured


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(baseline: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """How many times as fast as the baseline, round by round."""
    return [slow / fast for slow, fast in zip(baseline, seconds, strict=True)]


def table(
    seconds: Mapping[str, Sequence[float]],
    batch_size: int,
    flops: Mapping[str, int],
    baseline: str,
    peak_tflops: float | None = None,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Lay out what was measured.

    Args:
        seconds: of a step, for each contender one number a round.
        batch_size: clips of a step.
        flops: of a step of each contender.
        baseline: the contender that the others are compared with, round by round.
        peak_tflops: what the machine can do, for the utilisation, or None.
        more: columns to add: a cell for each contender.
    """
    head = ["", "clips/s", "(lowest, highest)", "ratio", "(lowest, highest)", "TFLOP/s"]
    rows = [head + ([] if peak_tflops is None else ["utilisation"]) + list(more or {})]
    for name, times in seconds.items():
        tflops = flops[name] / statistics.median(times) / 1e12
        row = [
            name,
            *describe_spread([batch_size / t for t in times], 1),
            *describe_spread(ratios(seconds[baseline], times), 2),
        ]
        row += [f"{tflops:.3g}"] + ([] if peak_tflops is None else [f"{100 * tflops / peak_tflops:.1f} %"])
        rows.append(row + [column[name] for column in (more or {}).values()])
    return "\n".join(align_columns(rows, between="   "))


def describe_spread(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Median, and smallest and largest."""
    return f"{statistics.median(values):.{digits}f}", f"({min(values):.{digits}f}, {max(values):.{digits}f})"
