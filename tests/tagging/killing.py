"""Tag folders again and again, kill that with SIGKILL at random moments, and let it finish at last.

    python tests/tagging/killing.py < TASKS

Each line of TASKS is JSON: `kills`, how often; `seed` of the moments; `processes`, how many tag side by side as
torchrun starts them, in each start in turn (the last number counts from then on); `arguments` of inference.py. The
engine is made slow and tells of the clips that it tags. For each task prints JSON: the last start's exit statuses and
what it printed, and the clips tagged in each start. Nothing is computed before the fork, so the children inherit loaded
modules and no threads.
"""

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - so that no child waits for it
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch

import inference
import models  # noqa: F401
import tagging.embeddings
from tagging.engines import TorchEngine
from tests.processes import fork

PAUSE = 0.005  # seconds before a batch


def tag(arguments: list[str], rank: int, world_size: int, attempt: int) -> None:
    """Tag as one of several processes."""
    torch.set_num_threads(1)
    world = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "TORCHELASTIC_RUN_ID": attempt}
    os.environ.update({name: str(value) for name, value in world.items()})
    tagging.embeddings.CHUNK_BYTES = 1  # each file's embeddings are written at once
    original = TorchEngine.predict

    def predict(self, clips):
        time.sleep(PAUSE)
        probabilities = original(self, clips)
        os.write(1, f"tagged {len(clips)}\n".encode())
        return probabilities

    TorchEngine.predict = predict
    inference.main(arguments)


def count(log: Path) -> int:
    """Clips that a start has tagged so far."""
    return sum(map(int, re.findall(r"tagged (\d+)\n", log.read_text())))


def perform(kills: int, seed: int, processes: list[int], arguments: list[str]) -> dict:
    """Do a task."""
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    logs: list[Path] = []
    while True:
        attempt = len(logs)
        logs.append(folder / f"{attempt}.txt")
        logs[-1].touch()
        world_size = processes[min(attempt, len(processes) - 1)]
        children = [fork(partial(tag, arguments, rank, world_size, attempt), logs[-1]) for rank in range(world_size)]
        if attempt < kills:
            n_clips, pause = draw.choice([0, *range(28)]), draw.uniform(0, 0.05)
            if attempt == kills - 1:  # late enough for some files to be done: rows are written behind the engine
                n_clips = 80
            while count(logs[-1]) < n_clips and not os.waitid(
                os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.002)
            time.sleep(pause)
            for child in children:
                os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if attempt >= kills:
            codes = [os.waitstatus_to_exitcode(status) for status in statuses]
            return {"codes": codes, "log": logs[-1].read_text(), "tagged": [count(log) for log in logs]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(perform(**json.loads(line))), flush=True)
