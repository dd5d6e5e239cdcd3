"""Commands on a disk that is really full: one sentence, nothing damaged, and the next start goes on."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from audio.manifest import read_manifest
from audio.pack import pack
from scripts.check_pack import check_pack
from tests.conftest import ROOT, run_command
from tests.training.test_resume import LABELS_ONLY, SETTINGS

N_CLIPS = 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("a file system of a given size can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def write_list(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(N_CLIPS):
        soundfile.write(folder / f"{i}.wav", rng.integers(-9000, 9000, 160_000).astype(np.int16), 16000)
    listed = folder / "small.tsv"
    listed.write_text("filename\n" + "".join(f"{i}.wav\n" for i in range(N_CLIPS)))
    return listed


def fill(folder: Path, n_free: int) -> Path:
    """Fill a file system up to some bytes."""
    status = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - n_free)))
    return folder / "filler"


def check_intact(folder: Path) -> None:
    assert check_pack(folder / "labels" / "small.tsv") == f"{N_CLIPS} clips in 1 shards"


def test_where_files_may_not_grow_packing_is_refused_in_a_sentence_and_the_old_pack_stays(tmp_path: Path) -> None:
    """A limit of the size of files fails in the kernel at a write in the middle, and needs no rights."""
    listed = write_list(tmp_path)
    command = [sys.executable, ROOT / "scripts" / "wavlist_to_hdf5.py", listed, tmp_path / "out", "-n", "0"]
    table = read_manifest(listed)
    pack(table, listed, tmp_path / "out", "small", n_workers=0, progress=False)
    failed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )
    assert failed.returncode == 1, failed.stderr
    assert "small_0.h5 cannot be written (File too large)" in failed.stderr
    assert "Traceback" not in failed.stderr
    check_intact(tmp_path / "out")
    assert not list((tmp_path / "out" / "hdf5").glob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("n_free", [3_600_000, 2_000_000])
def test_packing_again_on_a_full_disk_leaves_the_pack(small_disk: Path, tmp_path: Path, n_free: int) -> None:
    command = ["scripts/wavlist_to_hdf5.py", write_list(tmp_path), small_disk / "pack", "-n", "2"]
    assert run_command(*command).returncode == 0
    filler = fill(small_disk, n_free)
    failed = run_command(*command)
    assert failed.returncode == 1, failed.stderr
    assert "No space left on device: at least" in failed.stderr
    assert "Traceback" not in failed.stderr
    check_intact(small_disk / "pack")
    filler.unlink()
    assert run_command(*command).returncode == 0
    check_intact(small_disk / "pack")


@pytest.mark.long
@pytest.mark.parametrize("n_free", [0, 100_000, 400_000, 900_000, 1_600_000])
def test_a_run_on_a_full_disk_is_resumed_when_there_is_space(
    small_disk: Path, tmp_path: Path, tone_pack: Path, n_free: int
) -> None:
    config = tmp_path / "full.yaml"
    settings = SETTINGS | LABELS_ONLY | {"train_data": str(tone_pack), "eval_data": str(tone_pack), "epochs": 4}
    config.write_text(yaml.safe_dump(settings))
    command = ["run.py", "train", config, "--outputpath", small_disk / "runs"]
    filler = fill(small_disk, n_free)
    failed = run_command(*command)
    assert "Traceback" not in failed.stderr
    if failed.returncode:
        assert "cannot be written (No space left on device" in failed.stderr or "No space left" in failed.stderr
    filler.unlink()
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert not [path for path in small_disk.rglob("*partial*")]
