"""The documents: their commands and examples run, their links and anchors exist, the README is short.

The blocks of a page run in their order in a folder that looks like a fresh checkout. `SUBSTITUTIONS` lists what is
replaced: placeholders, downloads, devices, and the length of trainings.
"""

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from models import create_model, load_model, save_checkpoint
from scripts.configuration_reference import PAGE, create_page
from tests.test_architecture import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Commands that are not run here: installations, and those that other tests run.
SKIPPED = (
    "bash scripts/demo.sh",  # tests/test_pipeline.py
    "bash scripts/test.sh",
    "pip install -r requirements-demo.txt",
    "python scripts/demo_page.py -m TAGGER",  # tests/scripts/test_demo_page.py
    "python scripts/benchmark.py train --device cuda",
    "CED_MODEL=TAGGER python -m xares.run",  # fetches the data of a task; tests/scripts/test_xares_encoder.py
)
# What is replaced in all pages: pattern → replacement. Models of random weights stand for downloads and placeholders.
SUBSTITUTIONS = {
    r"\b(MODEL|TAGGER|STUDENT|TEACHER|CED|RUN_R0|RUN)\b": "data/model.pt",
    r"\bRUN_R8\b": "data/merging.pt",
    r"\bQUANTIZED\b": "data/quantized.pt",
    r"-m ced_mini\b": "-m data/model.pt",
    r"(probe|--model|-m) mn04_as\b(?! --weights)": r"\1 mn04_as --weights data/mn04_as.pt",
    r"\b(mn04_as_mAP_432|ced_tiny)\.pt": r"data/\1.pt",
    r"arecord -f S16_LE -r 16000": "head -c 64000 /dev/urandom",
    r"sound\.wav": "my_sounds/Kind 0/a 0.wav",
    r"--budget 10m|--epochs \d+|--compile": "",
}
LIMIT = " --epochs 2 --num_workers 0"  # of every command with a file of trainconfig/ or logitconfig/


def run_page(page: Path, folder: Path, changes: dict[str, str] | None = None, variables: str = "") -> None:
    """Run the blocks of a page.

    Args:
        page: the Markdown file.
        folder: the checkout.
        changes: pattern → replacement, before `SUBSTITUTIONS`.
        variables: assignments in front of every block of bash.
    """
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for language, text in blocks:
        for pattern, replacement in ((changes or {}) | SUBSTITUTIONS).items():
            text = re.sub(pattern, replacement, text)
        if language == "python":
            run([sys.executable, "-c", text], folder)
        else:
            run(["bash", "-euxo", "pipefail", "-c", "\n".join([variables, *prepare(text)])], folder)


def prepare(text: str) -> list[str]:
    """Return the lines of a block of bash without comments and skipped commands, trainings limited."""
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in re.sub(r"\\(\s#.*)?\n", " ", text).splitlines()]
    lines = [line for line in lines if not line.startswith(tuple(map(substitute, SKIPPED)))]
    return [line + LIMIT * bool(re.search("(train|logit)config/", line)) for line in lines]


def substitute(command: str) -> str:
    return command.replace("TAGGER", "data/model.pt")


def run(words: list[str], folder: Path) -> None:
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # the latter for torchrun
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{words[-1]}\n{result.stdout}{result.stderr}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints of random weights: one for placeholders, with and without token merging, and the published ones."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    kinds = [f"Kind {i}" for i in range(3)]
    for name, arguments in {
        "model": {},
        "merging": {"token_merging": 8},
        "quantized": {"quantize": {"weights": 4}},
    }.items():
        network = create_model("audiotransformer_pico", num_classes=3, labels=kinds, depth=1, **arguments)
        save_checkpoint(folder / f"{name}.pt", network)
    save_checkpoint(folder / "mn04_as.pt", create_model("mn04_as"))
    shutil.copy(folder / "mn04_as.pt", folder / "mn04_as_mAP_432.pt")
    return folder


