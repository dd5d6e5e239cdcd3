"""Token merging against no merging: see `scripts/benchmark.py tome`.

Letters: B batch, F mel bands, T frames.
"""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from models import create_model, layers
from models.vit import SpectrogramTransformer
from scripts.benchmarks.plain import plain_attention
from scripts.benchmarks.timing import compute_speedups, compute_tflops, describe_device, format_table, time_steps

Attention = Literal["sdpa", "naive"]  # fused, or with its weights materialised as in published code

FRAMES_A_SECOND = 100
FRAMES_A_STEP = 128  # lengths that AST was trained with: 128 frames for 1 s, 512 for 5 s, 1024 for 10 s


def create_network(name: str, seconds: float) -> SpectrogramTransformer:
    """Build a vision transformer with random weights for clips of a given length.

    A model that pads all clips to one length, as AST does, is built for the smallest multiple of 128 frames that holds
    the clip; the others take the clip as it is.

    Raises:
        UserError: the model is no vision transformer, or would cut the clip into chunks.
    """
    network = create_model(name)
    if not isinstance(network, SpectrogramTransformer):
        raise UserError(f"{name} has no tokens to merge; use a vision transformer such as ast_base or ced_tiny")
    if network.fixed_length:
        length = FRAMES_A_STEP * math.ceil(FRAMES_A_SECOND * seconds / FRAMES_A_STEP)
        network = cast(SpectrogramTransformer, create_model(name, target_length=length))
    elif network.front_end.n_frames(round(seconds * network.sample_rate)) > network.target_length:
        raise UserError(f"{name} cuts clips of {seconds:g} s into chunks; try --seconds 10")
    return network.eval()


def with_naive_attention(network: SpectrogramTransformer) -> SpectrogramTransformer:
    """Return a copy whose attention runs one operation after the other."""
    naive = copy.deepcopy(network)
    for block in cast("list[layers.Block]", naive.blocks):
        setattr(block.attn, "forward", partial(plain_attention, block.attn))  # noqa: B010 (mypy: a method)
    return naive


def count_block_flops(network: SpectrogramTransformer, mel: Tensor, r: int) -> int:
    """Count the floating-point operations of the blocks for (B,F,T): matrix products, without the matching."""
    network.merge_tokens(r)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # inference mode hides linear layers from it
        network.forward_spectrogram(mel)
    counted = counter.get_flop_counts()  # by class, for modules whose parents were not called
    return sum(sum(counted[kind.__name__].values()) for kind in (layers.Attention, layers.Mlp))


def make_forward(network: SpectrogramTransformer, r: int) -> Callable[[dict[str, Any]], Tensor]:
    """Return one forward pass of the batch that merges `r` tokens in each block."""

    @torch.inference_mode()
    def forward(batch: dict[str, Any]) -> Tensor:
        network.merge_tokens(r)
        return network.forward_spectrogram(batch["mel"])

    return forward


def benchmark_merging(
    model: str,
    seconds: float,
    rs: Sequence[int],
    batch_size: int,
    attentions: Sequence[Attention],
    rounds: int,
    device: torch.device,
    seed: int = 0,
) -> str:
    """Time a network at r = 0 and at every one of `rs`, in alternation, and lay out the results.

    Args:
        model: name of a vision transformer.
        seconds: length of the clips.
        rs: tokens merged in each block.
        batch_size: clips of a pass.
        attentions: of "sdpa" and "naive"; each is compared with itself at r = 0.
        rounds: passes of each candidate.
        device: where to compute.
        seed: of weights and sounds.
    """
    torch.manual_seed(seed)
    network = create_network(model, seconds).to(device)
    naive = with_naive_attention(network)
    with torch.inference_mode():
        mel = network.front_end(0.1 * torch.randn(batch_size, round(seconds * network.sample_rate), device=device))
    settings = list(dict.fromkeys([0, *rs]))
    flops = {r: count_block_flops(naive, mel, r) for r in settings}  # fused attention hides its products
    candidates = {
        f"{attention}, r = {r}": make_forward(naive if attention == "naive" else network, r)
        for attention in attentions
        for r in settings
    }
    measured = time_steps(candidates, {"mel": mel}, rounds, 1, device)
    lines = [
        f"{model}, {batch_size} clips of {seconds:g} s, {mel.shape[-1]} frames in chunks of {network.target_length}, "
        f"{flops[0] / batch_size / 1e9:.2f} GFLOP a clip in its blocks; fp32, PyTorch {torch.__version__}, "
        f"{describe_device(device)}; medians of {rounds} passes",
        *(_format_table(attention, measured, flops, batch_size) for attention in attentions),
        "bound: FLOPs of the blocks without merging over those with it",
    ]
    return "\n".join(lines)


def _format_table(attention: Attention, measured: dict[str, list[float]], flops: dict[int, int], n_clips: int) -> str:
    rs = {f"{attention}, r = {r}": r for r in flops}
    seconds, baseline = {name: measured[name] for name in rs}, f"{attention}, r = 0"
    bounds = {name: flops[0] / flops[r] for name, r in rs.items()}
    speedups = {name: statistics.median(compute_speedups(seconds[baseline], seconds[name])) for name in rs}
    tflops = compute_tflops(seconds, {name: flops[r] for name, r in rs.items()})
    columns = {
        "TFLOP/s": {name: f"{value:.3g}" for name, value in tflops.items()},
        "FLOPs": {name: f"{flops[r] / flops[0]:.3f}" for name, r in rs.items()},
        "bound": {name: f"{bound:.2f}" for name, bound in bounds.items()},
        "share of bound": {name: f"{100 * speedups[name] / bounds[name]:.0f} %" for name in rs},
    }
    return format_table(seconds, baseline, n_clips, "clips/s", columns)
