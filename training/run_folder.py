"""Folders of runs: settings, log, states, results and checkpoints; and the choice of the run to resume."""

import csv
import fcntl
import io
import json
import logging
import os
import sys
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import BaseModel
from tqdm import tqdm

from common.errors import UserError, some
from common.files import remove_dead_partials, reserve_partial, sha256, write_json, write_text
from common.parsing import read_record
from training.automatic import Choice
from training.config import TrainConfig

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
LOCK_SECONDS = 10.0  # to wait for a process that has locked a run
# Keys that may change when a run is resumed, since they have no effect on the weights.
FREE_KEYS = (
    "num_workers",
    "device",
    "outputpath",
    "logfile",
    "debug",
    "checkpoint_every",
    "log_every",
    "compile",
    "baseline",
    "check_sounds",
)


class RunFolder:
    """The folder of one run, locked by one process at a time.

    It has `config.yaml`, `class_labels_indices.csv`, `run.json` with the identity of the run (written last, so that a
    folder with it is complete), and `finished.json` with the result.

    Args:
        path: path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def lock(self) -> bool:
        """Lock the folder until the process ends; return False if another process keeps it locked."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - open as long as the folder is locked
        deadline = time.monotonic() + LOCK_SECONDS  # a process that is being killed takes a moment
        while True:
            try:
                # Not flock: loader workers inherit it and keep it for seconds after the trainer was killed.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    lock.close()
                    return False
                time.sleep(0.1)
        self._lock = lock
        for folder in (self.path, self.path / "states"):
            remove_dead_partials(folder)
        return True

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.path / FINISHED).is_file()

    def differences(self, identity: dict[str, Any]) -> list[str]:
        """Return the keys in which the identity of the run differs from `identity`."""
        stored = _read_run(self.path).identity
        return [key for key in dict.fromkeys([*stored, *identity]) if stored.get(key) != identity.get(key)]

    def make(
        self,
        config: TrainConfig,
        labels: list[str],
        identity: dict[str, Any],
        given: dict[str, Any] | None = None,
        chosen: dict[str, Choice] | None = None,
    ) -> None:
        """Create and lock the folder, and write the settings of the run.

        Args:
            config: the configuration, with automatic choices.
            labels: the class names.
            identity: see `run_identity`.
            given: the settings before these choices.
            chosen: the choices and their reasons.
        """
        if not self.lock():
            raise UserError(f"{self.path} is in use by another process; start again")
        write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
        table = io.StringIO()
        table.write("index,mid,display_name\n")
        writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerows([index, "", label] for index, label in enumerate(labels))
        write_text(self.path / "class_labels_indices.csv", table.getvalue())
        automatic = {key: {"value": choice.value, "reason": choice.reason} for key, choice in (chosen or {}).items()}
        write_json(self.path / "run.json", {"identity": identity, "given": given, "automatic": automatic})

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and update two links to this folder: MODEL/latest, and `latest` beside MODEL."""
        write_json(self.path / FINISHED, result)
        run, parent = self.path.name, self.path.parent
        for link, target in ((parent / "latest", run), (parent.parent / "latest", f"{parent.name}/{run}")):
            with reserve_partial(link) as partial:
                partial.symlink_to(target)
                os.replace(partial, link)


def run_identity(config: TrainConfig, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Return what the weights of a run depend on, as JSON values: configuration, seed, and facts of the data."""
    settings = {key: value for key, value in config.model_dump().items() if key not in FREE_KEYS}
    identity: dict[str, Any] = json.loads(json.dumps(settings | {"seed": seed} | data))
    return identity


class _Run(BaseModel):
    """What run.json holds; versions before automatic choices lack these."""

    identity: dict[str, Any]
    given: dict[str, Any] | None = None
    automatic: dict[str, Choice] = {}


def _read_run(folder: Path) -> _Run:
    return read_record(folder / "run.json", _Run, "restore it, or start a new run with --resume never")


