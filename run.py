"""Train and evaluate.

    python run.py train CONFIG.yaml [--resume auto|never|RUN_FOLDER] [--key value ...]
    torchrun --nproc_per_node N run.py train CONFIG.yaml [--key value ...]
    python run.py config CONFIG.yaml [--key value ...]
    python run.py evaluate RUN_FOLDER_OR_CHECKPOINT_OR_NAME --test_data X.tsv [--weights PATH] [--mode amp]

Any key of a configuration can be overridden on the command line, nested ones with a dot: `--optimizer_args.lr 3e-4`.
"""

import os
import re
from pathlib import Path
from typing import Any, get_args

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire
import torch
import yaml

from common.errors import Faults, UserError, did_you_mean, fail, print_user_errors
from models.devices import choose_device
from training.config import Mode, TrainConfig, read_config
from training.evaluate import evaluate, open_evaluation, write_results
from training.parallel import joined_ranks
from training.precision import Precision
from training.prepare import prepare_run
from training.run_folder import log_to


class Runner:
    """The commands of run.py.

    Args:
        seed: of everything random in a run.
        nthreads: CPU threads; all of them by default.
    """

    def __init__(self, seed: int = 42, nthreads: int | None = None) -> None:
        if not isinstance(seed, int) or seed < 0:
            fail(f"--seed is {seed!r}; it is a whole number, 0 or more")
        self.seed = seed
        if nthreads:
            torch.set_num_threads(nthreads)

    @print_user_errors
    def train(
        self,
        config_file: str,
        *,
        m: str | None = None,
        weights: str | None = None,
        resume: str = "auto",
        **overrides: Any,
    ) -> None:
        """Train a model on labels or on soft targets; a run that was stopped goes on where it was.

        Args:
            config_file: a YAML file, see `trainconfig/`.
            m: short for --model.
            weights: another way to give --pretrained, where the model's weights start.
            resume: `auto` goes on with the newest unfinished run of this very configuration and seed, and begins a new
                one where there is none; `never` begins a new one; or the folder of a run, or one of its states.
            overrides: key → value of the configuration.
        """
        overrides |= {key: value for key, value in (("model", m), ("pretrained", weights)) if value is not None}
        with joined_ranks() as ranks:
            log_to(None, quiet=not ranks.is_main)
            torch.manual_seed(self.seed)  # initial weights; everything else draws from streams of its own
            prepared = prepare_run(config_file, overrides, self.seed, resume=str(resume), ranks=ranks)
            result = prepared.fit()
        if ranks.is_main:
            print(f"run: {prepared.folder.path}\nnext: python inference.py FILES_OR_FOLDERS -m {result['weights']}")

    @print_user_errors
    def config(self, config_file: str, **overrides: Any) -> None:
        """Print a configuration as `train` would read it: every key, defaults and overrides included.

        Args:
            config_file: a YAML file, see `trainconfig/`.
            overrides: key → value of the configuration.
        """
        faults = Faults(config_file)
        settings = read_config(TrainConfig, config_file, overrides, faults)
        faults.raise_if_any()
        assert settings is not None
        print(yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True), end="")

    @print_user_errors
    def evaluate(
        self,
        experiment: str | None = None,
        test_data: str | None = None,
        *,
        m: str | None = None,
        weights: str | None = None,
        mode: str = "fp32",
        batch_size: int = 32,
        num_workers: int = 4,
        token_merging: Any = None,
        device: str = "auto",
        output: str | None = None,
        **unknown: Any,
    ) -> None:
        """Judge a model on a labelled pack: mAP, mAUC, d-prime, lwlrap, top-1, per-class results.

        Args:
            experiment: a run's folder, a checkpoint, or the name of a model.
            test_data: TSV of a pack with a `labels` column.
            m: another way to give `experiment`.
            weights: weights for a model given by name.
            mode: fp32, tf32, bf16 or fp16; CED's names noamp, amp and amp_bf16 will do.
            batch_size: clips at once.
            num_workers: loader processes.
            token_merging: tokens merged away in each block, in place of what the model says; a number, or a list.
            device: auto, cpu or cuda.
            output: folder for the results; beside the checkpoint by default.
            unknown: anything else is refused, with the nearest option.
        """
        log_to(None)
        if unknown:
            known = ["test_data", "weights", "mode", "batch_size", "num_workers", "token_merging", "device", "output"]
            raise UserError("; ".join(f"unknown option --{key}{did_you_mean(key, known)}" for key in unknown))
        if (experiment or m) is None or test_data is None:
            raise UserError("give a run's folder, a checkpoint or a model's name, and --test_data PACK.tsv")
        if mode not in get_args(Mode):
            raise UserError(f"mode is {mode!r}; use {', '.join(get_args(Mode))}")
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size is {batch_size} and num_workers {num_workers}; wanted at least 1 and 0")
        source, test_data, precision = str(experiment or m), str(test_data), Precision(mode, choose_device(device))
        model, data = open_evaluation(source, weights, test_data, precision.device, token_merging)
        metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
        print(metrics.summary())
        print(f"clips used: {len(data.pack)}, missing from the pack: {data.pack.n_missing}")
        folder = Path(output) if output else self._beside(source)
        r = "" if token_merging is None else "_merging_" + re.sub("[^0-9.-]+", "_", str(token_merging)).strip("_")
        print(f"results: {write_results(folder, f'evaluation_{Path(test_data).stem}{r}', metrics, data)}")

    @staticmethod
    def _beside(source: str) -> Path:
        path = Path(source)
        if path.is_dir():
            return path
        return path.parent if path.is_file() else Path("experiments") / "evaluations" / path.name


if __name__ == "__main__":
    fire.Fire(Runner)
