"""Folders of runs: settings, log, states, results and checkpoints; and the choice of the run to resume."""

import json
import logging
import os
import shutil
import sys
import time
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import BaseModel
from tqdm import tqdm

from audio.labels import format_label_table
from common.errors import UserError, some
from common.files import remove_dead_partials, reserve_partial, sha256, write_json, write_text
from common.locks import POLL_SECONDS, try_lock
from common.parsing import read_record
from training.automatic import Choice
from training.config import TrainConfig
from training.states import States

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
SOUNDS = "train_sounds_sha256"  # in the identity of a run; runs of earlier versions lack it
_TIME = "%Y-%m-%d_%H-%M-%S"
LOCK_SECONDS = 10.0  # to wait for a process that has locked a run
# Keys that may change when a run is resumed, since they have no effect on the weights.
FREE_KEYS = (
    "num_workers",
    "verify",
    "device",
    "outputpath",
    "logfile",
    "debug",
    "checkpoint_every",
    "checkpoint_on_stop",
    "rank_timeout",
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
        self._lock: IO[bytes] | None = None

    def lock(self, seconds: float | None = None) -> bool:
        """Lock the folder, which is created if it is missing, until `unlock` or the end of the process.

        Args:
            seconds: to wait for another process that has locked it; None for `LOCK_SECONDS`.

        Returns:
            False if another process keeps it locked.
        """
        deadline = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
        while (lock := try_lock(self.path / ".lock")) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        self._lock = lock
        for folder in (self.path, self.path / "states"):
            remove_dead_partials(folder)
        return True

    def unlock(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.path / FINISHED).is_file()

    def differences(self, identity: dict[str, Any]) -> list[str]:
        """Return the keys in which the identity of the run differs from `identity`."""
        stored = _read_run(self.path).identity
        expected = {SOUNDS: identity.get(SOUNDS)} | stored
        return [key for key in dict.fromkeys([*stored, *identity]) if expected.get(key) != identity.get(key)]

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
        write_text(self.path / "class_labels_indices.csv", format_label_table(labels))
        automatic = {key: {"value": choice.value, "reason": choice.reason} for key, choice in (chosen or {}).items()}
        write_json(self.path / "run.json", {"identity": identity, "given": given, "automatic": automatic})

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and update two links to this folder: MODEL/latest, and `latest` beside MODEL."""
        write_json(self.path / FINISHED, result)
        self.complete()

    def complete(self) -> None:
        """Do what remains once the result is written: update the links, and remove the states last."""
        run, parent = self.path.name, self.path.parent
        for link, target in ((parent / "latest", run), (parent.parent / "latest", f"{parent.name}/{run}")):
            try:
                with reserve_partial(link) as partial:
                    partial.symlink_to(target)
                    os.replace(partial, link)
            except OSError as error:  # a file system without links, for example
                logger.warning("%s cannot be made a link to %s: %s", link, target, error.strerror)
        States(self.path / "states").clear()


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
    _clean_up(parent)
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
        elif folder.finished:  # by the process that had locked it
            logger.info("%s is the same run, and has just finished", path)
        else:
            return folder, None, True
    return RunFolder(parent / _name_run(parent)), None, False


def _name_run(parent: Path) -> str:
    """Return a name that sorts behind those of all runs so far, also if the clock was set back."""
    second = max([datetime.now().replace(microsecond=0), *map(_read_time, parent.glob("*/"))])
    return f"{second:{_TIME}}_{uuid.uuid4().hex[:8]}"


def _read_time(run: Path) -> datetime:
    """Return the second after the one that a run's folder is named after."""
    with suppress(ValueError):
        return datetime.strptime(run.name.rpartition("_")[0], _TIME) + timedelta(seconds=1)
    return datetime.min


def _clean_up(parent: Path) -> None:
    """Complete what killed processes have left: runs with a result and states, and folders that are not yet runs."""
    folders = [path for path in sorted(parent.glob("*/")) if not path.is_symlink() and (path / ".lock").exists()]
    finished = [path for path in folders if (path / FINISHED).is_file()]
    for path in folders:
        is_run = (path / "run.json").is_file()
        is_complete = is_run and not (path in finished and (path / "states").is_dir())
        folder = RunFolder(path)
        if is_complete or not os.access(path / ".lock", os.W_OK) or not folder.lock(0):
            continue  # .lock of another user's run may not be writable
        if is_run and path == finished[-1]:
            folder.complete()
        elif is_run:
            States(path / "states").clear()
        elif set(os.listdir(path)) <= {".lock", "config.yaml", "class_labels_indices.csv"}:
            shutil.rmtree(path)
        folder.unlock()


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
    if folder.finished:
        raise UserError(f"--resume {given}: that run has just finished; its weights are in {path}")
    return folder, state, True


class _TqdmHandler(logging.StreamHandler):
    """Writes log lines to the terminal above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """Writes log lines to a file; on a full disk they are lost, and what must not be lost raises."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name in `logging`
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def log_to(path: Path | None, *, debug: bool = False, quiet: bool = False) -> None:
    """Log to the terminal, and to a file if `path` is given; with `quiet` only warnings."""
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if path is not None:
        handlers.append(_LogFile(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # verbose at debug level
    level = logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, handlers=handlers, format="%(message)s", force=True)
