"""Train and evaluate.

    python run.py train CONFIG.yaml [--key value ...]
    python run.py evaluate RUN_FOLDER_OR_CHECKPOINT_OR_NAME --test_data X.tsv [--weights PATH] [--mode amp]

Any key of a configuration can be overridden on the command line, nested ones with a dot: `--optimizer_args.lr 3e-4`.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire
import torch

from common.errors import Faults, UserError, print_user_errors
from distill.objectives import create_objective
from models import load_model
from training.config import TrainConfig, read_config
from training.data import open_labelled, open_training
from training.evaluate import evaluate, write_results
from training.loop import Run
from training.precision import Precision, choose_device
from training.run_folder import log_to, new_run_folder
from training.student import create_student

logger = logging.getLogger(__name__)


class Runner:
    """The commands of run.py.

    Args:
        seed: of everything random in a run.
        nthreads: CPU threads; all of them by default.
    """

    def __init__(self, seed: int = 42, nthreads: int | None = None) -> None:
        self.seed = seed
        if nthreads:
            torch.set_num_threads(nthreads)

    @print_user_errors
    def train(self, config_file: str, **overrides: Any) -> None:
        """Train a model on labels or on soft targets.

        Args:
            config_file: a YAML file, see `trainconfig/`.
            overrides: key → value of the configuration.
        """
        log_to(None)
        torch.manual_seed(self.seed)  # initial weights and dropout; everything else draws from streams of its own
        faults = Faults(config_file)
        config = read_config(TrainConfig, config_file, overrides, faults)
        data = open_training(config, self.seed, faults) if config else None
        objective = model = None
        if config:
            try:
                arguments = {"loss": config.loss, "loss_args": config.loss_args}
                objective = create_objective(config.objective, **arguments | config.objective_args)
                model = create_student(config, data.labels if data else None, objective)
            except UserError as error:
                faults.add(str(error))
        faults.raise_if_any()
        assert config is not None
        assert data is not None
        assert objective is not None
        assert model is not None
        device = choose_device(config.device)
        folder = new_run_folder(config, Path(config_file).stem, data.labels)
        log_to(folder / config.logfile, debug=config.debug)
        logger.info("command: %s", " ".join(sys.argv))
        logger.info(
            "%s, %.2f M parameters, on %s; %d chunks of %d clips; checkpoints chosen on %s",
            config.model,
            sum(p.numel() for p in model.parameters()) / 1e6,
            device,
            len(data.source.bounds),
            len(data.pack),
            config.valid_data or config.eval_data or "nothing: the last one is kept",
        )
        run = Run(config, data, model.to(device), objective, folder, device, self.seed)
        result = run.fit()
        print(f"run: {folder}\nnext: python inference.py FILES_OR_FOLDERS -m {result['weights']}")

    @print_user_errors
    def evaluate(
        self,
        experiment: str | None = None,
        test_data: str | None = None,
        *,
        m: str | None = None,
        weights: str | None = None,
        mode: str = "noamp",
        batch_size: int = 32,
        num_workers: int = 4,
        device: str = "auto",
        output: str | None = None,
    ) -> None:
        """Judge a model on a labelled pack: mAP, mAUC, d-prime, lwlrap, top-1, per-class results.

        Args:
            experiment: a run's folder, a checkpoint, or the name of a model.
            test_data: TSV of a pack with a `labels` column.
            m: another way to give `experiment`.
            weights: weights for a model given by name.
            mode: noamp, amp or amp_bf16.
            batch_size: clips at once.
            num_workers: loader processes.
            device: auto, cpu or cuda.
            output: folder for the results; beside the checkpoint by default.
        """
        log_to(None)
        source = experiment or m
        if source is None or test_data is None:
            raise UserError("give a run's folder, a checkpoint or a model's name, and --test_data PACK.tsv")
        if mode not in ("noamp", "amp", "amp_bf16"):
            raise UserError(f"mode is {mode!r}; use noamp, amp or amp_bf16")
        faults = Faults("the evaluation")
        place = choose_device(device)
        model = load_model(source, weights=weights).to(place)
        data = open_labelled(test_data, model.labels, faults)
        faults.raise_if_any()
        assert data is not None, "without faults there is data"
        precision = Precision(mode, place)
        metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
        print(metrics.summary())
        print(f"clips used: {len(data.pack)}, missing from the pack: {data.pack.n_missing}")
        folder = Path(output) if output else self._beside(source)
        print(f"results: {write_results(folder, f'evaluation_{Path(test_data).stem}', metrics, data)}")

    @staticmethod
    def _beside(source: str) -> Path:
        path = Path(source)
        if path.is_dir():
            return path
        return path.parent if path.is_file() else Path("experiments") / "evaluations" / path.name


if __name__ == "__main__":
    fire.Fire(Runner)
