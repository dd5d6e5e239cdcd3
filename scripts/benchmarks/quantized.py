"""Run the experiment of quantized distillation on the folds of a pack: events against all other clips.

    python scripts/benchmarks/quantized.py --data data/esc10/labels/esc10.tsv --published_weights mn04_as_mAP_432.pt
    python scripts/benchmarks/quantized.py --data PACK.tsv --events siren,"glass breaking" --published null
    python scripts/benchmarks/quantized.py --data PACK.tsv --only 1,2      (other folds in another process)

For each fold k of the list's column `fold`, with all other folds as training data: the baseline, a published teacher
(not trained), a CNN teacher that is trained here, and its soft targets; and for each seed a student on labels alone,
one that is distilled, that one trained on for some epochs, the same with quantized weights (joint), and quantized
without training (after). What is finished is not run again. The areas under the ROC curve and equal error rates of the
pooled folds, with intervals, are printed and written to OUTPUT/quantized.md, quantized.csv and quantized.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import os
from collections.abc import Iterator
from typing import Any

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from pydantic import Field

from audio.audioset import display_name
from audio.dataset import Pack
from audio.labels import split_labels
from common.errors import UserError, some
from common.files import write_bytes, write_json, write_text
from common.options import Options, parse_arguments
from common.parsing import load_json
from models import AudioTagger, load_model
from models.packing import count_bytes, pack_model
from models.quantization import quantized_weights
from scripts.benchmarks.detection import System, describe_systems, draw_systems, pool_folds
from scripts.benchmarks.mixtures import write_mixtures
from training.baseline import fit_baseline
from training.evaluate import predict_pack
from training.figures import render_png
from training.labelled import LabelledPack
from training.precision import Precision
from training.prepare import prepare_run
from training.prepare_store import prepare_store

logger = logging.getLogger(__name__)

OTHER = "other"  # the label of clips without an event


class QuantizedOptions(Options):
    """The options of quantized.py."""

    data: str  # TSV of a pack with the columns `labels` and `fold`
    # labels that are detected; all others become `other`
    events: list[str] = Field(["dog bark", "baby cry", "person sneeze"])
    published: str | None = "mn04_as"  # a teacher that tags AudioSet's classes; null = none
    published_weights: str | None = None  # its weights, which the teacher trained here starts from; null = downloaded
    # AudioSet's class of each event, for `published`
    audioset: list[str] = Field(["/m/0bt9lr", "/t/dd00002", "/m/01hsr_"])
    teacher: str = "trainconfig/quantized_esc10_teacher.yaml"  # configuration of the teacher trained here
    targets: str = "logitconfig/quantized_esc10.yaml"  # configuration of its soft targets
    labels: str = "trainconfig/quantized_esc10_labels.yaml"  # configuration of the student without a teacher
    student: str = "trainconfig/quantized_esc10.yaml"  # configuration of the distilled student
    mixtures: int = Field(1280, ge=1)  # of training clips, which the student is distilled on as well
    control_epochs: int = Field(0, ge=0)  # also train a student on the labels of these mixtures; 0 = do not
    bits: list[int] = Field([8, 4, 3, 2])  # of quantized weights
    joint_epochs: int = Field(2, ge=1)  # epochs of training on, with quantization or without
    joint_lr: float = Field(0.001, gt=0)  # peak learning rate of these
    seeds: int = Field(3, ge=1)
    only: list[int] = Field([])  # folds to run; none are named = all
    output: str = "experiments/quantized"  # folder for everything

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence where AudioSet's classes are not those of the events."""
        if self.published and len(self.audioset) != len(self.events):
            yield (
                f"--audioset has {len(self.audioset)} classes for {len(self.events)} events; give one for each, or "
                "--published null"
            )


