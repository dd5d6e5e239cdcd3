"""Run the whole pipeline on synthetic sounds, with the commands that a user would type.

    python scripts/demo.py [--workdir data/demo] [--quick]

Pack → train a small teacher on the labels → save its soft targets → distil a smaller student from them → evaluate
both → tag a folder → print the results and where each file is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import fail, print_user_errors  # isort: split

import hashlib
import json
import shlex
import subprocess
import textwrap
import time

from common.columns import align_columns
from common.files import write_json
from common.options import Options, parse_arguments

ROOT = Path(__file__).resolve().parent.parent


class DemoOptions(Options):
    """The options of demo.py."""

    workdir: str = "data/demo"  # sounds and packs
    output: str | None = None  # runs and soft targets; null = experiments/ and logits/
    quick: bool = False  # fewer sounds and epochs: checks the commands, not the figures


class Steps:
    """Runs commands of the project one after the other, and skips those that are done.

    A step is done when the same command succeeded before, after the same steps, with the same code and configurations,
    and its output still exists.

    Args:
        folder: gets a small file for each finished step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*config/*.yaml")])
        self.key = hashlib.sha256(b"".join(p.read_bytes() for p in sources if "tests" not in p.parts)).hexdigest()

    def run(self, title: str, *command: str | Path, output: Path) -> float:
        """Print and run one command that writes `output`; return the seconds that it took, now or when it was run."""
        words = [str(word) for word in command]
        self.key = hashlib.sha256("\0".join([self.key, *words]).encode()).hexdigest()
        print(f"\n=== {title}\n$ python {shlex.join(words)}", flush=True)
        marker = self.folder / f"{self.key[:16]}.json"
        if marker.is_file() and (ROOT / output).exists():
            print(f"done before: {output} (delete it to run this step again)")
            return json.loads(marker.read_text())["seconds"]
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt as stop:
                process.terminate()  # subprocess.run would kill it, and its files would stay
                stop.add_note("the same command continues after the finished steps")
                raise
        if status:
            fail(f"this step ended with status {status}; see its message above")
        seconds = time.perf_counter() - start
        write_json(marker, {"command": words, "seconds": seconds})
        return seconds


@print_user_errors
def main() -> None:
    """Run all steps and print the results."""
    options = parse_arguments(DemoOptions, __doc__)
    work, output = Path(options.workdir), Path(options.output or "")
    n_train, n_rest = ("48", "16") if options.quick else ("560", "120")
    epochs = ["--epochs", "2"] if options.quick else []
    start = time.perf_counter()

    steps = Steps(work / "finished_steps")
    counts = ["--seconds", "2.5", "--n_train", n_train, "--n_valid", n_rest, "--n_eval", n_rest]
    run = steps.run
    run("make synthetic sounds", "scripts/make_demo_sounds.py", work, *counts, output=work / "settings.json")
    packs = work / "packs" / "labels"
    for split in ("train", "valid", "eval"):
        command = "scripts/wavlist_to_hdf5.py", work / f"{split}.tsv", work / "packs"
        run(f"pack the {split} sounds", *command, output=packs / f"{split}.tsv")
    train: list[str | Path] = ["--train_data", packs / "train.tsv"]
    data = [*train, "--eval_data", packs / "eval.tsv", "--valid_data", packs / "valid.tsv"]
    data += ["--outputpath", output / "experiments", *epochs]
    teacher, student = (output / "experiments" / name / "latest" for name in ("demo_teacher", "demo_student"))
    teacher_seconds = run(
        "train a small teacher on the labels",
        *("run.py", "train", "trainconfig/demo_teacher.yaml", "--labels_csv", work / "class_labels_indices.csv", *data),
        output=teacher / "results.json",
    )
    name = f"demo_teacher_{steps.key[:8]}"  # another teacher's targets get another folder
    store = output / "logits" / name / "train" / "chunk_10"
    run(
        "save the teacher's soft targets for every clip, epoch and augmentation",
        *("save_logits.py", "logitconfig/demo.yaml", "--model", teacher, "--outputpath", output / "logits"),
        *("--name", name),
        *train,
        *epochs,
        output=store / "meta.json",
    )
    student_seconds = run(
        "distil a smaller student from the soft targets alone",
        *("run.py", "train", "trainconfig/demo_student.yaml", "--logitspath", store, *data),
        output=student / "results.json",
    )
    evaluate = "run.py", "evaluate", student, "--test_data", packs / "eval.tsv"
    run("evaluate the student", *evaluate, output=student / "evaluation_eval.json")
    tags = work / "tags.csv"
    tag = "inference.py", work / "folder_to_tag", "-m", student, "-k", "3", "--output", tags
    run("tag a folder", *tag, output=tags)

    _print_results(teacher, teacher_seconds, student, student_seconds)
    files = [
        ("sounds", str(work / "audio")),
        ("packs", f"{packs}/*.tsv, {work / 'packs' / 'hdf5'}/*.h5"),
        ("soft targets", str(store)),
        *((run.parent.name.removeprefix("demo_"), str(_find_weights(run))) for run in (teacher, student)),
        ("per-class results", str(student / "results_per_class.csv")),
        ("tags", str(tags)),
    ]
    print(f"\n=== files\n{textwrap.indent(align_columns(files), '  ')}")
    print(f"\nin all {time.perf_counter() - start:.0f} s")


def _print_results(teacher: Path, teacher_seconds: float, student: Path, student_seconds: float) -> None:
    results, distilled = (json.loads((ROOT / run / "results.json").read_text()) for run in (teacher, student))
    baseline = json.loads((ROOT / teacher / "baseline.json").read_text())
    rows = [
        ("", "mAP", "mAUC", "trained in"),
        ("chance", f"{distilled['chance_mAP']:.3f}", "0.500", ""),
        ("simple features", f"{baseline['value']:.3f}", "", f"{baseline['seconds']:.0f} s"),
        ("teacher (labels)", f"{results['mAP']:.3f}", f"{results['mAUC']:.3f}", f"{teacher_seconds:.0f} s"),
        ("student (distilled)", f"{distilled['mAP']:.3f}", f"{distilled['mAUC']:.3f}", f"{student_seconds:.0f} s"),
        ("student / teacher", f"{100 * distilled['mAP'] / results['mAP']:.0f} %", "", ""),
    ]
    print(f"\n=== results on the evaluation sounds\n{textwrap.indent(align_columns(rows), '  ')}")


def _find_weights(run: Path) -> Path:
    """Return the file of a run's final weights."""
    return run / Path(json.loads((ROOT / run / "finished.json").read_text())["weights"]).name


if __name__ == "__main__":
    main()