@pytest.fixture
def checkout(tmp_path, models) -> Path:
    """A folder that looks like a fresh checkout, with 21 sounds of three kinds in my_sounds/."""
    configs = ("trainconfig", "logitconfig", "probeconfig")
    for name in (*(path.name for path in ROOT.glob("*.py")), "scripts", *configs, "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    write_sounds(tmp_path / "my_sounds", 7)
    shutil.copytree(models, tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> Path:
    """The lists and packs that own_sounds.md makes of `my_sounds`."""
    folder = tmp_path_factory.mktemp("packs")
    write_sounds(folder / "my_sounds", 7)
    run([sys.executable, str(ROOT / "scripts/make_lists.py"), "my_sounds"], folder)
    for name in ("train", "valid", "test"):
        run([sys.executable, str(ROOT / "scripts/wavlist_to_hdf5.py"), f"data/{name}.tsv", "data/mine"], folder)
    return folder / "data"


@pytest.fixture
def packed(checkout, packs) -> Path:
    """A checkout with `my_sounds` packed."""
    shutil.copytree(packs, checkout / "data", dirs_exist_ok=True)
    return checkout


def write_sounds(folder: Path, n_each: int) -> None:
    rng = np.random.default_rng(0)
    for kind in range(3):
        (folder / f"Kind {kind}").mkdir(parents=True)
        for number in range(n_each):
            tone = np.sin(2 * np.pi * 300 * 2**kind * np.arange(8000) / 8000) + 0.1 * rng.standard_normal(8000)
            soundfile.write(folder / f"Kind {kind}" / f"a {number}.wav", 0.3 * tone, 8000)


def test_the_commands_of_the_readme_lead_from_sounds_to_tags(checkout):
    run_page(ROOT / "README.md", checkout)
    data = checkout / "data"
    tags = (data / "tags.csv").read_text()
    assert "my_sounds/Kind 1/a 0.wav" in tags
    assert "Kind 1" in tags
    assert "Kind 2" in (data / "class_labels_indices.csv").read_text()
    assert {path.suffix for path in (checkout / "heads").iterdir()} == {".pt", ".json", ".png"}
    assert load_model(checkout / "experiments/own_finetune/latest").name == "mn04_as"


@pytest.mark.long
def test_the_commands_on_own_sounds_distil_a_student(checkout):
    run_page(ROOT / "docs/own_sounds.md", checkout)
    assert len(pd.read_csv(checkout / "data/tags.csv")["filename"].unique()) == 21
    assert load_model(checkout / "experiments/own_student/latest").num_classes == 3


def test_the_commands_on_tagging_write_every_output(checkout):
    run_page(ROOT / "docs/tagging.md", checkout)
    data = checkout / "data"
    assert len(pd.read_parquet(data / "tags.parquet")["filename"].unique()) == 21
    assert len(list((data / "pictures").rglob("*.png"))) == 21
    assert len(list((data / "tracks").rglob("*.txt"))) == 21
    assert len(pd.read_csv(data / "all.csv")["filename"].unique()) == 21
    with h5py.File(data / "embeddings.h5") as file:
        assert len(file["filename"]) == 21


@pytest.mark.long
def test_the_commands_on_export_write_models_with_their_labels(packed):
    run_page(ROOT / "docs/export.md", packed)
    assert (packed / "data/tagger.int8.onnx").is_file()
    assert load_model(packed / "data/my_tagger").labels == [f"Kind {i}" for i in range(3)]


@pytest.mark.long
def test_the_commands_on_token_merging_run(packed):
    data = "--train_data data/mine/labels/train.tsv --eval_data data/mine/labels/test.tsv --loss BCEWithLogitsLoss"
    student = " --logitspath null --valid_data data/mine/labels/valid.tsv"
    run_page(
        ROOT / "docs/token_merging.md",
        packed,
        {r"fastast_esc10\.yaml": rf"\g<0> {data}", r"own_student\.yaml": rf"\g<0>{student}", "r 0,4,8": "r 0,2"},
    )


def test_the_commands_on_embeddings_end_with_a_head_on_a_student(packed):
    changes = {
        r"(?<=save_logits\.py )\S+(?=\s)(?! --model)": r"\g<0> --model data/model.pt",
        r'"STUDENT"': '"experiments/own_embedder/latest"',
    }
    run_page(ROOT / "docs/embeddings.md", packed, changes)
    assert (packed / "heads/embedded.pt").is_file()


@pytest.mark.long
def test_the_commands_without_labels_start_a_student(packed):
    run_page(ROOT / "docs/self_supervised.md", packed, {"mae_own.yaml": r"\g<0> --model audiotransformer_tiny"})
    assert (packed / "heads/pretrained.pt").is_file()
    (settings,) = (packed / "experiments/own_teacher").glob("audiotransformer_*/2*/config.yaml")
    assert "pretrained: experiments/mae_own/latest" in settings.read_text()


@pytest.mark.long
def test_the_commands_on_quantization_run(packed):
    write_segments(packed)
    command = "python save_logits.py logitconfig/own_teacher.yaml --model data/model.pt --epochs 2"
    run(command.split(), packed)
    run_page(ROOT / "docs/quantization.md", packed, {r"--negatives \d+": "--negatives 2"})
    table = pd.read_csv(packed / "data/detector/labels/train.tsv", sep="\t")
    counts = {"Dog": 4, "Baby cry, infant cry": 4, "Gunshot, gunfire": 4, "Other": 2}
    assert table["labels"].value_counts().to_dict() == counts


def write_segments(folder: Path) -> None:
    """Write AudioSet's lists with a few segments each, whose sounds are beside them."""
    sounds = sorted((folder / "my_sounds").rglob("*.wav"))
    mids = ("/m/0bt9lr", "/t/dd00002", "/m/032s66", "/m/09x0r")  # dog, baby cry, gunshot, speech
    for letter, name in zip("abc", ("unbalanced_train", "balanced_train", "eval"), strict=True):
        rows = [(f"{letter * 10}{number}", mids[number % 4]) for number in range(8)]
        lines = [f'{ytid}, 30.000, 40.000, "{mid}"' for ytid, mid in rows]
        text = "\n".join(["# YTID, start_seconds, end_seconds, positive_labels", *lines])
        (folder / f"{name}_segments.csv").write_text(text + "\n")
        for number, (ytid, _) in enumerate(rows):
            shutil.copy(sounds[number], folder / f"{ytid}.wav")


def test_the_commands_on_reliability_find_no_damage(packed):
    run_page(ROOT / "docs/reliability.md", packed)


def test_the_published_commands_run(checkout):
    save_checkpoint(checkout / "data/ced_tiny.pt", create_model("ced_tiny"))
    (checkout / "sounds").symlink_to("my_sounds")
    (checkout / "data/balanced").symlink_to(checkout / "my_sounds")
    rows = [f"my_sounds/Kind {i % 3}/a {i}.wav\t{['Speech', 'Music', 'Speech;Dog'][i % 3]}" for i in range(6)]
    (checkout / "eval.tsv").write_text("\n".join(["filename\tlabels", *rows]) + "\n")
    run(["python", "scripts/wavlist_to_hdf5.py", "eval.tsv", "data/published"], checkout)
    changes = {r"data/eval\.tsv": "data/published/labels/eval.tsv", r"ensemble5014\S+": r"\g<0> --smoke true"}
    changes |= {"data/balanced/ ": "data/balanced/ -follow "}
    run_page(ROOT / "docs/published_ced.md", checkout, changes)


@pytest.mark.long
def test_the_commands_of_the_results_run(checkout):
    """Tones stand for both sets of sounds, one fold and one seed for three."""
    write_sounds(checkout / "ESC10", 10)
    write_sounds(checkout / "WORDS", 12)
    names = [f"Kind {i % 3}/a {i // 3}.wav\t\tKind {i % 3}" for i in range(36)]
    folds = [f"{name}\t\t{i // 3 % 5 + 1}" for i, name in enumerate(names[:30])]
    parts = [f"{name}\t{['train', 'train', 'val', 'test'][i // 3 % 4]}" for i, name in enumerate(names)]
    (checkout / "ESC10/esc10.tsv").write_text("\n".join(["file\tid\tlabel\tx\tfold", *folds]) + "\n")
    (checkout / "WORDS/spoken_words.tsv").write_text("\n".join(["file\tid\tlabel\tsplit", *parts]) + "\n")
    students = "experiments/ssondo_esc10_words_teacher/latest"
    copy = "cp heads/mn_cosine_${t}_s1.json heads/${n}_${t}_s1.json"
    heads = f"for t in esc words; do for n in teacher mn_bds; do {copy}; done; done"
    short = '--events "Kind 0,Kind 1" --published null --only 1 --bits 4 --mixtures 8'
    changes = {
        r"for k in 1 2 3; do\n(    fold=)": r"for k in 1; do\n\1",
        r"\bRUNS\b": "data/model.pt,data/model.pt,data/model.pt",  # one for each of three packs
        r"--r [\d,]+": "--r 0,2 --rounds 1",
        r"(probe|--model) RUN\b": rf"\1 {students}",
        r"(?=python scripts/compare_probes)": f"{heads}; ",
        r"benchmarks/quantized\.py": f"\\g<0> {short}",
    }
    run_page(ROOT / "docs/results.md", checkout, changes, "ESC10=$PWD/ESC10 WORDS=$PWD/WORDS s=1 k=1 r=2")


@pytest.mark.long
def test_the_benchmarks_run(checkout):
    small = "--model audiotransformer_pico --rounds 1"
    step = f"{small} --seconds 1 --batch_size 2"
    changes = {
        r" --(batch_size|rounds|steps|seconds|r|model) \S+": "",
        r"benchmark\.py train(?! --device)": rf"\g<0> {step} --steps 1",
        r"benchmark\.py tag --sounds \S+": f"benchmark.py tag {small} --sounds my_sounds",
        r"benchmark\.py tome": rf"\g<0> {step} --r 2",
        r" \.\.\.": "",
    }
    run_page(ROOT / "docs/benchmarks.md", checkout, changes)


def test_every_page_with_commands_is_run():
    source = Path(__file__).read_text()
    blocks = {page: BLOCK.findall(page.read_text()) for page in PAGES if page.name != "ARCHITECTURE.md"}
    for page in (page for page, found in blocks.items() if found):
        assert f'ROOT / "{page.relative_to(ROOT)}"' in source, page
    text = "".join(text for found in blocks.values() for _, text in found)
    assert all(command in text for command in SKIPPED)


def test_files_and_options_in_the_documents_exist():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")]
    sources += [ROOT / "training/config.py", ROOT / "probing/options.py", ROOT / "common/options.py"]
    known = "".join(path.read_text() for path in sources)
    known += "nproc_per_node nnodes max-restarts rdzv-backend rdzv-endpoint index-url"  # of torchrun and pip
    known += "inference trained"  # names of groups
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"(?:trainconfig|logitconfig|probeconfig|scripts|tests)/[\w./]+\.(?:yaml|py|sh)", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
        for option in re.findall(r"[\s`]--(\w+)", text):
            assert option in known, f"{page.name}: {option}"


def test_names_of_the_code_in_the_architecture_exist():
    text = BLOCK.sub("", (ROOT / "ARCHITECTURE.md").read_text())
    packages = "|".join(PACKAGES)
    names = re.findall(rf"(?<![\w/.])((?:{packages})(?:\.(?!py\b)\w+)+)", text)
    names += [path.replace("/", ".") for path in re.findall(rf"`((?:{packages})/[\w/]+)\.py`", text)]
    for path, listed in re.findall(rf"`((?:{packages})/[\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text):
        names += [f"{path.replace('/', '.')}.{name}" for name in re.findall(r"`([\w.]+)`", listed)]
    for package, listed in re.findall(r"^- \*\*`(\w+)/`\*\*:(.*?)(?=^- |\n\n)", text, re.DOTALL | re.MULTILINE):
        names += [f"{package}.{module}" for module in re.findall(r"`(\w+)\.py`", listed)]
    assert len(names) > 50
    for name in set(names) - {"distill.objectives.mean_teacher"}:  # the example
        pkgutil.resolve_name(name)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_documentation_builds_without_warnings(tmp_path):
    build = f"{shlex.quote(sys.executable)} -m mkdocs build --strict --quiet --site-dir {shlex.quote(str(tmp_path))}"
    run(shlex.split(build), ROOT)
    assert "<table>" in (tmp_path / "results/index.html").read_text()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 10_000
    cells = [cell for line in text.decode().splitlines() if line.startswith("|") for cell in line.split("|")]
    assert max(map(len, cells)) <= 100


def test_the_page_of_keys_is_current():
    assert PAGE.read_text() == create_page(), "run python scripts/configuration_reference.py"