class Experiment:
    """The runs of the experiment, each of which leaves a file with the scores of its held-out clips.

    Args:
        options: see `QuantizedOptions`.

    Raises:
        UserError: the list has no folds, lacks an event, or has clips of several labels; the folder has runs with other
            options.
    """

    def __init__(self, options: QuantizedOptions) -> None:
        self.options, self.folder = options, Path(options.output)
        self.pack = Pack.open(options.data, required=("filename", "hdf5path", "labels", "fold"))
        labels = self.pack.table["labels"].astype(str)
        if missing := [event for event in options.events if event not in set(labels)]:
            raise UserError(
                f"{options.data} has no clips of {some(missing)}; its labels are {some(sorted(set(labels)))}"
            )
        if several := [cell for cell in set(labels) if len(split_labels(cell)) > 1]:
            raise UserError(
                f"{options.data} has clips of several labels, such as {several[0]!r}; expected one for each clip"
            )
        self.labels = labels.where(labels.isin(options.events), OTHER)
        self._check_options()
        self.folds = sorted(set(self.pack.table["fold"].tolist()))
        for fold in self.folds:
            for part, rows in (("train", self.pack.table["fold"] != fold), ("test", self.pack.table["fold"] == fold)):
                table = self.pack.table.assign(labels=self.labels)[rows]
                write_text(self._list(part, fold), table.to_csv(sep="\t", index=False))

    @property
    def positive(self) -> np.ndarray:
        """Which clips have which event, bool (N,E)."""
        return np.stack([self.labels == event for event in self.options.events], axis=1)

    def _check_options(self) -> None:
        """Record the options that results depend on, or compare them with those of an earlier start."""
        path, free = self.folder / "options.json", {"only", "seeds", "output", "bits", "control_epochs"}
        own = self.options.model_dump(mode="json", exclude=free)
        before = load_json(path) if path.exists() else own
        if differing := [name for name in own if before.get(name) != own[name]]:
            raise UserError(f"{self.folder} has runs with other options ({some(differing)}): give another --output")
        write_json(path, own)

    def _list(self, part: str, fold: int) -> Path:
        return self.folder / "lists" / f"{part}{fold}.tsv"

    def _record(self, system: str, fold: int, seed: int) -> Path:
        return self.folder / "scores" / system / f"fold{fold}_seed{seed}.json"

    def score(self, system: str, fold: int, seed: int, scores: np.ndarray, **facts: Any) -> None:
        """Write the scores (clips, E) of the held-out clips of a fold."""
        names = Pack.open(str(self._list("test", fold))).names
        write_json(self._record(system, fold, seed), {"clips": names, "scores": scores.tolist()} | facts)
        logger.warning("%s, fold %s, seed %s is finished", system, fold, seed)

    def tag(self, system: str, fold: int, seed: int, model: AudioTagger, classes: list[str], **facts: Any) -> None:
        """Write the probabilities of `classes` of a model."""
        pack = Pack.open(str(self._list("test", fold)))
        scores = predict_pack(
            model, pack, batch_size=32, num_workers=0, precision=Precision("fp32", torch.device("cpu"))
        )
        columns = [model.labels.index(name) for name in classes]
        self.score(system, fold, seed, scores[:, columns], bytes=measure_size(model), **facts)

    def train(self, system: str, fold: int, seed: int, config: str, **overrides: Any) -> str:
        """Train a model unless that is done; return the path of its weights."""
        record = self._record(system, fold, seed)
        if not record.exists():
            torch.manual_seed(seed)
            given: dict[str, Any] = {"train_data": str(self._list("train", fold)), "eval_data": None, "select_on": None}
            given["outputpath"] = str(self.folder / "runs" / f"{system}{fold}")
            result = prepare_run(config, given | overrides, seed).fit()
            model = load_model(result["weights"])
            self.tag(system, fold, seed, model, self.options.events, weights=result["weights"])
        return str(load_json(record)["weights"])

    def run_fold(self, fold: int, seed: int) -> None:
        """Run everything that is missing of a fold and a seed; teachers only with the first seed."""
        options = self.options
        if not self._record("baseline", fold, 1).exists():
            parts = [Pack.open(str(self._list(part, fold))) for part in ("train", "test")]
            classes = [*options.events, OTHER]
            labelled = [
                LabelledPack(pack, [np.array([classes.index(label)]) for label in pack.table["labels"]], len(classes))
                for pack in parts
            ]
            self.score("baseline", fold, 1, fit_baseline(*labelled).scores[:, :-1])
        if options.published and not self._record("published", fold, 1).exists():
            model = load_model(options.published, weights=options.published_weights)
            self.tag("published", fold, 1, model, [display_name(each) for each in options.audioset])
        start = {"pretrained": options.published_weights} if options.published_weights else {}
        teacher = self.train("teacher", fold, 1, options.teacher, **start)
        train, mixed = self._list("train", fold), self._list("mixed", fold)
        if not mixed.exists():
            write_mixtures(Pack.open(str(train)), options.mixtures, fold, mixed, OTHER)
        targets = {"train_data": str(mixed), "model": teacher, "outputpath": str(self.folder / "logits")}
        store = str(prepare_store(options.targets, targets).save())  # what exists is not computed again
        taught = {"train_data": str(mixed), "logitspath": store}
        self.train("alone", fold, seed, options.labels)
        if options.control_epochs:
            control = {"train_data": str(mixed), "epochs": options.control_epochs, "mixup": None}
            self.train("mixtures", fold, seed, options.labels, **control)
        distilled = self.train("distilled", fold, seed, options.student, **taught)
        more = taught | {"pretrained": distilled, "epochs": options.joint_epochs}
        more |= {"optimizer_args.lr": options.joint_lr, "warmup_epochs": 1}
        self.train("continued", fold, seed, options.student, **more)
        for bits in options.bits:
            joint = more | {"model_args.quantize": {"weights": bits}}
            self.train(f"joint{bits}", fold, seed, options.student, **joint)
            if not self._record(f"after{bits}", fold, seed).exists():
                model = load_model(distilled, quantize={"weights": bits})
                self.tag(f"after{bits}", fold, seed, model, options.events)

    def collect(self) -> Iterator[System]:
        """Yield the systems with the pooled scores of the seeds that are finished in all folds."""
        names = ["baseline", "published", "teacher", "alone", "mixtures", "distilled", "continued"]
        names += [f"{kind}{bits}" for kind in ("joint", "after") for bits in self.options.bits]
        for name in names:
            seeds = []
            for seed in range(1, self.options.seeds + 1):
                paths = [self._record(name, fold, seed) for fold in self.folds]
                if all(path.exists() for path in paths):
                    found = [load_json(path) for path in paths]
                    parts = [(each["clips"], np.array(each["scores"])) for each in found]
                    seeds.append(pool_folds(parts, self.pack.names))
            if seeds:
                yield System(name, np.stack(seeds), found[-1].get("bytes"))


def measure_size(model: AudioTagger) -> int:
    """Return the bytes of the weights of a model of `load_model`, packed where it is quantized.

    Without its front-end, and without labels, settings and names.
    """
    if any(quantized_weights(model)):
        return sum(size for part, size in pack_model(model).sizes.items() if part != "description")
    return count_bytes(model)


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and print and write the table."""
    options = parse_arguments(QuantizedOptions, __doc__, arguments)
    torch.set_num_threads(1)
    experiment = Experiment(options)
    for seed in range(1, options.seeds + 1):
        for fold in options.only or experiment.folds:
            experiment.run_fold(fold, seed)
    systems = list(experiment.collect())
    text, csv = describe_systems(systems, experiment.positive)
    write_text(experiment.folder / "quantized.md", text)
    write_text(experiment.folder / "quantized.csv", csv)
    write_bytes(experiment.folder / "quantized.png", render_png(draw_systems(systems, experiment.positive)))
    print(f"{text}\nwritten: {experiment.folder}/quantized.md, quantized.csv, quantized.png")


if __name__ == "__main__":
    main()
