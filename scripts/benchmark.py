"""Measure the speed of the project against plain code that computes the same.

    python scripts/benchmark.py train [--model ced_tiny] [--seconds 10] [--batch_size 16] [--compile] [--mode fp32]
    python scripts/benchmark.py train --device cuda --mode bf16 --compile --batch_size 128 --peak_tflops 989
    python scripts/benchmark.py tag [--sounds FOLDER] [--model ced_tiny] [--rounds 3]
    python scripts/benchmark.py pretrain [--model audiotransformer_tiny] [--seconds 10] [--ratios 0.5,0.9]
    python scripts/benchmark.py quantize [--model lstm_small] [--seconds 10] [--batch_size 16]
    python scripts/benchmark.py export [--model lstm_small,ced_tiny] [--bits 8,4,2] [--rounds 30]
    python scripts/benchmark.py tome [--model ast_base] [--seconds 10] [--r 40] [--attention sdpa,naive]

`train` times the project's training step and a plain one, written as in published code: attention weights materialised,
masks and mixup clip by clip, one tensor after another in the optimiser, the loss read every step. Weights, batch and
random numbers are the same, so both have the same losses. All candidates run in one process and in alternation, so that
other load on the machine affects them alike.

`pretrain` times steps of MAE, MATPAC and MATPAC++ beside a step on labels; MAE with several shares of masked patches.

`quantize` times the project's training step with float and with quantized weights, in alternation.

`tag` times whole processes that tag a folder, and the same sound in one long file: inference.py with PyTorch and with
ONNX Runtime, and a plain script that processes one file at a time. Probabilities are compared.

`export` writes a model as ONNX files in float32, in int8, and with quantized weights, and prints their sizes, times and
differences from PyTorch.

`tome` times a vision transformer with and without token merging, with fused attention or with the attention of
published code, and prints the share of the speedup that the number of matrix products allows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import copy
import os
from typing import Any, get_args

from common.errors import UserError

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from common.commands import run_commands
from common.temporary import temporary_folder
from models import create_model
from models.devices import choose_device
from scripts.benchmarks.export import benchmark_export
from scripts.benchmarks.tag import benchmark_tagging
from scripts.benchmarks.timing import compute_tflops, describe_device, format_table, time_steps
from scripts.benchmarks.tome import Attention, benchmark_merging
from scripts.benchmarks.train import (
    count_flops,
    create_transformer,
    make_batch,
    make_plain_step,
    make_pre_training_step,
    make_project_step,
)


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
        """Time the project's training step and a plain one: waveforms in, updated weights out.

        Args:
            model: an audio transformer.
            seconds: length of the clips, at most one chunk of the model.
            batch_size: clips of a step.
            steps: of each candidate in a round.
            rounds: of all candidates.
            mode: precision, as in a training configuration.
            compile: a third candidate, the project's step with `compile: true`.
            device: auto, cpu or cuda.
            peak_tflops: of the machine in this precision; adds the utilisation.
            num_classes: C.
            seed: of weights, sounds and augmentation.
        """
        where = choose_device(device)
        torch.manual_seed(seed)
        network = create_transformer(model, num_classes).to(where)
        if network.front_end.n_frames(round(seconds * network.sample_rate)) > network.target_length:
            raise UserError(f"{seconds:g} s are more than one chunk, which the plain step requires; try --seconds 10")
        batch = make_batch(network, batch_size, seconds, where, seed)
        candidates = {
            "plain": make_plain_step(copy.deepcopy(network), mode, where),
            "project": make_project_step(copy.deepcopy(network), mode, where, compiled=False),
        }
        if compile:
            candidates["project, compiled"] = make_project_step(copy.deepcopy(network), mode, where, compiled=True)
        flops = count_flops(network, batch)
        measured = time_steps(candidates, batch, rounds, steps, where)
        tflops = compute_tflops(measured, dict.fromkeys(measured, flops))
        columns = {"TFLOP/s": {name: f"{value:.3g}" for name, value in tflops.items()}}
        if peak_tflops is not None:
            columns["utilisation"] = {name: f"{100 * value / peak_tflops:.1f} %" for name, value in tflops.items()}
        print(
            f"training steps of {model}, {mode}, {batch_size} clips of {seconds:g} s, {flops / batch_size / 1e9:.2f} "
            f"GFLOP a clip; PyTorch {torch.__version__}, {describe_device(where)}; medians of {rounds} rounds of "
            f"{steps} steps"
        )
        print(format_table(measured, "plain", batch_size, "clips/s", columns))

    @print_user_errors
    def pretrain(
        self,
        model: str = "audiotransformer_tiny",
        seconds: float = 10.0,
        batch_size: int = 16,
        ratios: Any = (0.5, 0.9),
        steps: int = 1,
        rounds: int = 10,
        mode: str = "fp32",
        compile: bool = False,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """Time the steps of self-supervised objectives: waveforms in, updated weights out.

        Args:
            model: a vision transformer whose patches do not overlap.
            seconds: length of the clips.
            batch_size: clips of a step.
            ratios: shares of masked patches of further steps of MAE, with commas.
            steps: of each candidate in a round.
            rounds: of all candidates.
            mode: precision, as in a training configuration.
            compile: compile the student, as `compile: true`.
            device: auto, cpu or cuda.
            seed: of weights and sounds.
        """
        where = choose_device(device)
        shares = ratios if isinstance(ratios, (list, tuple)) else [ratios]
        objectives: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ("mae", "matpac", "matpac++")}
        objectives |= {f"mae, {share:g} masked": ("mae", {"mask_ratio": share}) for share in shares}
        torch.manual_seed(seed)
        pooling: dict[str, Any] = {"pooling": "logit"} if model.startswith(("ced_", "audiotransformer_")) else {}
        network = create_model(model, **pooling).to(where)
        batch = make_batch(network, batch_size, seconds, where, seed)
        candidates = {"labels": make_project_step(copy.deepcopy(network), mode, where, compiled=compile)}
        for name, (objective, arguments) in objectives.items():
            copied = copy.deepcopy(network)
            candidates[name] = make_pre_training_step(copied, objective, arguments, mode, where, compile)
        measured = time_steps(candidates, batch, rounds, steps, where)
        print(
            f"pre-training steps of {model}, {mode}, {batch_size} clips of {seconds:g} s; PyTorch {torch.__version__}, "
            f"{describe_device(where)}; medians of {rounds} rounds of {steps} steps"
        )
        print(format_table(measured, "labels", batch_size, "clips/s", {}))

    @print_user_errors
    def quantize(
        self,
        model: str = "ced_tiny",
        seconds: float = 10.0,
        batch_size: int = 16,
        weights: int = 4,
        steps: int = 1,
        rounds: int = 10,
        mode: str = "fp32",
        device: str = "auto",
        num_classes: int = 527,
        seed: int = 0,
    ) -> None:
        """Time the training step of a model with float and with quantized weights.

        Args:
            model: any model with logits.
            seconds: length of the clips.
            batch_size: clips of a step.
            weights: bits of a weight.
            steps: of each candidate in a round.
            rounds: of all candidates.
            mode: precision, as in a training configuration.
            device: auto, cpu or cuda.
            num_classes: C.
            seed: of weights and sounds.
        """
        where = choose_device(device)
        recipes: dict[str, dict[str, Any] | None] = {
            "float": None,
            f"{weights} bits, mse": {"weights": weights, "clip": "mse"},
            f"{weights} bits, learned": {"weights": weights, "clip": "learned"},
            f"{weights} bits, levels": {"weights": weights, "scheme": "levels"},
        }
        candidates = {}
        for name, recipe in recipes.items():
            torch.manual_seed(seed)
            pooling: dict[str, Any] = {"pooling": "logit"} if model.startswith(("ced_", "audiotransformer_")) else {}
            network = create_model(model, num_classes=num_classes, quantize=recipe, **pooling).to(where)
            candidates[name] = make_project_step(network, mode, where, compiled=False)
        batch = make_batch(network, batch_size, seconds, where, seed)
        measured = time_steps(candidates, batch, rounds, steps, where)
        print(
            f"training steps of {model}, {mode}, {batch_size} clips of {seconds:g} s; PyTorch {torch.__version__}, "
            f"{describe_device(where)}; medians of {rounds} rounds of {steps} steps"
        )
        print(format_table(measured, "float", batch_size, "clips/s", {}))

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
            sounds: a folder of sounds of one sample rate; by default 400 files of noise are made.
            model: a checkpoint, or a name, which then gets random weights.
            chunk_length: of a window, in seconds.
            rounds: runs of each candidate.
        """
        with temporary_folder() as work:
            print(benchmark_tagging(sounds and str(Path(sounds).resolve()), model, chunk_length, rounds, work))

    @print_user_errors
    def export(self, model: Any = "lstm_small", bits: Any = (8, 4, 2), seconds: float = 10.0, rounds: int = 30) -> None:
        """Export models to ONNX in all ways, and measure the files.

        Args:
            model: checkpoints of float weights, or names, which then get random weights; several with commas.
            bits: of weights that are quantized after training, several with commas.
            seconds: length of the clip, whose spectrogram is the input.
            rounds: passes of each file, on one thread.
        """
        models = model.split(",") if isinstance(model, str) else model
        sizes = bits if isinstance(bits, (list, tuple)) else [bits]
        for source in models:
            with temporary_folder() as work:
                print(benchmark_export(source, sizes, seconds, rounds, work), end="\n\n")

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
        """Time a network with and without token merging: spectrograms in, classes out.

        Args:
            model: a vision transformer. AST is built for the smallest multiple of 128 frames that holds a clip, as in
                its recipes: 1024 for 10 s, 512 for 5 s, 128 for 1 s.
            seconds: length of the clips.
            r: tokens merged in each block; several are separated by commas.
            batch_size: clips of a pass.
            attention: sdpa (fused), naive (its weights materialised, as in published code), or both, with a comma.
            rounds: passes of each candidate.
            device: auto, cpu or cuda.
            seed: of weights and sounds.
        """
        rs, kinds = [value if isinstance(value, (list, tuple)) else [value] for value in (r, attention)]
        if not all(isinstance(value, int) and value >= 0 for value in rs):
            raise UserError(f"--r is {r!r}; expected whole numbers, 0 or more, such as 8,12,16")
        if not set(kinds) <= set(get_args(Attention)):
            raise UserError(f"--attention is {attention!r}; expected sdpa, naive, or sdpa,naive")
        print(benchmark_merging(model, seconds, rs, batch_size, kinds, rounds, choose_device(device), seed))


if __name__ == "__main__":
    run_commands(Benchmark)
