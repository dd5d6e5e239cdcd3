"""Save a teacher's soft targets for a pack.

    python save_logits.py CONFIG.yaml [--key value ...]
    torchrun --nproc_per_node N save_logits.py CONFIG.yaml [--key value ...]

Any key of the configuration can be overridden. The folder written is printed at the end; running the same command
again goes on where it stopped.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire

from common.errors import Faults, UserError, print_user_errors
from distill.replay import Replay
from models import AudioTagger, Ensemble, load_model
from training.config import SoftTargetConfig, read_config
from training.data import open_pack
from training.teaching import Teaching


def load_teachers(config: SoftTargetConfig) -> list[AudioTagger]:
    """Load the member or members of the teacher; their labels are checked to be the same."""
    names = [config.model] if isinstance(config.model, str) else config.model
    given = [config.weights] if isinstance(config.weights, str) else config.weights
    weights: Sequence[str | None] = given or [None] * len(names)
    if len(weights) != len(names):
        raise UserError(f"{len(names)} models and {len(weights)} weights are given; give one file a model, in order")
    members = [load_model(name, weights=file, **config.model_args) for name, file in zip(names, weights, strict=True)]
    Ensemble(members)  # checks that they agree on their classes
    return members


def store_folder(config: SoftTargetConfig, members: list[AudioTagger]) -> Path:
    """Return outputpath/NAMES/TSV_STEM/chunk_SECONDS, as published."""
    name = config.name or "_".join(member.name for member in members)
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
    members: list[AudioTagger] = []
    if config:
        try:
            Replay(config.wavtransforms, config.spectransforms, config.mask_fill)
        except UserError as error:
            faults.add(str(error))
        try:
            members = load_teachers(config)
        except UserError as error:
            faults.add(str(error))
    faults.raise_if_any()
    assert config is not None
    assert pack is not None
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Teaching(config, pack, members, store_folder(config, members), rank, world_size).save()
    if rank == 0:
        print(f"soft targets: {folder}\nnext: python run.py train CONFIG.yaml --logitspath {folder}")


if __name__ == "__main__":
    fire.Fire(save_logits)
