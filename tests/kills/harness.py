"""Kill every command of the project at random moments, run it again, and compare with an undisturbed run.

    python tests/kills/harness.py FOLDER SIGNAL TIMES SEED [NAME ...]

FOLDER gets the inputs and outputs. Each of the commands, or of those named (see `COMMANDS`), gets the signal (KILL,
TERM, INT, HUP) TIMES times: by turns the process alone, whose workers must end by themselves, and its process group.
Prints JSON, a line a command: the number of signals, and the rounds in which something was wrong: outputs that differ
from those of the undisturbed run, files that stay (also temporary ones and shared memory), processes that live on;
after signals other than KILL also the status, a traceback, and temporary files before the command is run again. Nothing
is computed before the fork, so the children inherit loaded modules and no threads.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - so that no child waits for it
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch
import yaml

import export_onnx
import inference
from common import interrupts
from models import create_model, save_checkpoint
from run import Runner
from save_logits import save_logits
from scripts import (
    baseline,
    cluster_embeddings,
    export_hf,
    make_demo_sounds,
    make_lists,
    sweep_token_merging,
    wavlist_to_hdf5,
)
from tests.conftest import write_tones
from tests.processes import find_processes, fork

CPU = {"device": "cpu", "num_workers": 1}
STORE = CPU | {"epochs": 2, "batch_size": 4, "topk": 3, "spectransforms": [{"FrequencyMasking": {}}]}
TRAINING = CPU | {
    **{"model": "audiotransformer_pico", "model_args": {"depth": 1, "pooling": "logit"}, "pretrained": False},
    **{"loss": "BCEWithLogitsLoss", "batch_size": 6, "epochs": 3, "warmup_epochs": 1, "checkpoint_every": 2},
    **{"valid_fraction": 0.25, "log_every": 2, "baseline": False, "optimizer": "AdamW"},
}


def prepare(inputs: Path) -> None:
    """Make what the commands read: sounds, a pack, a teacher, stores, configurations."""
    torch.manual_seed(0)
    labels = [f"tone {i}" for i in range(3)]
    listed = write_tones(inputs, 12, 3, 8000, 1.0)
    for index, path in enumerate(sorted((inputs / "sounds").iterdir())):
        folder = inputs / "folders" / labels[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    wavlist_to_hdf5.main([str(listed), str(inputs / "pack"), "-n", "0"])
    model = create_model("audiotransformer_pico", num_classes=3, labels=labels, depth=1)
    save_checkpoint(inputs / "teacher.pt", model)
    pack = str(inputs / "pack" / "labels" / "tones.tsv")
    soft = STORE | {"train_data": pack, "model": str(inputs / "teacher.pt"), "name": "teacher"}
    for name, settings in {"soft": soft, "train": TRAINING | {"train_data": pack, "eval_data": pack}}.items():
        (inputs / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    save_logits(str(inputs / "soft.yaml"), targets="embeddings", outputpath=str(inputs / "embeddings"))


def _tag(*words: str) -> Callable[[Path], Any]:
    def run(inputs: Path) -> None:
        inference.main(
            [str(inputs / "sounds"), "-m", str(inputs / "teacher.pt"), "--n_workers", "1", *words, "--quiet"]
        )

    return run


def _pack(inputs: Path) -> None:
    wavlist_to_hdf5.main([str(inputs / "tones.tsv"), "pack", "-n", "1", "-s", "5"])


def _store(inputs: Path, **more: str) -> None:
    save_logits(str(inputs / "soft.yaml"), outputpath="store", **more)


def _data(inputs: Path) -> str:
    return str(inputs / "pack" / "labels" / "tones.tsv")


def _probe(inputs: Path) -> None:
    data = _data(inputs)
    Runner().probe(str(inputs / "teacher.pt"), train_data=data, test_data=data, name="mine", epochs=3, **CPU)


def _cluster(inputs: Path) -> None:
    (store,) = (path.parent for path in (inputs / "embeddings").rglob("meta.json"))
    shutil.copytree(store, "store", dirs_exist_ok=True)
    cluster_embeddings.main(["store", "--k", "2,3"])


def _sweep(inputs: Path) -> None:
    words = ["--inference", str(inputs / "teacher.pt"), "--test_data", _data(inputs), "--r", "0,2", "--rounds", "1"]
    sweep_token_merging.main([*words, "--num_workers", "1", "--output", "sweep", "--device", "cpu"])


def _baseline(inputs: Path) -> None:
    baseline.main(["--train_data", _data(inputs), "--test_data", _data(inputs), "--output", "baseline.json"])


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "make_demo_sounds": lambda inputs: make_demo_sounds.main(
        ["set", "--n_train", "4", "--n_valid", "2", "--n_eval", "2", "--seconds", "1"]
    ),
    "make_lists": lambda inputs: make_lists.main([str(inputs / "folders"), "--output", "lists"]),
    "wavlist_to_hdf5": _pack,
    "save_logits": _store,
    "save_logits of embeddings": lambda inputs: _store(inputs, targets="embeddings"),
    "train": lambda inputs: Runner(7).train(str(inputs / "train.yaml"), outputpath="runs"),
    "evaluate": lambda inputs: Runner().evaluate(
        str(inputs / "teacher.pt"), test_data=_data(inputs), output="results", **CPU
    ),
    "probe": _probe,
    "inference to csv": _tag("--output", "tags.csv"),
    "inference to parquet": _tag("--output", "tags.parquet"),
    "inference to label tracks": _tag("--output", "tracks", "--format", "audacity"),
    "inference to embeddings": _tag("--embeddings", "embeddings.h5"),
    "inference to pictures": _tag("--plot", "pictures"),
    "export_onnx": lambda inputs: export_onnx.main(["-m", str(inputs / "teacher.pt"), "--output", "model.onnx"]),
    "export_hf": lambda inputs: export_hf.main(["hf", "-m", str(inputs / "teacher.pt"), "--overwrite"]),
    "baseline": _baseline,
    "cluster_embeddings": _cluster,
    "sweep_token_merging": _sweep,
}


def start(function: Callable[[Path], Any], inputs: Path, folder: Path, log: Path, temporary: Path) -> int:
    """Fork a child in a session of its own that runs a command in `folder`; return its number."""

    def run() -> None:
        os.setsid()
        interrupts.act_as_entry_point()
        torch.set_num_threads(1)
        os.chdir(folder)
        tempfile.tempdir = str(temporary)
        function(inputs)

    return fork(run, log)


WORKER_SECONDS = 5.0  # in which workers notice that their parent has ended
RUN = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{8}")
# Files with times, speeds, names of runs or, in Ogg, a random number; only their names are compared.
VARYING = re.compile(
    r"\.(log|ogg)$|report\.html$|\.png$|run\.json$|finished\.json$|events\.out|sweep.*\.(csv|md)$|baseline\.json$"
)


def describe(path: Path) -> str:
    """Return what must be equal of a file: a hash of its content, without what a clock has measured."""
    if path.is_symlink():
        return RUN.sub("RUN", os.readlink(path))
    if path.is_dir() or VARYING.search(path.name):
        return ""
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        content = repr(
            [{k: v for k, v in line.items() if k not in ("clips_per_second", "wait_share")} for line in lines]
        ).encode()
    return hashlib.sha256(content).hexdigest()


def take_stock(folder: Path) -> dict[str, str]:
    """Return name → content of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"events\.out\S*", "events", RUN.sub("RUN", str(path.relative_to(folder))))
        if not any(parent.is_symlink() for parent in path.parents):
            found[name] = describe(path)
    return found


