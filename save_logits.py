"""Save a teacher's soft targets or embeddings for a pack.

    python save_logits.py CONFIG.yaml [--key value ...]
    torchrun --nproc_per_node N save_logits.py CONFIG.yaml [--key value ...]
    python save_logits.py CONFIG.yaml -m MODEL --head NAME

Any key of the configuration can be overridden. The folder is printed at the end; the same command completes a store
that was interrupted.
"""

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import os
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where loader workers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common.commands import run_commands
from common.interrupts import note_when_stopped
from training.config import SoftTargetConfig
from training.prepare_store import prepare_store


@print_user_errors
def save_logits(config_file: str, *, m: str | None = None, **overrides: Any) -> None:
    """Save soft targets or embeddings.

    Args:
        config_file: a YAML file, see `logitconfig/`.
        m: short for --model.
        overrides: any key of the configuration; nested ones with a dot, --model_args.token_merging 8.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides |= {} if m is None else {"model": m}
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    writer = prepare_store(config_file, overrides, rank, world_size)
    with note_when_stopped("finished files of the store are kept, and the same command writes the others"):
        folder = writer.save()
    if rank == 0:
        key = "embeddingspath" if writer.config.targets == "embeddings" else "logitspath"
        print(f"{writer.content.store.what}: {folder}\nnext: python run.py train CONFIG.yaml --{key} {folder}")


if __name__ == "__main__":
    run_commands(save_logits, keys={"": SoftTargetConfig})
