"""From a configuration file to a run that is ready to start, or to one message with all that is wrong."""

import logging
import sys
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import Faults, UserError
from distill.objectives import create_objective
from distill.targets import StoredTargets
from training.config import TrainConfig, read_config
from training.data import open_training
from training.loop import Run
from training.precision import choose_device
from training.run_folder import log_to, make_run_folder, run_folder
from training.student import create_student

logger = logging.getLogger(__name__)


def prepare_run(config_file: str, overrides: dict[str, Any], seed: int) -> Run:
    """Check a configuration and the data it names, build the model, make the run's folder and log into it.

    Args:
        config_file: a YAML file, see `trainconfig/`.
        overrides: key → value laid over it.
        seed: of everything random; the caller has seeded PyTorch, which initial weights and dropout draw from.

    Raises:
        UserError: every fault of the configuration, its data, its model and its objective; nothing was written then.
    """
    faults = Faults(config_file)
    config = read_config(TrainConfig, config_file, overrides, faults)
    data = open_training(config, seed, faults) if config else None
    objective = model = device = None
    if config:
        try:
            device = choose_device(config.device)
            loss = {"loss": config.loss, "loss_args": config.loss_args} if config.objective == "target" else {}
            objective = create_objective(config.objective, **loss | config.objective_args)
            model = create_student(config, data.labels if data else None, objective)
        except UserError as error:
            faults.add(str(error))
    faults.raise_if_any()
    if config is None or data is None or objective is None or model is None or device is None:
        raise AssertionError("a part is missing, and no fault was noted")
    if isinstance(objective, nn.Module):
        objective.to(device)
    folder = run_folder(config, Path(config_file).stem)
    run = Run(config, data, model.to(device), objective, folder, device, seed)
    make_run_folder(folder, config, data.labels)
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
    if isinstance(data.source, StoredTargets):
        stored = len(data.source.epochs)
        logger.info("%d stored epochs of soft targets, used in order and from the start again", stored)
    return run
