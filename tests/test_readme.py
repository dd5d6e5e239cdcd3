"""The README's commands, run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile

from models import create_model, load_model, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(section: str) -> list[str]:
    """Return the lines of the bash blocks between a heading and the next."""
    text = README.split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a fresh checkout, without the user's data in it."""
    entries = [path.name for path in ROOT.glob("*.py")]
    for name in (*entries, "scripts", "trainconfig", "logitconfig", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    rng = np.random.default_rng(0)
    for kind in range(3):
        for number in range(7):
            path = tmp_path / "my_sounds" / f"Kind {kind}" / f"a {number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = np.sin(2 * np.pi * 300 * 2**kind * np.arange(8000) / 8000) + 0.1 * rng.standard_normal(8000)
            soundfile.write(path, 0.3 * tone, 8000)
    return tmp_path


# What stands for a model in the README; CED is trained for it.
PLACEHOLDERS = {"MODEL": "data/model.pt", "TAGGER": "experiments/own_student/latest", "CED": "data/ced.pt"}


def test_the_readers_own_sounds_go_all_the_way(checkout):
    lines = commands("Your own sounds, command by command")
    use = commands("From checkpoint to use")
    embed = commands("Embeddings alone: S-SONDO")
    assert (len(lines), len(use), len(embed)) == (17, 10, 5)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for torchrun
    (checkout / "data").mkdir()
    for name in ("model", "ced"):
        network = create_model("audiotransformer_pico", num_classes=3, labels=[f"Kind {i}" for i in range(3)], depth=1)
        save_checkpoint(checkout / "data" / f"{name}.pt", network)
    for line in [*lines, *use, *embed]:
        short = line.split("  #")[0].replace("arecord -f S16_LE -r 16000", "head -c 64000 /dev/urandom")
        short = re.sub(r"\b(MODEL|TAGGER|CED)\b", lambda found: PLACEHOLDERS[found[0]], short)
        if "trainconfig" in line or "logitconfig" in line:
            short = short.replace("--budget 10m", "") + " --epochs 2 --num_workers 0"
        python = shlex.quote(sys.executable)
        script = f'python() {{ {python} "$@"; }}\n{short}'
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=checkout,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    tags = (checkout / "data" / "tags.csv").read_text()
    assert "my_sounds/Kind 1/a 0.wav" in tags
    assert "Kind 1" in tags
    data = checkout / "data"
    assert len(pd.read_parquet(data / "tags.parquet")["filename"].unique()) == 21
    assert len(list((data / "pictures").rglob("*.png"))) == 21
    assert len(list((data / "tracks").rglob("*.txt"))) == 21
    assert len(pd.read_csv(data / "all.csv")["filename"].unique()) == 21
    with h5py.File(data / "embeddings.h5") as file:
        assert len(file["filename"]) == 21
    assert (data / "tagger.int8.onnx").is_file()
    assert {path.suffix for path in (checkout / "heads").iterdir()} == {".pt", ".json", ".png"}
    assert load_model(data / "my_tagger").labels == load_model(checkout / PLACEHOLDERS["TAGGER"]).labels


def test_every_file_and_option_that_the_readme_names_exists():
    for path in re.findall(r"(?:trainconfig|logitconfig|scripts)/[\w.]+\.(?:yaml|py|sh)", README):
        assert (ROOT / path).is_file(), path
    for key in re.findall(r"--(\w+)[ =.`]", README):
        files = [
            *ROOT.glob("*.py"),
            *ROOT.glob("scripts/*.py"),
            ROOT / "training/config.py",
            ROOT / "probing/options.py",
        ]
        known = "".join(path.read_text() for path in files)
        assert key in known or key in ("nproc_per_node", "nnodes"), key
