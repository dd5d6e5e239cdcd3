"""Save a teacher's soft targets for a pack.

    python save_logits.py CONFIG.yaml [--key value ...]
    torchrun --nproc_per_node N save_logits.py CONFIG.yaml [--key value ...]

Any key of the configuration can be overridden. The folder written is printed at the end; running the same command
again goes on where it stopped.
"""

import logging
import os
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire

from common.errors import Faults, print_user_errors
from distill.replay import Replay
from training.config import SoftTargetConfig, read_config
from training.data import open_pack
from training.teacher import Teacher, load_teacher
from training.teaching import Teaching


def store_folder(config: SoftTargetConfig, teacher: Teacher) -> Path:
    """Return outputpath/NAMES/TSV_STEM/chunk_SECONDS, as published."""
    name = config.name or teacher.name
    return Path(config.outputpath) / name / Path(config.train_data).stem / f"chunk_{config.chunk_length:g}"


@print_user_errors
def save_logits(config_file: str, m: str | None = None, **overrides: Any) -> None:
    """Save soft targets.

    Args:
        config_file: a YAML file, see `logitconfig/`.
        m: short for --model.
        overrides: key → value of the configuration.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides |= {} if m is None else {"model": m}
    faults = Faults(config_file)
    config = read_config(SoftTargetConfig, config_file, overrides, faults)
    pack = open_pack(config.train_data, faults) if config else None
    teacher = None
    if config:
        with faults.noted():
            Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
        with faults.noted():
            teacher = load_teacher(config.model, config.weights, config.model_args)
    faults.raise_if_any()
    if config is None or pack is None or teacher is None:
        raise AssertionError("a part is missing, and no fault was noted")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Teaching(config, pack, teacher, store_folder(config, teacher), rank, world_size).save()
    if rank == 0:
        print(f"soft targets: {folder}\nnext: python run.py train CONFIG.yaml --logitspath {folder}")


if __name__ == "__main__":
    fire.Fire(save_logits)
