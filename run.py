"""Train and evaluate.

    python run.py train CONFIG.yaml [--resume auto|never|RUN_FOLDER] [--key value ...]
    torchrun --nproc_per_node N run.py train CONFIG.yaml [--key value ...]
    python run.py config CONFIG.yaml [--key value ...]
    python run.py evaluate RUN_FOLDER_OR_CHECKPOINT_OR_NAME --test_data X.tsv [--head NAME] [--weights PATH]
    python run.py probe RUN_FOLDER_OR_CHECKPOINT_OR_NAME --data X.tsv --name NAME [--head mlp] [--key value ...]
    python run.py probe MODEL[,MODEL] --tasks TASKS.yaml --name NAME [--head linear,knn] [--layers last,all]

Any key of a configuration can be overridden on the command line, nested ones with a dot: `--optimizer_args.lr 3e-4`.
"""

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import fail, print_user_errors  # isort: split

import os
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from common.commands import run_commands
from common.options import Options
from probing.options import ProbeOptions
from probing.probe import probe
from probing.tasks import probe_tasks
from probing.temporal_support import probe_supports
from tagging.engines import open_engine
from training.automatic import describe_train_config
from training.config import TrainConfig
from training.evaluate import EvaluateOptions, evaluate_command
from training.parallel import process_group
from training.prepare import prepare_run
from training.run_folder import log_to


class Runner:
    """The commands of run.py.

    Args:
        seed: of all random numbers of a run (default 42).
        nthreads: CPU threads; all of them by default.
    """

    def __init__(self, seed: int = 42, nthreads: int | None = None) -> None:
        if not isinstance(seed, int) or seed < 0:
            fail(f"--seed is {seed!r}; expected a whole number, at least 0")
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
        """Train a model on labels or soft targets, or resume a stopped run.

        Args:
            config_file: a YAML file, see `trainconfig/`.
            m: short for --model.
            weights: short for --pretrained, the initial weights of the model.
            resume: `auto` (the default) resumes the newest unfinished run of the same configuration and seed, or starts
                a new one; `never` starts a new one; or the folder of a run, or one of its states.
            overrides: any key of the configuration; nested ones with a dot, --optimizer_args.lr 3e-4.
        """
        overrides |= {key: value for key, value in (("model", m), ("pretrained", weights)) if value is not None}
        with process_group() as ranks:
            log_to(None, quiet=not ranks.is_main)
            torch.manual_seed(self.seed)  # initial weights; everything else draws from streams of its own
            prepared = prepare_run(config_file, overrides, self.seed, resume=str(resume), ranks=ranks)
            result = prepared.fit()
        if ranks.is_main:
            tags = prepared.run.model.num_classes > 0
            use = "inference.py FILES_OR_FOLDERS -m" if tags else "run.py probe --data PACK.tsv --name NAME -m"
            print(f"run: {prepared.folder.path}\nnext: python {use} {result['weights']}")

    @print_user_errors
    def config(self, config_file: str, **overrides: Any) -> None:
        """Print the configuration that `train` would use: every key, with defaults and overrides.

        Args:
            config_file: a YAML file, see `trainconfig/`.
            overrides: any key of the configuration; nested ones with a dot, --optimizer_args.lr 3e-4.
        """
        print(describe_train_config(config_file, overrides), end="")

    @print_user_errors
    def evaluate(
        self,
        experiment: str | None = None,
        test_data: str | None = None,
        *,
        m: str | None = None,
        **options: Any,
    ) -> None:
        """Evaluate a model on a labelled pack: mAP, mAUC, d-prime, lwlrap, top-1, per-class results.

        Args:
            experiment: a run's folder, a checkpoint, the name of a model, or an .onnx file.
            test_data: TSV of a pack with a `labels` column.
            m: another name of `experiment`.
            options: data, precision and output.
        """
        log_to(None)
        given = {"model": experiment or m, "test_data": test_data, **options}
        print(evaluate_command(given, open_exported=open_engine))

    @print_user_errors
    def probe(self, model: str | None = None, *, m: str | None = None, **options: Any) -> None:
        """Train a head on a model's frozen embeddings and evaluate it: accuracy or mAP, with a 95 % interval.

        Writes heads/NAME.pt, for --head NAME of every command with -m MODEL, with its figures and a picture.

        Args:
            model: a run's folder, a checkpoint, or the name of a model; --embeddings STORE[,STORE] in its place.
            m: short for --model.
            options: --name and either --data (tested by the folds of its column `fold`), --train_data and --test_data,
                or --tasks TASKS.yaml for several tasks, models and heads in one table.
        """
        log_to(None)
        given = {"model": model or m, **options}
        has_supports = options.get("temporal_support") not in (None, "null")
        run_probe = probe_tasks if options.get("tasks") else probe_supports if has_supports else probe
        print(run_probe(given, self.seed))


if __name__ == "__main__":
    keys: dict[str, type[Options]] = {
        "train": TrainConfig,
        "config": TrainConfig,
        "evaluate": EvaluateOptions,
        "probe": ProbeOptions,
    }
    run_commands(Runner, keys=keys)
