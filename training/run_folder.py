"""The folder of a run: configuration, label list, log, results and checkpoints, in one place."""

import csv
import io
import logging
import uuid
from datetime import datetime
from pathlib import Path

import yaml

from common.files import write_text
from training.config import TrainConfig


def run_folder(config: TrainConfig, stem: str) -> Path:
    """Return the path of a new run: OUTPUTPATH/CONFIG_STEM/MODEL/DATE_ID, `stem` being that of the configuration."""
    parent = Path(config.outputpath) / stem / config.model
    return parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:8]}"


def make_run_folder(folder: Path, config: TrainConfig, labels: list[str]) -> None:
    """Make the folder and write into it what the run was given: `config.yaml` and `class_labels_indices.csv`."""
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    table = io.StringIO()
    table.write("index,mid,display_name\n")
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([index, "", label] for index, label in enumerate(labels))
    write_text(folder / "class_labels_indices.csv", table.getvalue())


def link_latest(folder: Path) -> None:
    """Make the link `latest` beside a finished run lead to it."""
    link = folder.parent / "latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)


def log_to(path: Path | None, *, debug: bool = False) -> None:
    """Send log lines to the terminal, and to a file where one is given."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, handlers=handlers, format="%(message)s", force=True
    )
