"""The environment: which Python makes it, and where PyTorch comes from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# An interpreter of any version: it accepts `-c`, makes a folder for `-m venv`, and records the arguments of pip.
INTERPRETER = """#!/bin/bash
if [ "$1" = -c ]; then exec {python} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"; fi
if [ "$1" = --version ]; then echo "Python {version}"; exit; fi
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
echo "$@" >> {log}
"""


def make(folder, version, **environment):
    (folder / "requirements.txt").write_text("torch==2.11.0\ntorchaudio==2.11.0\ntimm==1.0.31\n")
    python, log = folder / "python-of-that-version", folder / "log"
    python.write_text(INTERPRETER.format(python=sys.executable, version=(*version, 0), log=log))
    python.chmod(0o755)
    script = f"set -euo pipefail; source {ROOT}/scripts/environment.sh; make_environment requirements.txt"
    given = {**os.environ, "PYTHON": str(python), "VENV": str(folder / "venv"), **environment}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=given, capture_output=True, text=True, check=False)
    return done, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13), (3, 14)])
def test_these_versions_of_python_make_it_once(version, tmp_path):
    done, given = make(tmp_path, version)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-2:] for line in given] == [["-r", "requirements.txt"]]
    _, again = make(tmp_path, version)
    assert again == given


@pytest.mark.parametrize("version", [(3, 10), (3, 15), (4, 0)])
def test_other_versions_are_refused_by_a_sentence(version, tmp_path):
    done, given = make(tmp_path, version)
    assert done.returncode == 1
    assert "Python 3.11 to 3.14 is needed" in done.stderr
    assert not given


def test_pytorch_is_taken_from_the_index_that_is_named_before_anything_else(tmp_path):
    index = "https://download.pytorch.org/whl/cpu"
    done, given = make(tmp_path, (3, 11), TORCH_INDEX=index)
    assert done.returncode == 0, done.stderr
    assert given[0].endswith(f"--index-url {index} torch==2.11.0 torchaudio==2.11.0 torchvision")
    assert given[1].endswith("-r requirements.txt")
    assert len(given) == 2
