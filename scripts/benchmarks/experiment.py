"""Experiments of several trainings and probes on ESC-10 and spoken words, each of which is done once.

The lists, a fold of ESC-10 for each seed, are those of docs/results.md.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from common.errors import UserError, some
from common.files import write_json
from common.options import Options
from common.parsing import load_json
from probing.probe import probe
from training.prepare import prepare_run

logger = logging.getLogger(__name__)

TASKS = ("esc", "words")


class ExperimentOptions(Options):
    """The options that every experiment has."""

    lists: str = "data/esc10_words/labels"  # folder of unlabelledK.tsv, esc_trainK.tsv and so on
    seeds: int = Field(3, ge=1)
    only: list[int] = Field([])  # seeds to run; none are named = all
    output: str  # folder for everything


class Experiment:
    """The runs of an experiment; each leaves a file, whose existence is what makes it finished.

    Args:
        options: of the experiment.
        free: names of further options that do not change results.

    Raises:
        UserError: the folder has runs with other options.
    """

    def __init__(self, options: ExperimentOptions, free: Collection[str] = ()) -> None:
        self.lists, self.folder = Path(options.lists), Path(options.output)
        path = self.folder / "options.json"
        own = options.model_dump(mode="json", exclude={"output", "seeds", "only", *free})
        before = load_json(path) if path.exists() else own
        if differing := [name for name in own if before.get(name) != own[name]]:
            raise UserError(f"{self.folder} has runs with other options ({some(differing)}): give another --output")
        write_json(path, own)

    def get_list(self, name: str) -> str:
        """Return the path of a list."""
        return str(self.lists / f"{name}.tsv")

    def get_lists(self, task: str, seed: int) -> dict[str, str]:
        """Return the lists of a task: `train`, `test` and, of the words, `val` → TSV."""
        names = {"train": f"esc_train{seed}", "test": f"esc_test{seed}"}
        if task == "words":
            names = {part: f"words_{part}" for part in ("train", "val", "test")}
        return {part: self.get_list(name) for part, name in names.items()}

    def find_record(self, kind: str, name: str, seed: int) -> Path:
        """Return the path of the file of a run."""
        return self.folder / kind / f"{name}_s{seed}.json"

    def train(self, kind: str, name: str, seed: int, config: str, settings: dict[str, Any]) -> str:
        """Train a network unless that is done; return the path of its weights.

        Args:
            kind: folder of the run's file.
            name: of the file and the run.
            seed: of the run.
            config: file of the configuration.
            settings: key → value in place of those of the file.
        """
        record = self.find_record(kind, name, seed)
        if not record.exists():
            torch.manual_seed(seed)
            given = {"outputpath": str(self.folder / "runs" / kind / name)} | settings
            result = prepare_run(config, given, seed).fit()
            write_json(record, {"weights": result["weights"], "accuracy": result.get("top1")})
            logger.warning("%s %s, seed %s, is trained: %s", kind, name, seed, load_json(record))
        return str(load_json(record)["weights"])

    def probe(self, name: str, seed: int, settings: dict[str, Any]) -> None:
        """Train and test a head for each task, unless that is done: heads/NAME_TASK_sSEED.json.

        Args:
            name: of the head.
            seed: of the head, and of the lists.
            settings: options of `run.py probe`: the model and its weights, and others.
        """
        for task in TASKS:
            head, lists = f"{name}_{task}_s{seed}", self.get_lists(task, seed)
            if (self.folder / "heads" / f"{head}.pt").exists():
                continue
            given = {"train_data": lists["train"], "valid_data": lists.get("val"), "test_data": lists["test"]}
            given |= {"outputpath": str(self.folder / "heads"), "cache": str(self.folder / "embeddings")}
            report = probe(given | {"num_workers": 0, "baseline": False, "name": head} | settings, seed)
            logger.warning("%s:\n%s", head, report)