def recall_choices(parent: Path, given: dict[str, Any], seed: int, resume: str) -> dict[str, Choice] | None:
    """Return the automatic choices of an unfinished run with the same settings, clips, soft targets and seed.

    Args:
        parent: OUTPUTPATH/CONFIG_STEM, the folder of the runs of a configuration, with a subfolder a model.
        given: the settings before any choice.
        seed: of the run.
        resume: see `choose_folder`.

    Returns:
        Key → choice, of the newest such run; None if there is none.
    """
    if resume == "never":
        return None
    train_data, store = Path(str(given.get("train_data"))), Path(str(given.get("logitspath") or "")) / "meta.json"
    expected = {
        "seed": seed,
        "train_data_sha256": sha256(train_data) if train_data.is_file() else "",
        "soft_targets_sha256": sha256(store) if given.get("logitspath") and store.is_file() else None,
    }
    folder = Path(resume).parent.parent if Path(resume).is_file() else Path(resume)
    folders = sorted(parent.glob("*/*/"), key=lambda folder: folder.name) if resume == "auto" else [folder]
    for folder in reversed(folders):
        if folder.is_symlink() or not (folder / "run.json").is_file() or (folder / FINISHED).is_file():
            continue
        try:
            stored = _read_run(folder)
        except UserError as error:
            if resume != "auto":
                raise
            logger.warning("%s", error)
            continue
        if not stored.automatic or any(stored.identity.get(key) != value for key, value in expected.items()):
            continue
        former, current = ({k: v for k, v in s.items() if k not in FREE_KEYS} for s in (stored.given or {}, given))
        if json.loads(json.dumps(current)) == former:
            return stored.automatic
    return None


def choose_folder(parent: Path, identity: dict[str, Any], resume: str) -> tuple[RunFolder, Path | None, bool]:
    """Find the run to resume, or the folder of a new one.

    Args:
        parent: OUTPUTPATH/CONFIG_STEM/MODEL, the folder of the runs of a configuration.
        identity: identity of the run, see `run_identity`.
        resume: `auto` resumes the newest unfinished run with this identity, if there is one; `never` starts a new one;
            anything else is the path of the run's folder, or of one of its states, to resume.

    Returns:
        The folder, locked if it exists; the state to resume from, or None for the newest; whether the run exists.

    Raises:
        UserError: the run is in use; the path is not a run, or one that has finished or has another identity.
    """
    if resume not in ("auto", "never"):
        return _open_given(Path(resume), identity)
    for path in sorted((found.parent for found in parent.glob("*/run.json")), reverse=True) if resume == "auto" else []:
        folder = RunFolder(path)
        if path.is_symlink() or folder.finished:
            continue
        try:
            different = folder.differences(identity)
        except UserError as error:  # a run of other settings must not keep this one from starting
            logger.warning("%s", error)
            continue
        if different:
            logger.warning(
                "%s is unfinished and is not resumed: it has another %s. To finish it, give the same settings",
                path,
                some(different),
            )
        elif not folder.lock():
            raise UserError(f"{path} is the same run, and another process is training it; --resume never starts a copy")
        else:
            return folder, None, True
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:8]}"
    return RunFolder(parent / name), None, False


def _open_given(given: Path, identity: dict[str, Any]) -> tuple[RunFolder, Path | None, bool]:
    path, state = (given.parent.parent, given) if given.is_file() else (given, None)
    path = path.resolve()
    folder = RunFolder(path)
    if not (path / "run.json").is_file():
        raise UserError(
            f"--resume {given}: no run.json found; expected auto, never, a run's folder or one of its states"
        )
    if folder.finished:
        raise UserError(f"--resume {given}: that run has finished; its weights are in {path}")
    different = folder.differences(identity)
    if different:
        raise UserError(
            f"--resume {given}: that run has another {some(different)}; give the same settings "
            f"(those of {path}/config.yaml), or drop --resume to start a new run"
        )
    if not folder.lock():
        raise UserError(f"--resume {given}: another process is training it")
    return folder, state, True


class _TqdmHandler(logging.StreamHandler):
    """Writes log lines to the terminal above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to(path: Path | None, *, debug: bool = False, quiet: bool = False) -> None:
    """Log to the terminal, and to a file if `path` is given; with `quiet` only warnings."""
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # verbose at debug level
    level = logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, handlers=handlers, format="%(message)s", force=True)
