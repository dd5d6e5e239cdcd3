"""What tests share: where reference data lies, and sounds made by formula."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import is_hypothesis_test

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the same sums in the same order, however many cores a machine has


# Files that take a minute and more come first: one that is begun last would run alone.
LONGEST = (
    "test_documents",
    "test_pipeline",
    "test_ranks",
    "test_resume",
    "test_trainconfig",
    "test_onnx",
    "test_runtimes",
)


def pytest_configure() -> None:
    """Let signals end commands also where `nohup`, or a shell that starts the tests in the background, ignores them."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave all else in its order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):  # for scripts/reliability.py
            n_examples = item.obj._hypothesis_internal_use_settings.max_examples
            item.user_properties.append(("generated texts, tables, settings and descriptions", n_examples))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside a developer's checkout (or `CED_SHARED`); skips where it is absent."""
    folder = Path(os.environ.get("CED_SHARED", ROOT.parent / "shared"))
    if not (folder / "fixtures").is_dir():
        pytest.skip(f"needs the reference data, which is not at {folder}")
    return folder


def run_command(*words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python WORDS...` in the project's root, or elsewhere, and return what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def start_server(script: str) -> Iterator[Callable[[dict], Any]]:
    """Start a script that reads tasks and writes results, a line of JSON each; yield what sends a task and waits."""
    with subprocess.Popen(
        [sys.executable, ROOT / script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:

        def run_task(task: dict) -> Any:
            print(json.dumps(task), file=process.stdin, flush=True)
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        yield run_task
        assert process.stdin is not None
        process.stdin.close()


def torchrun() -> tuple[str, ...]:
    """Return the words that start two processes of a command, on a port that no other test uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", str(port))


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """`command("run.py", "train", ...)` runs a command of the project as a user does."""
    return run_command


def write_tones(folder: Path, n_clips: int, n_classes: int, sample_rate: int, seconds: float, seed: int = 0) -> Path:
    """Write noisy tones, one pitch a class, and their list (`filename`, `labels` by name); return the list."""
    rng = np.random.default_rng(seed)
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    lines = ["filename\tlabels"]
    for index in range(n_clips):
        label = index % n_classes
        pitch = 200.0 * 1.5**label * rng.uniform(0.97, 1.03)
        sound = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / "sounds" / f"tone_{index:03d}.wav", sound, sample_rate)
        lines.append(f"sounds/tone_{index:03d}.wav\ttone {label}")
    target = folder / "tones.tsv"
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture(scope="session")
def tone_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TSV of a pack of 28 one-second tones in 7 classes, recorded at 8 kHz, packed at 16 kHz."""
    folder = tmp_path_factory.mktemp("tones")
    listed = write_tones(folder, 28, 7, 8000, 1.0)
    result = run_command("scripts/wavlist_to_hdf5.py", listed, folder / "pack", "-n", "2")
    assert result.returncode == 0, result.stderr
    return folder / "pack" / "labels" / "tones.tsv"
