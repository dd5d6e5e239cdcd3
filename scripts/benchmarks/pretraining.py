"""Run the experiment of pre-training without labels: what embeddings are worth, and what a start is worth.

    python scripts/benchmarks/pretraining.py --weights mn04_as_mAP_432.pt
    python scripts/benchmarks/pretraining.py --weights mn04_as_mAP_432.pt --only 2    (another seed in another process)

For each seed k a network is pre-trained with each objective for the same time on the sounds of ESC-10 without fold k
and of the spoken words' training part, without their labels. Then, for both sets: heads on the frozen networks, on a
network that is not trained and on a published one, beside log-mel statistics; the network fine-tuned from each start,
and distilled from a ResNet-10, which is trained on the same labels, from each start. All trainings of one kind have the
same time. What is finished is not run again. Tables are printed and written to OUTPUT/tables. The
lists are those of docs/results.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import os
from typing import Any

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from pydantic import Field

from audio.dataset import Pack
from common.errors import UserError, some
from common.files import write_json
from common.options import parse_arguments
from common.parsing import load_json
from probing.comparison import Row, write_comparison
from probing.data import collect_classes
from scripts.benchmarks.experiment import TASKS, Experiment, ExperimentOptions
from training.baseline_features import compute_features
from training.baseline_variants import REGRESSION, Variant, class_scores

logger = logging.getLogger(__name__)

RANDOM = "random"
CONFIGS = {"mae": "mae_own", "matpac": "matpac_own", "matpac++": "matpac_plus_own", "eat": "eat_own"}
# name in tables → kind of head and layers
HEADS = {"linear": ("linear", "last"), "linear, all layers": ("linear", "all"), "prototypes": ("prototypes", "last")}
MOST_SECONDS = 60.0  # of a clip, for log-mel statistics


class PretrainingOptions(ExperimentOptions):
    """The options of pretraining.py."""

    model: str = "audiotransformer_pico"
    model_args: dict[str, Any] = Field({"pooling": "logit"})  # in every training
    objectives: list[str] = Field(list(CONFIGS))
    budget: str = "10m"  # of each pre-training
    tune_budget: str = "3m"  # of each fine-tuning and distillation, and of the teacher; 0 = none
    published: str | None = "mn04_as"  # a network to compare embeddings with; null = none
    weights: str | None = None  # its weights; null = downloaded
    output: str = "experiments/pretraining"  # folder for everything


class Pretraining(Experiment):
    """The runs of the experiment.

    Args:
        options: see `PretrainingOptions`.

    Raises:
        UserError: the folder has runs with other options, or an objective is unknown.
    """

    def __init__(self, options: PretrainingOptions) -> None:
        if unknown := [name for name in options.objectives if name not in CONFIGS]:
            raise UserError(f"--objectives: {some(unknown)}; expected {some(CONFIGS)}")
        super().__init__(options, free={"objectives", "weights"})
        self.options = options
        self.starts = [RANDOM, *options.objectives]

    def pre_train(self, start: str, seed: int) -> str:
        """Return the weights of a start: pre-trained, or random ones with the same statistics of the input."""
        options = self.options
        settings: dict[str, Any] = {"model": options.model, "model_args": options.model_args, "budget": options.budget}
        settings["train_data"] = self.get_list(f"unlabelled{seed}")
        if start == RANDOM:
            settings |= {"epochs": 1, "epoch_length": 1, "warmup_epochs": None, "optimizer_args.lr": 0.0}
            del settings["budget"]
        return self._train("starts", start, seed, CONFIGS.get(start, "mae_own"), settings)

    def _train(self, kind: str, name: str, seed: int, config: str, settings: dict[str, Any]) -> str:
        shared = {"num_workers": 0, "baseline": False}
        return self.train(kind, name, seed, f"trainconfig/{config}.yaml", shared | settings)

    def probe_heads(self, name: str, seed: int, model: str, weights: str | None = None) -> None:
        """Train and test heads of each kind on a network."""
        for head, layers in HEADS.values():
            settings = {"model": model, "weights": weights, "head": head, "layers": layers}
            self.probe(f"{name}_{head}_{layers}", seed, settings)

    def measure_statistics(self, seed: int) -> None:
        """Train and test a logistic regression on log-mel statistics of whole clips, unless that is done."""
        for task in TASKS:
            record = self.find_record("statistics", task, seed)
            if record.exists():
                continue
            lists = self.get_lists(task, seed)
            packs = [Pack.open(lists[part], required=("filename", "labels")) for part in ("train", "test")]
            cells = [pack.table["labels"].astype(str).tolist() for pack in packs]
            classes = collect_classes(cells[0])
            train, test = (np.array([classes.index(cell) for cell in part]) for part in cells)
            features = [compute_features(pack, MOST_SECONDS)["log-mel", 1] for pack in packs]
            variant = Variant("log-mel", 1, REGRESSION)
            scores = class_scores(variant, features[0], np.eye(len(classes))[train], features[1], single=True)
            write_json(record, {"accuracy": float((scores.argmax(1) == test).mean())})

    def tune(self, seed: int) -> None:
        """Fine-tune and distil the network from each start, unless that is done."""
        options = self.options
        for task in TASKS:
            lists = self.get_lists(task, seed)
            shared: dict[str, Any] = {"train_data": lists["train"], "eval_data": lists["test"], "select_on": "valid"}
            shared |= {"valid_data": lists["val"]} if "val" in lists else {"valid_data": None, "valid_fraction": 0.15}
            shared["budget"] = options.tune_budget
            teacher = self._train("teachers", f"teacher_{task}", seed, "own_teacher", shared)
            for start in self.starts:
                weights = self.pre_train(start, seed)
                given = shared | {"model": options.model, "model_args": options.model_args, "pretrained": weights}
                given["optimizer_args"] = {"lr": 0.001, "weight_decay": 0.05}
                self._train("tuned", f"{start}_{task}", seed, "own_teacher", given)
                online = given | {"teacher": teacher, "logitspath": None}
                self._train("distilled", f"{start}_{task}", seed, "own_student", online)

    def run_seed(self, seed: int) -> None:
        """Run everything that is missing of a seed."""
        self.measure_statistics(seed)
        for start in self.starts:
            self.probe_heads(start, seed, self.pre_train(start, seed))
        if self.options.published:
            self.probe_heads("published", seed, self.options.published, self.options.weights)
        if self.options.tune_budget != "0":
            self.tune(seed)

    def _collect(self, kind: str, name: str, pattern: str) -> Row:
        """Return the accuracies of the seeds that are finished, in percent."""
        values = {}
        for task in TASKS:
            paths = [self.find_record(kind, pattern.format(task=task), s) for s in range(1, self.options.seeds + 1)]
            found = [load_json(path) for path in paths if path.exists()]
            values[task] = [100 * float(each.get("value", each.get("accuracy"))) for each in found]
        return Row(name, values)

    def compare(self) -> str:
        """Write the tables, and return them."""
        named = [*self.starts, *(["published"] if self.options.published else [])]
        probes = [
            self._collect("heads", f"{name}, {kind}", f"{name}_{head}_{layers}_{{task}}")
            for name in named
            for kind, (head, layers) in HEADS.items()
        ]
        tables = {"probes": [*probes, self._collect("statistics", "log-mel statistics", "{task}")]}
        for kind in ("tuned", "distilled") if self.options.tune_budget != "0" else ():
            rows = [self._collect(kind, f"{kind} from {start}", f"{start}_{{task}}") for start in self.starts]
            tables[kind] = [*rows, self._collect("teachers", "ResNet-10 on labels", "teacher_{task}")]
        return "\n\n".join(write_comparison(self.folder / "tables" / kind, rows) for kind, rows in tables.items())


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and print and write the tables."""
    options = parse_arguments(PretrainingOptions, __doc__, arguments)
    torch.set_num_threads(1)
    experiment = Pretraining(options)
    for seed in options.only or range(1, options.seeds + 1):
        experiment.run_seed(seed)
    print(f"{experiment.compare()}\n\nwritten: {experiment.folder}/tables")


if __name__ == "__main__":
    main()
