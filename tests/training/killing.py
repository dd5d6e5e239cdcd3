"""Start a training run again and again, kill it with SIGKILL at random moments, and let it finish at last.

The first kill comes with the first state.

    python tests/training/killing.py CONFIG OUTPUT KILLS SEED WORKERS...

WORKERS are loader processes, taken in turn. Prints JSON: how long an uninterrupted run takes, and how often each start
was killed. Nothing is computed before the fork, so the children inherit loaded modules and no threads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from run import Runner
from tests.processes import fork
from tests.training import methods  # noqa: F401  (it registers its objectives)


def start(config: str, output: str, workers: int) -> int:
    """Fork a child that trains; return its number."""
    runner = Runner(seed=7)
    return fork(lambda: runner.train(config, outputpath=output, num_workers=workers), Path(output).parent / "log.txt")


def newest_step(output: str) -> int:
    """Return the step of the newest state below `output`; 0 where there is none."""
    return max((int(path.stem.split("=")[1]) for path in Path(output).glob("*/*/*/states/step=*.json")), default=0)


def main() -> None:
    """See above."""
    config, output, kills, seed, *workers = sys.argv[1:]
    draw = random.Random(int(seed))
    began = time.perf_counter()
    assert os.waitpid(start(config, output + "_whole", int(workers[0])), 0)[1] == 0, "the uninterrupted run failed"
    seconds = time.perf_counter() - began
    total = max(json.loads(line)["step"] for line in next(Path(output + "_whole").glob("*/*/*/metrics.jsonl")).open())
    killed = 0
    for attempt in range(1000):
        child = start(config, output, int(workers[attempt % len(workers)]))
        if killed < int(kills):
            if killed:
                latest = time.perf_counter() + draw.uniform(0, 0.6 * seconds)
                # At the latest when it is ahead of its share, so that there is something left for the other kills.
                share = total * (killed + 1) / (int(kills) + 1)
                while time.perf_counter() < latest and newest_step(output) <= share:
                    time.sleep(0.01)
            else:  # once there is something to go on with, however slow the machine is today
                while not list(Path(output).glob("*/*/*/states/*.json")) and os.waitpid(child, os.WNOHANG) == (0, 0):
                    time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)  # its loader workers live on for some seconds, as after any crash
                os.waitpid(child, 0)
                killed += 1
                continue
        else:
            _, status = os.waitpid(child, 0)
        assert status == 0, f"start {attempt} ended with {status}"
        break
    print(json.dumps({"seconds": seconds, "killed": killed}))


if __name__ == "__main__":
    main()
