"""Run the experiment of two teachers in one embedder: a student of both against a student of each.

    python scripts/benchmarks/two_teachers.py --weights mn04_as_mAP_432.pt
    python scripts/benchmarks/two_teachers.py --weights mn04_as_mAP_432.pt --only 2    (another seed in another process)

Teachers are a published network (`mn04_as`) and a network that is trained here on the labels of the training part of
the spoken words. For each seed k, students are distilled from the embeddings of the first, of the second, and of both,
on the words' training part and on ESC-10 without fold k; then `run.py probe` trains a linear head on each frozen
student, and on each teacher, for each of the two sets. What is finished is not run again; start another process once
the network on the words is trained, which all seeds share. The table is printed and
written to OUTPUT/compared/probes.md, probes.csv and probes.png. The lists are those of docs/results.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import os
from typing import Any

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pydantic import Field

from common.options import parse_arguments
from scripts import compare_probes
from scripts.benchmarks.experiment import TASKS, Experiment, ExperimentOptions
from training.prepare_store import prepare_store


class TwoTeachersOptions(ExperimentOptions):
    """The options of two_teachers.py."""

    first: str = "mn04_as"  # the first teacher
    weights: str | None = None  # its weights; null = downloaded
    second: str | None = None  # the second teacher, a run or checkpoint; null = trained here on the words
    teacher: str = "trainconfig/own_teacher.yaml"  # configuration of the one that is trained here
    teacher_epochs: int = Field(15, ge=1)  # of that
    student: str = "trainconfig/ssondo_esc10_words.yaml"  # configuration of the students
    targets: str = "logitconfig/ssondo_esc10_words.yaml"  # configuration of the stored embeddings
    objective: str | None = None  # of the students, in place of that of their configuration
    teacher_weights: list[float] = Field([1, 1])  # of the two losses
    epochs: int | None = Field(None, ge=1)  # of the students, likewise
    output: str = "experiments/two_teachers"  # folder for everything


class TwoTeachers(Experiment):
    """The runs of the experiment.

    Args:
        options: see `TwoTeachersOptions`.

    Raises:
        UserError: the folder has runs with other options.
    """

    def __init__(self, options: TwoTeachersOptions) -> None:
        super().__init__(options)
        self.options = options

    def run_seed(self, seed: int) -> None:
        """Run everything that is missing of a seed; the second teacher only once."""
        options, unlabelled = self.options, self.get_list(f"unlabelled{seed}")
        parts = {"train_data": "train", "valid_data": "val", "eval_data": "test"}
        words: dict[str, Any] = {key: self.get_list(f"words_{part}") for key, part in parts.items()}
        words["epochs"] = options.teacher_epochs
        second = options.second or self.train("models", "second", 1, options.teacher, words)
        stores = {}
        for name, model, weights in (("first", options.first, options.weights), ("second", second, None)):
            given = {"train_data": unlabelled, "model": model, "weights": weights, "name": name}
            given["outputpath"] = str(self.folder / "stores")
            stores[name] = str(prepare_store(options.targets, given).save())  # what exists is not computed again
            self.probe(f"teacher_{name}", seed, {"model": model, "weights": weights, "chunk_length": 1.0})
        changes = {key: getattr(options, key) for key in ("objective", "epochs") if getattr(options, key)}
        for name, given_stores in {**stores, "both": list(stores.values())}.items():
            settings: dict[str, Any] = changes | {"train_data": unlabelled, "embeddingspath": given_stores}
            if name == "both":
                settings["objective_args.weights"] = options.teacher_weights
            student = self.train("models", name, seed, options.student, settings)
            self.probe(f"student_{name}", seed, {"model": student, "chunk_length": 1.0})

    def compare(self) -> None:
        """Print and write the table of all probes."""
        heads = self.folder / "heads"
        rows = [f"{kind} of {name}" if kind == "student" else f"{name} teacher" for kind, name in ROWS]
        patterns = [f"{heads}/{kind}_{name}_{{task}}_s*.json" for kind, name in ROWS]
        named = ",".join(f"{row}={pattern}" for row, pattern in zip(rows, patterns, strict=True))
        compare_probes.main(["--tasks", ",".join(TASKS), "--rows", named, "--output", str(self.folder / "compared")])


ROWS = [("teacher", "first"), ("teacher", "second"), ("student", "first"), ("student", "second"), ("student", "both")]


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and print and write the table."""
    options = parse_arguments(TwoTeachersOptions, __doc__, arguments)
    torch.set_num_threads(1)
    experiment = TwoTeachers(options)
    for seed in options.only or range(1, options.seeds + 1):
        experiment.run_seed(seed)
    experiment.compare()


if __name__ == "__main__":
    main()
