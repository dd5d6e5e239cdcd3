"""The main job, start to end, on sounds made by formula: the commands a reader would type, one after the other.

    python scripts/demo.py [--workdir data/demo] [--quick]

Pack → train a small teacher on the labels → save its soft targets → distil a smaller student from them → evaluate
both → tag a folder → print what was reached and where each file lies.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.columns import align_columns
from common.errors import fail
from common.files import write_json
from common.parser import Parser

ROOT = Path(__file__).resolve().parent.parent


class Steps:
    """Runs commands of the project one after the other, and skips those that are done.

    A step is done when the same command ended well before, after the same steps, with the same code and configurations,
    and what it made is still there.

    Args:
        folder: gets a small file for each finished step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*config/*.yaml")])
        self.key = hashlib.sha256(b"".join(p.read_bytes() for p in sources if "tests" not in p.parts)).hexdigest()

    def run(self, title: str, *command: str | Path, makes: Path) -> float:
        """Print and run one command that makes a file; return the seconds it took, when it was run."""
        words = [str(word) for word in command]
        self.key = hashlib.sha256("\0".join([self.key, *words]).encode()).hexdigest()
        print(f"\n=== {title}\n$ python {shlex.join(words)}", flush=True)
        marker = self.folder / f"{self.key[:16]}.json"
        if marker.is_file() and (ROOT / makes).exists():
            print(f"done before: {makes} (delete it to do this step again)")
            return json.loads(marker.read_text())["seconds"]
        began = time.perf_counter()
        status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
        if status:
            fail(f"this step ended with status {status}; its own message stands above")
        seconds = time.perf_counter() - began
        write_json(marker, {"command": words, "seconds": seconds})
        return seconds


def figures(folder: Path) -> dict[str, float]:
    """Return the results of a run on the evaluation clips."""
    return json.loads((ROOT / folder / "results.json").read_text())


def weights_of(folder: Path) -> Path:
    """Return the file of the weights that a run ended with."""
    return folder / Path(json.loads((ROOT / folder / "finished.json").read_text())["weights"]).name


def table(rows: list[tuple[str, str]]) -> str:
    """Return two aligned columns."""
    return "\n".join(f"  {line}" for line in align_columns(rows))


def main() -> None:
    """Run the demo."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("data/demo"), help="sounds and packs (default: data/demo)")
    parser.add_argument(
        "--output", type=Path, default=None, help="runs and soft targets (default: as the configurations say)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer sounds and epochs: checks the path, not the figures"
    )
    arguments = parser.parse_args()
    work = arguments.workdir
    runs = arguments.output / "experiments" if arguments.output else Path("experiments")
    targets = arguments.output / "logits" if arguments.output else Path("logits")
    n_train, n_rest = ("48", "16") if arguments.quick else ("560", "120")
    counts = ["--seconds", "2.5", "--n_train", n_train, "--n_valid", n_rest, "--n_eval", n_rest]
    short = ["--epochs", "2"] if arguments.quick else []
    began = time.perf_counter()

    steps = Steps(work / "finished_steps")
    run = steps.run
    made = work / "settings.json"
    run("make sounds by formula", "scripts/make_demo_sounds.py", work, *counts, makes=made)
    packs = work / "packs" / "labels"
    for split in ("train", "valid", "eval"):
        pack = "scripts/wavlist_to_hdf5.py", work / f"{split}.tsv", work / "packs"
        run(f"pack the {split} sounds", *pack, makes=packs / f"{split}.tsv")
    data = ["--eval_data", packs / "eval.tsv", "--valid_data", packs / "valid.tsv", "--outputpath", runs]
    teacher = runs / "demo_teacher" / "latest"
    seconds_teacher = run(
        "teach: train a small teacher on the labels",
        *("run.py", "train", "trainconfig/demo_teacher.yaml", "--train_data", packs / "train.tsv"),
        *("--labels_csv", work / "class_labels_indices.csv", *data, *short),
        makes=teacher / "results.json",
    )
    name = f"demo_teacher_{steps.key[:8]}"  # targets of another teacher go elsewhere
    store = targets / name / "train" / "chunk_10"
    run(
        "ask the teacher: soft targets for every clip, epoch and augmentation",
        *("save_logits.py", "logitconfig/demo.yaml", "--train_data", packs / "train.tsv", "--model", teacher),
        *("--outputpath", targets, "--name", name, *short),
        makes=store / "meta.json",
    )
    student = runs / "demo_student" / "latest"
    seconds_student = run(
        "distil: a smaller student learns from the soft targets alone",
        *("run.py", "train", "trainconfig/demo_student.yaml", "--train_data", packs / "train.tsv"),
        *("--logitspath", store, *data, *short),
        makes=student / "results.json",
    )
    judge = "run.py", "evaluate", student, "--test_data", packs / "eval.tsv"
    run("evaluate the student", *judge, makes=student / "evaluation_eval.json")
    tags = work / "tags.csv"
    tag = "inference.py", work / "folder_to_tag", "-m", student, "-k", "3", "--output", tags
    run("tag a folder", *tag, makes=tags)

    of_teacher, of_student = figures(teacher), figures(student)
    chance = json.loads((ROOT / student / "results.json").read_text())["chance_mAP"]
    baseline = json.loads((ROOT / teacher / "baseline.json").read_text())
    print("\n=== reached, on sounds that neither has heard")
    print(
        table(
            [
                ("", "mAP     mAUC    trained in"),
                ("chance", f"{chance:.3f}   0.500"),
                ("simple features", f"{baseline['value']:.3f}           {baseline['seconds']:.0f} s"),
                (
                    "teacher (labels)",
                    f"{of_teacher['mAP']:.3f}   {of_teacher['mAUC']:.3f}   {seconds_teacher:.0f} s",
                ),
                (
                    "student (distilled)",
                    f"{of_student['mAP']:.3f}   {of_student['mAUC']:.3f}   {seconds_student:.0f} s",
                ),
                ("student / teacher", f"{100 * of_student['mAP'] / of_teacher['mAP']:.0f} %"),
            ]
        )
    )
    print("\n=== files")
    print(
        table(
            [
                ("sounds", str(work / "audio")),
                ("packs", f"{packs}/*.tsv, {work / 'packs' / 'hdf5'}/*.h5"),
                ("soft targets", str(store)),
                ("teacher", str(weights_of(teacher))),
                ("student", str(weights_of(student))),
                ("per-class results", str(student / "results_per_class.csv")),
                ("tags", str(tags)),
            ]
        )
    )
    print(f"\nin all {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
