import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from audio.dataset import Pack
from audio.manifest import read_manifest
from scripts.wavlist_to_hdf5 import main
from tests.audio.test_io import sine
from tests.conftest import ROOT
from tests.processes import find_children, is_alive, wait_until

SCRIPT = ROOT / "scripts" / "wavlist_to_hdf5.py"


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two sounds in `my_sounds`."""
    (tmp_path / "my_sounds").mkdir()
    for i, name in enumerate(("a.wav", "b.wav")):
        soundfile.write(tmp_path / "my_sounds" / name, sine(44100, seconds=1 + i), 44100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_published_command_packs_a_plain_list_of_find(sounds: Path) -> None:
    listing = """find my_sounds -name '*.wav' | sort | awk 'BEGIN{print "filename"}{print}' > my_sounds.tsv"""
    subprocess.run(listing, shell=True, check=True)
    command = [sys.executable, str(SCRIPT), "my_sounds.tsv", "data/mine", "-n", "2", "--duration"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "packed      2 of 2 clips, 3.0 seconds at 16000 Hz" in done.stdout
    assert "resampled   2 (2 from 44100 Hz)" in done.stdout
    assert "2/2" in done.stderr  # the progress bar
    table = read_manifest("data/mine/labels/my_sounds.tsv")
    assert table.to_numpy().tolist() == [
        ["my_sounds/a.wav", "data/mine/hdf5/my_sounds_0.h5", "1"],
        ["my_sounds/b.wav", "data/mine/hdf5/my_sounds_0.h5", "2"],
    ]
    assert json.loads(Path("data/mine/labels/my_sounds.report.json").read_text())["packed"] == 2
    assert Pack.open("data/mine/labels/my_sounds.tsv").n_samples.tolist() == [16000, 32000]


def test_every_published_option_is_kept(sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.csv").write_text("path,labels\nmy_sounds/a.wav,1;2\nmy_sounds/b.wav,3\n")
    options = (
        "-s 1 -n 0 --hdf5_dirname h --index_dirname i --filename_column path --fullname --stereo -d , --dtype int16"
    )
    main(["list.csv", "out", *options.split(), "--layout", "clips", "--sample_rate", "32000", "--name", "z"])
    table = read_manifest("out/i/z.tsv")
    assert table["filename"].tolist() == ["my_sounds/a.wav", "my_sounds/b.wav"]
    assert table["labels"].tolist() == ["1;2", "3"]
    assert table["hdf5path"].tolist() == ["out/h/z_0.h5", "out/h/z_1.h5"]
    opened = Pack.open("out/i/z.tsv")
    assert (opened.sample_rate, opened.n_samples.tolist()) == (32000, [32000, 64000])
    assert "out/i/z.report.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list.tsv", "out", "--dtype", "float32"], "--dtype is 'float32'; expected int16"),
        (["list.tsv", "out", "--stereo"], "add --layout clips"),
        (["absent.tsv", "out"], "absent.tsv: there is no such file"),
        (["list.tsv", "out", "--sample_rate", "0"], "sample_rate 0"),
        (["list.tsv", "out", "--filename_column", "path"], "expected 'path'"),
        (["gone.tsv", "out", "-n", "0"], "none of its 1 clips could be packed"),
    ],
)
def test_a_wrong_command_ends_in_a_sentence_and_leaves_nothing(
    sounds: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("list.tsv").write_text("filename\nmy_sounds/a.wav\n")
    Path("gone.tsv").write_text("filename\nmy_sounds/gone.wav\n")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == (2 if "--dtype" in arguments else 1)
    output = capsys.readouterr().err
    assert words in output
    assert "Traceback" not in output
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by /proc")
def test_a_killed_packing_leaves_no_pack_and_no_workers_behind(sounds: Path) -> None:
    Path("list.tsv").write_text("filename\n" + "\n".join(f"my_sounds/link{i}.wav" for i in range(3000)) + "\n")
    for i in range(3000):
        os.link("my_sounds/a.wav", f"my_sounds/link{i}.wav")
    process = subprocess.Popen([sys.executable, str(SCRIPT), "list.tsv", "out", "-n", "2"], stderr=subprocess.DEVNULL)
    wait_until(lambda: list(Path("out/hdf5").glob(".list.packing/.list_0.h5.*.partial")))
    workers = find_children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 2
    assert list(Path("out/hdf5").glob("*.h5")) == []
    assert not Path("out/labels").exists()
    wait_until(lambda: not any(map(is_alive, workers)))
