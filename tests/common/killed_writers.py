"""Write each kind of file in a process that is killed, or whose disk fails, at a chosen moment.

    python tests/common/killed_writers.py < TASKS

Each line of TASKS is JSON: `writer`, a name of `WRITERS`; `folder`; `moment`; and `error`. Without an error, `moment`
is the rename that kills it: 2n just before the n-th one, 2n + 1 just after it, -1 none. With the name of an error, such
as ENOSPC, it is the call to the disk that fails with it; with ENOSPC all later ones that need space fail, too. Prints
JSON for each: how it ended ("done", "killed", or the message of the error), and by name the hash of each file in the
folder then. Everything is imported before the fork.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - so that no child waits for it
import numpy as np
import pandas as pd
import pyarrow.parquet  # noqa: F401
import soundfile
import torch

import common.files
from audio.pack import pack
from common.errors import UserError
from common.files import sha256, write_json
from distill.embeddings import EmbeddingStore
from models import create_model
from models.headed import Head
from models.heads import save_head
from scripts.hf.folder import export
from tagging.embeddings import EmbeddingFile
from tagging.files import TaggedFile, TaggedWindow
from tagging.outputs import open_output
from tagging.parts import Share
from tagging.pictures import Pictures
from training.config import TrainConfig
from training.run_folder import RunFolder
from training.states import States

NAMES = ("a.wav", "b/c.wav", "d.wav")


def _tagged(folder: Path) -> Iterator[TaggedFile]:
    for name in NAMES:
        frames = np.ones((3, 4), np.float16)
        yield TaggedFile(folder / "sounds" / name, [TaggedWindow(0.0, 1.0, [("Bell", 0.5)], frames[0], frames)])


def _tag(name: str, kind: str | None = None, world_size: int = 1) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        files = list(_tagged(folder))
        paths = [file.path for file in files]
        for rank in range(world_size):
            share = Share(rank, world_size, start=str(os.getpid()))
            if name == "embeddings.h5":
                output = EmbeddingFile(folder / name, {"model": "m"}, share)
            elif name == "pictures":
                output = Pictures(folder / name, paths, {"model": "m"}, share)
            else:
                output = open_output(folder / name, kind, paths, {"model": "m"}, share)
            for file in files[rank::world_size]:
                output.write(file)
            output.close(paths)

    return write


def _store(folder: Path) -> None:
    rows = pd.DataFrame({"filename": ["a.wav"], "start": [0.0], "end": [1.0], "n_reference": [16000]})
    write_json(folder / "meta.json", {})
    arrays = {name: np.zeros((1, 4) if name == "embedding" else 1) for name in EmbeddingStore.types}
    EmbeddingStore.write(folder, 1, 0, rows, **arrays)


def _pack(folder: Path) -> None:
    sounds = [str(folder / "sounds" / name) for name in NAMES]
    options = {"size_per_file": 2, "n_workers": 0, "progress": False}
    pack(pd.DataFrame({"filename": sounds}), folder / "list.tsv", folder / "pack", "mine", **options)


def _run(folder: Path) -> None:
    run = RunFolder(folder / "run")
    config = TrainConfig(model="ced_tiny", train_data="a.tsv")
    run.make(config, ["Bell"], {})
    states = States(folder / "run" / "states")
    states.save(1, {"step": 1})
    run.finish({})
    states.clear()


def _pico() -> torch.nn.Module:
    return create_model("audiotransformer_pico", num_classes=2, labels=["Bell", "Rain"]).eval()


WRITERS: dict[str, Callable[[Path], None]] = {
    "csv": _tag("tags.csv"),
    "csv of two": _tag("tags.csv", world_size=2),
    "jsonl of two": _tag("tags.jsonl", world_size=2),
    "parquet": _tag("tags.parquet"),
    "label tracks": _tag("tracks", "audacity"),
    "pictures of two": _tag("pictures", world_size=2),
    "embeddings of two": _tag("embeddings.h5", world_size=2),
    "store": _store,
    "pack": _pack,
    "run": _run,
    "head": lambda folder: save_head(folder / "heads" / "mine.pt", Head(4, 2)),
    "hugging face": lambda folder: export(_pico(), folder / "hf", overwrite=True),
}


def _die_at(moment: int) -> None:
    rename, counter = os.replace, SimpleNamespace(value=0)

    def counted(source: Path, target: Path) -> None:
        for is_after in (False, True):
            if counter.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            counter.value += 1
            if not is_after:
                rename(source, target)

    os.replace = counted


class _FailingDisk:
    """The module `os`, of which the call `moment` to the disk fails."""

    CALLS = ("open", "pwrite", "ftruncate", "fsync", "close", "replace")
    NEED_SPACE = ("open", "pwrite", "replace")

    def __init__(self, moment: int, error: int) -> None:
        self.remaining, self.error = moment, error

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        return partial(self._call, name, call) if name in self.CALLS else call

    def _call(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.remaining -= 1
        if self.remaining == -1 or (self.remaining < -1 and self.error == errno.ENOSPC and name in self.NEED_SPACE):
            if name == "close":
                call(*args)  # a descriptor is closed even so
            raise OSError(self.error, os.strerror(self.error))
        return call(*args)


def perform(writer: str, folder: Path, moment: int, error: str | None = None) -> str:
    """Do a task in a child; return how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with open(reading) as pipe:
            message = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{writer} failed with status {status}")
        return message if status == 0 else "killed"
    status = 70
    message = "done"
    try:
        torch.set_num_threads(1)
        (folder / "sounds" / "b").mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(NAMES):
            tone = np.sin(np.arange(4000) * (number + 1) / 10)
            soundfile.write(folder / "sounds" / name, tone, 16000)
        if error is None:
            _die_at(moment)
        else:
            common.files.os = _FailingDisk(moment, getattr(errno, error))  # type: ignore[attr-defined]
        try:
            WRITERS[writer](folder)
        except UserError as fault:
            message = str(fault)
        os.write(writing, message.encode())
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        task = json.loads(line)
        folder = Path(task["folder"])
        end = perform(task["writer"], folder, task["moment"], task.get("error"))
        paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
        print(json.dumps([end, {str(path.relative_to(folder)): sha256(path) for path in paths}]), flush=True)
