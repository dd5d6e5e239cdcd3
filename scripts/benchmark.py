"""Measure how fast the project is, beside plain code that computes the same.

    python scripts/benchmark.py train [--model ced_tiny] [--seconds 10] [--batch_size 16] [--compile] [--mode fp32]
    python scripts/benchmark.py train --device cuda --mode bf16 --compile --batch_size 128 --peak_tflops 989

`train` times the project's training step and a plain one, which is written the way published code writes it: attention
weights materialised, masks and mixup clip by clip, one tensor after another in the optimiser, the loss read every step.
Weights, batch and draws are the same, so both see the same losses. All contenders run in one process and take turns, so
that whatever else the machine does hits them alike.

Letters: B batch, S samples, F mel bands, T frames, C classes, D width, H heads, N tokens, d width of a head.
"""

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

# As in run.py: before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import UserError, print_user_errors
from distill.objectives import create_objective
from distill.replay import REFERENCE_RATE, Replay
from models import create_model
from models.audiotransformer import AudioTransformer
from models.frontends import CedMel
from models.layers import Attention, Block
from training.optim import create_optimizer, parameter_groups
from training.precision import Precision, choose_device
from training.trainer import Learner, Trainer

Step = Callable[[dict[str, Any]], Tensor | float]  # learns from a batch, returns its loss

LEARNING_RATE = 1e-3
TIME_MASK, FREQUENCY_MASK = 192, 24  # widest masks, in frames and bands, as CED trains
WARMUP_STEPS = 2  # of each contender, not timed; compilation happens here


def create_transformer(name: str, num_classes: int) -> AudioTransformer:
    """Build the audio transformer `name`, whose operations the plain step knows, with logits for output.

    Raises:
        UserError: `name` is another kind of model.
    """
    if not name.startswith(("ced_", "audiotransformer_")):
        raise UserError(f"the plain step is that of audio transformers, and {name!r} is none; try ced_tiny")
    return cast(AudioTransformer, create_model(name, num_classes=num_classes, pooling="logit"))


def make_batch(model: AudioTransformer, batch_size: int, seconds: float, device: torch.device, seed: int) -> Any:
    """Return a prepared batch of noise with random targets: what `distill.dataset.prepare_batch` gives.

    Args:
        model: says the sample rate and the classes.
        batch_size: B.
        seconds: length of the clips.
        device: gets the batch.
        seed: of all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    n_samples = round(seconds * model.sample_rate)
    batch = {
        "item": torch.arange(batch_size),
        "value": torch.rand(batch_size, generator=generator),
        "min_value": torch.rand(batch_size, generator=generator),
        "mixup_weight": torch.rand(batch_size, generator=generator),
        "n_reference": torch.full((batch_size,), round(seconds * REFERENCE_RATE)),
        "target": (torch.rand(batch_size, model.num_classes, generator=generator) < 0.01).float(),
    }
    waveform = 0.1 * torch.randn(batch_size, n_samples, generator=generator)
    return {
        **{name: value.to(device) for name, value in batch.items()},
        "waveforms": {model.sample_rate: waveform.to(device)},
        "lengths": {model.sample_rate: None},  # nothing is padded
    }


def project_step(model: AudioTransformer, mode: str, device: torch.device, compiled: bool) -> Step:
    """Return the project's own training step of `model`."""
    objective = create_objective("target", loss="BCEWithLogitsLoss", loss_args={})
    replay = Replay(
        spectransforms=[
            {"TimeMasking": {"time_mask_param": TIME_MASK}},
            {"FrequencyMasking": {"freq_mask_param": FREQUENCY_MASK}},
        ]
    )
    learner = Learner(model, objective, replay, "spectrogram", compiled)
    optimizer = create_optimizer("Adam", parameter_groups(model, objective), {"lr": LEARNING_RATE}, device)
    trainer = Trainer(learner, optimizer, None, Precision(mode, device), seed=0)
    trainer.train_mode()
    return lambda batch: trainer.step([batch], [1.0], 0)["loss"]


