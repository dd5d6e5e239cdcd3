"""Names of what is written are names: none leads out of its folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import Faults
from common.options import read_options
from common.places import describe_unusable_name
from probing.options import ProbeOptions
from scripts.wavlist_to_hdf5 import PackOptions
from training.config import SoftTargetConfig

ROOT = Path(__file__).resolve().parents[2]
BAD = ["../../x", "a/b", "/tmp/x", "..", ".", "", "a\\b", "a\nb", "a\tb", "a\0b", "a\udcff", "x" * 300, "é" * 150]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_is_refused_wherever_something_is_written_under_it(name: str) -> None:
    assert describe_unusable_name(name)
    for kind, given in (
        (PackOptions, {"list": "l", "outdir": "o"}),
        (SoftTargetConfig, {"train_data": "t", "model": "m"}),
    ):
        faults = Faults("x")
        read_options(kind, given | {"name": name}, faults, parse=False)
        assert any("name is " in sentence for sentence in faults.sentences), kind
        assert max(map(len, faults.sentences)) < 400
    faults = Faults("x")
    read_options(ProbeOptions, {"model": "m", "data": "d", "name": name}, faults, parse=False)
    assert any("--name is " in sentence for sentence in faults.sentences)


def test_names_that_people_give_are_names() -> None:
    for name in ("x", "ced_mini+beats 2", "größe", ".hidden", "2026-01-01", "a..b", "梟" * 60):
        assert describe_unusable_name(name) == ""


def test_folders_stay_below_the_output() -> None:
    for path in ("hdf5", "a/b/c", "größe"):
        assert describe_unusable_name(path, folders=True) == ""
    for path in ("../x", "/x", "a/../../x", "a//b", "a/", ""):
        assert describe_unusable_name(path, folders=True)


def test_the_command_refuses_a_name_that_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "l.tsv").write_text("filename\nx.wav\n")
    words = ["scripts/wavlist_to_hdf5.py", str(tmp_path / "l.tsv"), str(tmp_path / "out"), "--name", "../../x"]
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: --name is '../../x': expected a name without / or \\")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.tsv"]
