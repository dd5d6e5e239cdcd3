"""The README's commands, run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(section: str) -> list[str]:
    """Return the lines of the bash blocks between a heading and the next."""
    text = README.split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a fresh checkout, without the user's data in it."""
    for name in ("run.py", "save_logits.py", "inference.py", "scripts", "trainconfig", "logitconfig", "resources"):
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


def test_the_readers_own_sounds_go_all_the_way(checkout):
    lines = commands("Your own sounds, command by command")
    assert len(lines) == 17
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for torchrun
    for line in lines:
        short = line.split("  #")[0]
        if "trainconfig" in line or "logitconfig" in line:
            short += " --epochs 2 --num_workers 0"
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


def test_every_file_and_option_that_the_readme_names_exists():
    for path in re.findall(r"(?:trainconfig|logitconfig|scripts)/[\w.]+\.(?:yaml|py|sh)", README):
        assert (ROOT / path).is_file(), path
    for key in re.findall(r"--(\w+)[ =.`]", README):
        known = "".join((ROOT / name).read_text() for name in ("run.py", "inference.py", "training/config.py"))
        assert key in known or key in ("nproc_per_node", "nnodes"), key