def plain_step(model: AudioTransformer, mode: str, device: torch.device) -> Step:
    """Return the plain training step of `model`: see `plain_logits`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, foreach=False)
    precision = Precision(mode, device)
    model.train()

    def step(batch: dict[str, Any]) -> float:
        mel = plain_masks(plain_mel(cast(CedMel, model.front_end), batch["waveforms"][model.sample_rate]), batch)
        mel, target = plain_mixup(mel, batch["mixup_weight"]), plain_mixup(batch["target"], batch["mixup_weight"])
        with precision.context():
            loss = F.binary_cross_entropy_with_logits(plain_logits(model, mel), target)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        return loss.item()

    return step


def plain_mel(front_end: CedMel, waveform: Tensor) -> Tensor:
    """(B,S) -> (B,F,T) decibels, as torchaudio's MelSpectrogram and AmplitudeToDB compute them."""
    spectrum = torch.stft(
        waveform,
        front_end.n_fft,
        front_end.hop_size,
        front_end.win_size,
        front_end.window,
        center=front_end.center,
        return_complex=True,
    )
    mel = (spectrum.abs().pow(2).transpose(1, 2) @ front_end.mel_weights).transpose(1, 2)
    decibels = 10 * mel.clamp(min=1e-10).log10()
    return torch.maximum(decibels, decibels.amax((1, 2), keepdim=True) - front_end.TOP_DB)


