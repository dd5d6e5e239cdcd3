"""Measure how fast the project is, beside plain code that computes the same.

    python scripts/benchmark.py train [--model ced_tiny] [--seconds 10] [--batch_size 16] [--compile] [--mode fp32]
    python scripts/benchmark.py train --device cuda --mode bf16 --compile --batch_size 128 --peak_tflops 989
    python scripts/benchmark.py tag [--sounds FOLDER] [--model ced_tiny] [--rounds 3]
    python scripts/benchmark.py tome [--model ast_base] [--seconds 10] [--r 40] [--attention sdpa,naive]

`train` times the project's training step and a plain one, which is written the way published code writes it: attention
weights materialised, masks and mixup clip by clip, one tensor after another in the optimiser, the loss read every step.
Weights, batch and draws are the same, so both see the same losses. All contenders run in one process and take turns, so
that whatever else the machine does hits them alike.

`tag` times whole processes that tag a folder, and the same sound in one long file: inference.py with PyTorch and with
ONNX Runtime, and a plain script that takes one file at a time. Probabilities are compared.

`tome` times a vision transformer that merges tokens beside the same one that does not, both with fused attention or
both with the attention of published code, and says how much of the bound is reached that products of matrices set.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

# As in run.py: before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.commands import run_commands
from common.errors import UserError, print_user_errors
from models.devices import choose_device
from scripts.benchmarks.tag import tag_benchmark
from scripts.benchmarks.tome import Attention, tome_benchmark
from scripts.benchmarks.train import (
    count_flops,
    create_transformer,
    make_batch,
    plain_step,
    project_step,
)
from scripts.benchmarks.turns import table, take_turns


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
        print(table(measured, batch_size, dict.fromkeys(measured, flops), "plain", peak_tflops))

    @print_user_errors
    def tag(
        self,
        sounds: str | None = None,
        model: str = "ced_tiny",
        chunk_length: float = 5.0,
        rounds: int = 3,
    ) -> None:
        """Time whole processes that tag a folder, and the same sound in one long file.

        Args:
            sounds: a folder of sounds of one sample rate; 400 files of noise are made where none is given.
            model: a checkpoint, or a name, which then gets random weights.
            chunk_length: of a window, in seconds.
            rounds: turns of each contender.
        """
        with tempfile.TemporaryDirectory() as work:
            print(tag_benchmark(sounds and str(Path(sounds).resolve()), model, chunk_length, rounds, Path(work)))

    @print_user_errors
    def tome(
        self,
        model: str = "ast_base",
        seconds: float = 10.0,
        r: Any = 40,
        batch_size: int = 4,
        attention: Any = "sdpa",
        rounds: int = 5,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Time a network that merges tokens beside the same one that does not: spectrograms in, classes out.

        Args:
            model: a vision transformer. AST is built for the smallest multiple of 128 frames that holds a clip, which
                are the lengths of its recipes: 1024 for 10 s, 512 for 5 s, 128 for 1 s.
            seconds: length of the clips.
            r: tokens merged away in each block; several, separated by commas, take turns.
            batch_size: clips of a pass.
            attention: sdpa (fused), naive (its weights materialised, as in published code), or both, with a comma.
            rounds: passes of each contender.
            device: auto, cpu or cuda.
            seed: of weights and sounds.
        """
        rs, kinds = [listed if isinstance(listed, (list, tuple)) else [listed] for listed in (r, attention)]
        if not all(isinstance(each, int) and each >= 0 for each in rs):
            raise UserError(f"--r is {r!r}; wanted whole numbers, 0 or more, such as 8,12,16")
        if not set(kinds) <= set(get_args(Attention)):
            raise UserError(f"--attention is {attention!r}; wanted sdpa, naive, or sdpa,naive")
        where = choose_device(device)
        print(tome_benchmark(model, seconds, rs, batch_size, kinds, rounds, where, seed))


if __name__ == "__main__":
    run_commands(Benchmark)
