"""The folder of a run: what it was given, its log, states, results and checkpoints, and which one to go on with."""

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
from tqdm import tqdm

from common.errors import UserError, some
from common.files import remove_dead_partials, reserve_partial, sha256, write_json, write_text
from training.automatic import Choice
from training.config import TrainConfig

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
CLAIM_SECONDS = 10.0  # how long to wait for a process that holds a run
# What may differ when a run goes on: none of it changes what is learnt.
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
    """One run on disk, held by one process at a time.

    `config.yaml` and `class_labels_indices.csv` say what it was given, `run.json` (written last, so that a folder with
    it is complete) what it must be given again to go on, `finished.json` what came out.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def claim(self) -> bool:
        """Hold the folder until the process ends; False where another process holds it for longer than a moment."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - open as long as the folder is held
        deadline = time.monotonic() + CLAIM_SECONDS  # one that is being killed may take a moment
        while True:
            try:
                # Not flock, which loader workers inherit and hold on to for seconds after the trainer was killed.
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
        """Whether the run went to its end."""
        return (self.path / FINISHED).is_file()

    def differences(self, identity: dict[str, Any]) -> list[str]:
        """Return the names of what the run was given otherwise than `identity` says."""
        there = json.loads((self.path / "run.json").read_text(encoding="utf-8"))["identity"]
        return [key for key in dict.fromkeys([*there, *identity]) if there.get(key) != identity.get(key)]

    def make(
        self,
        config: TrainConfig,
        labels: list[str],
        identity: dict[str, Any],
        given: dict[str, Any] | None = None,
        chosen: dict[str, Choice] | None = None,
    ) -> None:
        """Make the folder, claim it, and write into it what the run was given.

        Args:
            config: with what was chosen automatically.
            labels: the class names.
            identity: see `run_identity`.
            given: the settings before that choice.
            chosen: what it was, and why.
        """
        if not self.claim():
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
        """Write what came out, and lead two links here: MODEL/latest, and `latest` beside the folders of models."""
        write_json(self.path / FINISHED, result)
        run, of_model = self.path.name, self.path.parent
        for link, goal in ((of_model / "latest", run), (of_model.parent / "latest", f"{of_model.name}/{run}")):
            with reserve_partial(link) as fresh:
                fresh.symlink_to(goal)
                os.replace(fresh, link)


def run_identity(config: TrainConfig, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides what a run learns, as plain JSON values: configuration, seed, and facts of its data."""
    settings = {key: value for key, value in config.model_dump().items() if key not in FREE_KEYS}
    identity: dict[str, Any] = json.loads(json.dumps(settings | {"seed": seed} | data))
    return identity


def recall_choices(parent: Path, given: dict[str, Any], seed: int, resume: str) -> dict[str, Choice] | None:
    """Return what an unfinished run chose automatically that had the same settings, clips, soft targets and seed.

    Args:
        parent: OUTPUTPATH/CONFIG_STEM, where the runs of a configuration are, a folder a model.
        given: settings before any choice.
        seed: of the run.
        resume: as of `choose_folder`.

    Returns:
        Key → choice, or None where there is no such run: the newest, if there are several.
    """
    if resume == "never":
        return None
    named = Path(resume).parent.parent if Path(resume).is_file() else Path(resume)
    folders = sorted(parent.glob("*/*/"), key=lambda folder: folder.name) if resume == "auto" else [named]
    for folder in reversed(folders):
        if folder.is_symlink() or not (folder / "run.json").is_file() or (folder / FINISHED).is_file():
            continue
        there = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not there.get("automatic"):
            continue
        was, now = ({k: v for k, v in of.items() if k not in FREE_KEYS} for of in (there["given"], given))
        train_data, store = Path(str(given.get("train_data"))), Path(str(given.get("logitspath") or "")) / "meta.json"
        unchanged = train_data.is_file() and sha256(train_data) == there["identity"].get("train_data_sha256")
        targets = sha256(store) if given.get("logitspath") and store.is_file() else None
        unchanged = unchanged and targets == there["identity"].get("soft_targets_sha256")
        if json.loads(json.dumps(now)) == was and there["identity"].get("seed") == seed and unchanged:
            return {key: Choice(entry["value"], entry["reason"]) for key, entry in there["automatic"].items()}
    return None


def choose_folder(parent: Path, identity: dict[str, Any], resume: str) -> tuple[RunFolder, Path | None, bool]:
    """Find the run to go on with, or name a new one; never in silence.

    Args:
        parent: OUTPUTPATH/CONFIG_STEM/MODEL, where the runs of a configuration are.
        identity: of the run that is asked for, see `run_identity`.
        resume: `auto` goes on with the newest unfinished run that has this identity, where there is one; `never` begins
            a new one; anything else is the path of a run's folder, or of one of its states, to go on with.

    Returns:
        The folder, claimed where it exists; the state asked for, or None for the newest; whether the run is there
        already.

    Raises:
        UserError: the run is in use; a path that is no run, is finished, or was given something else.
    """
    if resume not in ("auto", "never"):
        return _asked_for(Path(resume), identity)
    for path in sorted((found.parent for found in parent.glob("*/run.json")), reverse=True) if resume == "auto" else []:
        folder = RunFolder(path)
        if path.is_symlink() or folder.finished:
            continue
        different = folder.differences(identity)
        if different:
            logger.warning(
                "%s is unfinished and stays so: it was given another %s. To finish it, give it the same again",
                path,
                some(different),
            )
        elif not folder.claim():
            raise UserError(
                f"{path} is this very run, and another process is training it; --resume never begins one beside it"
            )
        else:
            return folder, None, True
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:8]}"
    return RunFolder(parent / name), None, False


def _asked_for(given: Path, identity: dict[str, Any]) -> tuple[RunFolder, Path | None, bool]:
    path, state = (given.parent.parent, given) if given.is_file() else (given, None)
    path = path.resolve()
    folder = RunFolder(path)
    if not (path / "run.json").is_file():
        raise UserError(f"--resume {given}: no run.json there; wanted auto, never, a run's folder or one of its states")
    if folder.finished:
        raise UserError(f"--resume {given}: that run is finished; its weights are in {path}")
    different = folder.differences(identity)
    if different:
        raise UserError(
            f"--resume {given}: that run was given another {some(different)}; give it the same again "
            f"({path}/config.yaml has it), or leave --resume out to begin a new run"
        )
    if not folder.claim():
        raise UserError(f"--resume {given}: another process is training it")
    return folder, state, True


class _AboveBars(logging.StreamHandler):
    """Writes to the terminal without breaking a progress bar that is being drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to(path: Path | None, *, debug: bool = False, quiet: bool = False) -> None:
    """Send log lines to the terminal, and to a file where one is given; `quiet` lets only warnings through."""
    handlers: list[logging.Handler] = [_AboveBars()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # talks a lot under debug
    level = logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, handlers=handlers, format="%(message)s", force=True)
