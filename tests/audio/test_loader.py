"""Processes that load clips: they end with the process that reads them and not before, however they were started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

from audio.dataset import ClipLoader
from common.errors import UserError
from tests.conftest import ROOT

LIMIT = 60.0  # seconds, on a busy machine


class SlowClips:
    """Two items, the second one after longer than a process takes to look for its parent."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(0.6 * index)
        return os.getpid()


class DamagedClips:
    """An item that raises an error, or whose process ends."""

    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.error is None:
            os._exit(1)
        raise self.error(f"shard.h5 is missing, in a worker: {get_worker_info() is not None}")


def load(method: str) -> None:
    """Print the loader process of each clip, and wait."""
    loader = ClipLoader(SlowClips(), 1, multiprocessing_context=method, persistent_workers=True)
    print(*[int(batch[0]) for batch in loader], flush=True)
    time.sleep(LIMIT)


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_loader_process_lives_as_long_as_its_parent(method: str) -> None:
    code = f"from tests.audio.test_loader import load\nif __name__ == '__main__': load({method!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, *others = map(int, parent.stdout.readline().split())
        assert others == [worker]
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + LIMIT
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_error_of_a_clip_is_not_that_of_a_process_which_has_died(n_workers: int) -> None:
    with pytest.raises(FileNotFoundError, match=rf"shard\.h5 is missing, in a worker: {n_workers > 0}"):
        list(ClipLoader(DamagedClips(FileNotFoundError), n_workers))


@pytest.mark.long
def test_a_process_that_has_died_is_a_sentence() -> None:
    with pytest.raises(UserError, match="a process that loads clips has died"):
        list(ClipLoader(DamagedClips(None), 1))