def compare(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the names that are missing, superfluous or different."""
    faults = [f"missing: {name}" for name in expected.keys() - found.keys()]
    faults += [f"stays: {name}" for name in found.keys() - expected.keys()]
    return faults + [f"differs: {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]


class Harness:
    """Runs and kills one command.

    Args:
        name: a key of `COMMANDS`.
        inputs: see `prepare`.
        work: a folder for its outputs.
        temporary: its TMPDIR; a short path, since that of a socket may have 107 characters.
    """

    def __init__(self, name: str, inputs: Path, work: Path, temporary: Path) -> None:
        self.function, self.inputs, self.work = COMMANDS[name], inputs, work
        self.log, self.temporary = work / "log.txt", temporary
        self.pids: set[int] = set()
        began = time.monotonic()
        self.fresh_folder()
        self.finish()
        self.seconds = time.monotonic() - began
        self.expected = take_stock(self.folder)
        self.cached = {path.name for path in self.temporary.iterdir()}  # PyTorch's cache of compiled code

    @property
    def folder(self) -> Path:
        """Where the command runs."""
        return self.work / "out"

    def fresh_folder(self) -> None:
        """Empty the folders of outputs and temporary files."""
        for folder in (self.folder, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def finish(self) -> None:
        """Run the command to its end."""
        child = start(self.function, self.inputs, self.folder, self.log, self.temporary)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise RuntimeError(f"ended with status {status}: {self.log.read_text()[-2000:]}")

    def interrupt(self, moment: float, number: int, *, group: bool) -> list[str] | None:
        """Start the command and send it a signal after some seconds.

        Returns:
            What is wrong then; None if the command had ended before.
        """
        self.log.write_text("")
        child = start(self.function, self.inputs, self.folder, self.log, self.temporary)
        time.sleep(moment)
        is_running = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        if is_running:
            self.pids |= set(find_processes(child))
            (os.killpg if group else os.kill)(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        deadline = time.monotonic() + WORKER_SECONDS
        while (left := find_processes(child)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        faults = [f"lives on: {pid}" for pid in left]
        if number != signal.SIGKILL and is_running and status:
            faults += self._check_stop(status, number)
        return faults if is_running else None

    def _check_stop(self, status: int, number: int) -> list[str]:
        """Return what is wrong after a signal that the command handles."""
        printed = self.log.read_text()
        faults = [f"{path} after a stop" for path in self.folder.rglob("*.partial*")]
        faults += [f"temporary after a stop: {path}" for path in self._find_temporary()]
        if status != 128 + number or "stopped" not in printed or "Traceback" in printed:
            faults.append(f"status {status} after signal {number}: {printed[-2000:]}")
        return faults

    def _find_temporary(self) -> list[Path]:
        found = [path for path in self.temporary.iterdir() if path.name not in self.cached]
        return found + [path for pid in self.pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]

    def round(self, draw: random.Random, number: int, *, group: bool) -> list[str]:
        """Send the command a signal once, and run it again; return what is wrong."""
        share, faults = draw.uniform(0, 1), None
        while faults is None:
            self.fresh_folder()
            faults = self.interrupt(share * self.seconds, number, group=group)
            share *= 0.9
        try:
            self.finish()
        except RuntimeError as error:
            return [*faults, str(error)]
        faults += compare(self.expected, take_stock(self.folder))
        return faults + [f"temporary: {path}" for path in self._find_temporary()]


def main() -> None:
    """See above."""
    work, number = Path(sys.argv[1]).resolve(), signal.Signals[f"SIG{sys.argv[2]}"]
    times, seed = map(int, sys.argv[3:5])
    draw = random.Random(seed)
    inputs, temporary = work / "inputs", Path(tempfile.mkdtemp(prefix="ced-kills-"))
    if not (inputs / "ready").exists():
        inputs.mkdir(parents=True)
        child = start(prepare, inputs, inputs, work / "log.txt", temporary)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError((work / "log.txt").read_text())
        (inputs / "ready").touch()
    for name in sys.argv[5:] or COMMANDS:
        harness = Harness(name, inputs, work / name.replace(" ", "_"), temporary)
        rounds = [harness.round(draw, number, group=n % 2 == 1) for n in range(times)]
        faults = [found for found in rounds if found]
        print(json.dumps({"command": name, "signals": times, "faults": faults, "seconds": harness.seconds}), flush=True)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
