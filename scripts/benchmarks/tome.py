"""Merging tokens against not merging them: see `scripts/benchmark.py tome`.

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
from scripts.benchmarks.turns import ratios, table, take_turns

Attention = Literal["sdpa", "naive"]  # fused, or with its weights materialised as in published code

FRAMES_A_SECOND = 100
FRAMES_A_STEP = 128  # lengths that AST was trained with: 128 frames for 1 s, 512 for 5 s, 1024 for 10 s


def create_network(name: str, seconds: float) -> SpectrogramTransformer:
    """Build a vision transformer with random weights for clips of that length.

    One that fills all clips up to one length, as AST does, is built for the smallest multiple of 128 frames that holds
    the clip; the others take the clip as it is.

    Raises:
        UserError: it is no vision transformer, or the clip is longer than what it takes in one piece.
    """
    network = create_model(name)
    if not isinstance(network, SpectrogramTransformer):
        raise UserError(f"{name} has no tokens to merge; give a vision transformer, ast_base or ced_tiny for example")
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


def block_flops(network: SpectrogramTransformer, mel: Tensor, r: int) -> int:
    """Count the floating-point operations of the blocks for (B,F,T): products of matrices, without the matching."""
    network.merge_tokens(r)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # inference mode hides linear layers from it
        network.forward_spectrogram(mel)
    counted = counter.get_flop_counts()  # by class, for modules whose parents were not called
    return sum(sum(counted[kind.__name__].values()) for kind in (layers.Attention, layers.Mlp))


def merging(network: SpectrogramTransformer, r: int) -> Callable[[dict[str, Any]], Tensor]:
    """Return one forward pass of the batch that merges `r` tokens in each block."""

    @torch.inference_mode()
    def step(batch: dict[str, Any]) -> Tensor:
        network.merge_tokens(r)
        return network.forward_spectrogram(batch["mel"])

    return step


def tome_benchmark(
    model: str,
    seconds: float,
    rs: Sequence[int],
    batch_size: int,
    attentions: Sequence[Attention],
    rounds: int,
    device: torch.device,
    seed: int = 0,
) -> str:
    """Time a network at r = 0 and at every one of `rs`, all in turns, and lay out what was measured.

    Args:
        model: name of a vision transformer.
        seconds: length of the clips.
        rs: tokens merged away in each block.
        batch_size: clips of a pass.
        attentions: of "sdpa" and "naive"; each is compared with itself at r = 0.
        rounds: turns of each contender.
        device: where to compute.
        seed: of weights and sounds.
    """
    torch.manual_seed(seed)
    network = create_network(model, seconds).to(device)
    naive = with_naive_attention(network)
    with torch.inference_mode():
        mel = network.front_end(0.1 * torch.randn(batch_size, round(seconds * network.sample_rate), device=device))
    settings = list(dict.fromkeys([0, *rs]))
    flops = {r: block_flops(naive, mel, r) for r in settings}  # where every product is visible
    contenders = {
        f"{attention}, r = {r}": merging(naive if attention == "naive" else network, r)
        for attention in attentions
        for r in settings
    }
    measured = take_turns(contenders, {"mel": mel}, rounds, 1, device)
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines = [
        f"{model}, {batch_size} clips of {seconds:g} s, {mel.shape[-1]} frames in chunks of {network.target_length}, "
        f"{flops[0] / batch_size / 1e9:.2f} GFLOP a clip in its blocks; fp32, PyTorch {torch.__version__}, {threads}; "
        f"medians of {rounds} passes",
        *(_table_of(attention, measured, flops, batch_size) for attention in attentions),
        "bound: FLOPs of the blocks without merging over those with it",
    ]
    return "\n".join(lines)


def _table_of(attention: Attention, measured: dict[str, list[float]], flops: dict[int, int], batch_size: int) -> str:
    names = {f"{attention}, r = {r}": r for r in flops}
    own, baseline = {name: measured[name] for name in names}, f"{attention}, r = 0"
    bounds = {name: flops[0] / flops[r] for name, r in names.items()}
    shares = {name: statistics.median(ratios(own[baseline], own[name])) / bounds[name] for name in names}
    more = {
        "FLOPs": {name: f"{flops[r] / flops[0]:.3f}" for name, r in names.items()},
        "bound": {name: f"{bound:.2f}" for name, bound in bounds.items()},
        "share of bound": {name: f"{100 * share:.0f} %" for name, share in shares.items()},
    }
    return table(own, batch_size, {name: flops[r] for name, r in names.items()}, baseline, more=more)