def plain_masks(mel: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mask one stretch of time and one of frequency in each clip: (B,F,T) -> (B,F,T)."""
    mel = mel.clone()
    for i in range(len(mel)):
        for bins, widest in ((mel[i].T, TIME_MASK), (mel[i], FREQUENCY_MASK)):
            width = batch["value"][i] * widest
            start = int(batch["min_value"][i] * (len(bins) - width))  # negative where the mask is the longer
            bins[max(start, 0) : start + int(width)] = 0.0
    return mel


def plain_mixup(x: Tensor, weight: Tensor) -> Tensor:
    """Mix each row of `x` (B,...) with its mirror in the batch, by its own weight (B,)."""
    return torch.stack([weight[i] * x[i] + (1 - weight[i]) * x[len(x) - 1 - i] for i in range(len(x))])


def plain_attention(attention: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v, one operation after the other: (B,N,D) -> (B,N,D)."""
    batch, n_tokens, width = x.shape
    qkv = attention.qkv(x).reshape(batch, n_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)  # each (B,H,N,d)
    weights = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    out = weights.softmax(dim=-1) @ value
    return attention.proj(out.transpose(1, 2).reshape(batch, n_tokens, width))


def plain_block(block: Block, x: Tensor) -> Tensor:
    """(B,N,D) -> (B,N,D)."""
    x = x + plain_attention(block.attn, block.norm1(x))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_logits(model: AudioTransformer, mel: Tensor) -> Tensor:
    """(B,F,T) -> (B,C) with the weights of `model`, in the operations of the published network."""
    x = cast(nn.Module, model.init_bn)(mel[:, :, None]).transpose(1, 2)  # (B,1,F,T)
    patches = model.patch_embed.proj
    x = F.conv2d(x, patches.weight, patches.bias, patches.stride)  # (B,D,f,t)
    x = x + model.time_pos_embed[..., : x.shape[-1]]
    x = x + model.freq_pos_embed
    x = x.flatten(2).transpose(1, 2)
    for block in model.blocks:
        x = plain_block(cast(Block, block), x)
    return model.outputlayer(model.norm(x).mean(1))


def count_flops(model: AudioTransformer, batch: dict[str, Any]) -> int:
    """Return the floating-point operations of one training step: products of matrices alone, forward and backward."""
    mel = plain_mel(cast(CedMel, model.front_end), batch["waveforms"][model.sample_rate])
    with FlopCounterMode(display=False) as counter:
        plain_logits(model, mel).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def take_turns(
    contenders: dict[str, Step], batch: dict[str, Any], rounds: int, steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Time `steps` steps of each contender in turn, `rounds` times; return the seconds of a step, one for each round.

    Every other round runs in reverse order, so that none always follows the same one.
    """

    def timed(step: Step, n_steps: int) -> float:
        _synchronise(device)
        began = time.perf_counter()
        for _ in range(n_steps):
            step(batch)
        _synchronise(device)
        return (time.perf_counter() - began) / n_steps

    for step in contenders.values():
        timed(step, WARMUP_STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(timed(contenders[name], steps))
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(
    seconds: dict[str, list[float]], batch_size: int, flops: int, baseline: str, peak_tflops: float | None
) -> str:
    """Lay out what was measured.

    Args:
        seconds: of a step, for each contender one number a round.
        batch_size: clips of a step.
        flops: of a step.
        baseline: the contender that the others are compared with, round by round.
        peak_tflops: what the machine can do, for the utilisation, or None.
    """
    head = ["", "clips/s", "(lowest, highest)", "ratio", "(lowest, highest)", "TFLOP/s"]
    rows = [head + ([] if peak_tflops is None else ["utilisation"])]
    for name, times in seconds.items():
        speed = [batch_size / t for t in times]
        ratio = [plain / t for plain, t in zip(seconds[baseline], times, strict=True)]
        tflops = flops / statistics.median(times) / 1e12
        row = [name, *_spread(speed, 1), *_spread(ratio, 2), f"{tflops:.3g}"]
        rows.append(row + ([] if peak_tflops is None else [f"{100 * tflops / peak_tflops:.1f} %"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _spread(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Median, and smallest and largest."""
    return f"{statistics.median(values):.{digits}f}", f"({min(values):.{digits}f}, {max(values):.{digits}f})"


class Benchmark:
    """The commands of benchmark.py."""

    @print_user_errors
    def train(
        self,
        model: str = "ced_tiny",
        seconds: float = 10.0,
        batch_size: int = 16,
        steps: int = 2,
        rounds: int = 10,
        mode: str = "fp32",
        compile: bool = False,
        device: str = "auto",
        peak_tflops: float | None = None,
        num_classes: int = 527,
        seed: int = 0,
    ) -> None:
        """Time the project's training step beside a plain one: waveforms in, updated weights out.

        Args:
            model: an audio transformer.
            seconds: length of the clips, at most one chunk of the model.
            batch_size: clips of a step.
            steps: of each contender between two readings of the clock.
            rounds: turns of each contender.
            mode: precision, as in a training configuration.
            compile: a third contender, the project's step with `compile: true`.
            device: auto, cpu or cuda.
            peak_tflops: what the machine can do in this precision; prints the utilisation.
            num_classes: C.
            seed: of weights, sounds and draws.
        """
        where = choose_device(device)
        torch.manual_seed(seed)
        network = create_transformer(model, num_classes).to(where)
        if network.front_end.n_frames(round(seconds * network.sample_rate)) > network.target_length:
            raise UserError(f"{seconds:g} s are more than the one chunk that the plain step knows; try --seconds 10")
        batch = make_batch(network, batch_size, seconds, where, seed)
        contenders = {
            "plain": plain_step(copy.deepcopy(network), mode, where),
            "project": project_step(copy.deepcopy(network), mode, where, compiled=False),
        }
        if compile:
            contenders["project, compiled"] = project_step(copy.deepcopy(network), mode, where, compiled=True)
        flops = count_flops(network, batch)
        measured = take_turns(contenders, batch, rounds, steps, where)
        threads = f"{torch.get_num_threads()} threads" if where.type == "cpu" else torch.cuda.get_device_name(where)
        print(
            f"training steps of {model}, {mode}, {batch_size} clips of {seconds:g} s, {flops / batch_size / 1e9:.2f} "
            f"GFLOP a clip; PyTorch {torch.__version__}, {threads}; medians of {rounds} rounds of {steps} steps"
        )
        print(table(measured, batch_size, flops, "plain", peak_tflops))


if __name__ == "__main__":
    fire.Fire(Benchmark)
