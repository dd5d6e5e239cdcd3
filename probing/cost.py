"""The cost of embedding a clip: operations, time, and memory of one window.

Letters: B windows in a batch, S samples of a window.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import AudioTagger
from training.precision import Precision

BATCH = 32  # windows at once, as stores are computed
MIN_TAIL = 0.01  # of a window; what remains of a clip is embedded, but not measured, where it is shorter
ROUNDS = 9  # passes of each candidate that are timed, after one that is not


@dataclass(frozen=True)
class Cost:
    """The cost of embedding one clip.

    Attributes:
        n_windows: of the clip.
        gflop: 1e9 operations of matrix products, convolutions and attention, two for a multiplication with an addition;
            Fourier transforms and what is computed number by number are not counted.
        ms: median time in milliseconds of the windows of the clip, in batches of `BATCH`.
        megabytes: 1e6 bytes of the tensors that are alive at once when one window is embedded, without weights.
    """

    n_windows: int
    gflop: float
    ms: float
    megabytes: float


def measure_costs(model: AudioTagger, seconds: float, windows: Sequence[float], mode: str) -> list[Cost]:
    """Measure the cost of embedding a clip cut into windows, for each length of these.

    Args:
        model: on its device.
        seconds: length of the clip, which consists of noise.
        windows: lengths in seconds; the last window of a clip is what remains.
        mode: precision, see `training.precision.Precision`.

    Returns:
        One for each length; they are timed in turn, so that a machine that gets slower is slower for all.
    """
    precision = Precision(mode, next(model.parameters()).device)
    passes = [_prepare(model, seconds, window) for window in windows]
    times: list[list[float]] = [[] for _ in passes]
    with torch.inference_mode(), precision.context():
        for number in range(ROUNDS + 1):
            for batches, measured in zip(passes, times, strict=True):
                elapsed = _time(model, batches)
                measured += [elapsed] if number else []
        gflops = [_count_operations(model, batches) / 1e9 for batches in passes]
        megabytes = [_measure_memory(model, batches[0][:1]) / 1e6 for batches in passes]
    ms = [1000 * statistics.median(measured) for measured in times]
    n_windows = [sum(map(len, batches)) for batches in passes]
    return [Cost(*values) for values in zip(n_windows, gflops, ms, megabytes, strict=True)]


def _prepare(model: AudioTagger, seconds: float, window: float) -> list[Tensor]:
    """Return batches (B,S) of the windows of a clip; a last one that is shorter is a batch of its own."""
    n_samples, length = (max(1, round(each * model.sample_rate)) for each in (seconds, window))
    clip = 0.1 * torch.randn(n_samples, generator=torch.Generator().manual_seed(0))
    whole, tail = n_samples // length * length, n_samples % length
    batches = [*clip[:whole].reshape(-1, length).split(BATCH)] if whole else []
    if not whole or tail >= MIN_TAIL * length:
        batches.append(clip[None, whole:])
    device = next(model.parameters()).device
    return [batch.to(device) for batch in batches]


def _embed(model: AudioTagger, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model.embed_clips(*model.front_end.spectrogram(batch, None))


def _time(model: AudioTagger, batches: Sequence[Tensor]) -> float:
    """Return the seconds of one pass."""
    synchronise: Callable[[], Any] = torch.cuda.synchronize if batches[0].is_cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    _embed(model, batches)
    synchronise()
    return time.perf_counter() - start


def _count_operations(model: AudioTagger, batches: Sequence[Tensor]) -> int:
    # Fused attention has no count on CPUs; written out, it consists of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _embed(model, batches)
    return counter.get_total_flops()


def _measure_memory(model: AudioTagger, window: Tensor) -> float:
    """Return the largest size of all tensors alive at once in a pass, in bytes."""
    if window.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _embed(model, [window])
        return torch.cuda.max_memory_allocated() - before
    with _LiveTensors([*model.parameters(), *model.buffers(), window]) as live:
        _embed(model, [window])
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the sizes of the tensors that operations create, and subtracts those that are freed.

    The allocator of CPUs keeps no such sum. Memory inside an operation is not included.

    Args:
        given: tensors that are there before.

    Attributes:
        peak: largest sum so far, in bytes.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.known:  # not a view
                self.known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, n_bytes: int) -> None:
        self.alive -= n_bytes
