"""Packing that is stopped, repeated or short of space."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile

import audio.pack
import common.files
from audio.dataset import Pack
from audio.manifest import read_manifest
from audio.pack import load_clip, pack
from audio.pack_progress import lock_pack
from common.errors import UserError
from tests.conftest import ROOT

N_CLIPS = 10


@pytest.fixture
def listed(tmp_path: Path) -> tuple[pd.DataFrame, Path]:
    """A list of clips of which each is constant, so that no two can be confused, and one that cannot be read."""
    for i in range(N_CLIPS):
        soundfile.write(tmp_path / f"{i}.wav", np.full(200 + 10 * i, i + 1, np.int16), 16000)
    (tmp_path / "4.wav").write_text("text")
    path = tmp_path / "mine.tsv"
    pd.DataFrame({"filename": [f"{i}.wav" for i in range(N_CLIPS)]}).to_csv(path, sep="\t", index=False)
    return read_manifest(path), path


def pack_list(listed: tuple[pd.DataFrame, Path], **options):
    table, path = listed
    return pack(table, path, path.parent / "out", "x", size_per_file=3, n_workers=0, progress=False, **options)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def read_sounds(folder: Path) -> dict[str, tuple[int, int]]:
    """Name → length and value of each clip, read the way that training reads them."""
    opened = Pack.open(folder / "out" / "labels" / "x.tsv")
    assert opened.n_missing == 0
    return {name: (len(opened.read(i)), round(opened.read(i)[0] * 32768)) for i, name in enumerate(opened.names)}


@pytest.fixture
def decode_until(monkeypatch: pytest.MonkeyPatch):
    """`decode_until(name)`: Ctrl-C comes while that file is decoded, with None never; returns the names decoded."""
    state = SimpleNamespace(last=None, decoded=[])

    def load(path: Path, sample_rate: int, **options):
        if path.name == state.last:
            raise KeyboardInterrupt
        state.decoded.append(path.name)
        return load_clip(path, sample_rate, **options)

    def set_last(name: str | None) -> list[str]:
        state.last, state.decoded = name, []
        return state.decoded

    monkeypatch.setattr(audio.pack, "load_clip", load)
    return set_last


def test_a_pack_that_was_stopped_goes_on_behind_its_last_finished_shard(tmp_path, listed, decode_until):
    whole = pack_list(listed).as_json()
    expected = read_files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    decode_until("8.wav")
    with pytest.raises(KeyboardInterrupt) as stopped:
        pack_list(listed)
    assert "7 of 10 clips are kept" in stopped.value.__notes__[0]  # two shards, and the file that cannot be read
    assert not (tmp_path / "out" / "labels").exists()
    decoded = decode_until(None)
    assert pack_list(listed).as_json() == whole
    assert decoded == ["7.wav", "8.wav", "9.wav"]
    assert read_files(tmp_path / "out") == expected


@pytest.mark.parametrize("change", ["a sound", "the list", "an option", "a sound that could not be read", "a shard"])
def test_what_has_changed_since_is_packed_again(tmp_path, listed, decode_until, change):
    decode_until("8.wav")
    with pytest.raises(KeyboardInterrupt):
        pack_list(listed)
    options, first = {}, {"a sound": 3, "a sound that could not be read": 3, "a shard": 3}.get(change, 0)
    if change in ("a sound", "a sound that could not be read"):
        soundfile.write(tmp_path / ("4.wav" if "not" in change else "5.wav"), np.full(99, 55, np.int16), 16000)
    elif change == "the list":
        listed = (listed[0].assign(labels="bell"), listed[1])
    elif change == "an option":
        options["sample_rate"] = 8000
    else:
        with open(tmp_path / "out" / "hdf5" / ".x.packing" / "x_1.h5", "r+b") as file:
            file.truncate(99)
    decoded = decode_until(None)
    pack_list(listed, **options)
    assert decoded == [f"{i}.wav" for i in range(first, N_CLIPS)]
    sounds = read_sounds(tmp_path)
    if change == "a sound":
        assert sounds["5.wav"] == (99, 55)
    assert ("4.wav" in sounds) == (change == "a sound that could not be read")


def pack_in_child(moment: int | None, has_links: bool, *args, **options) -> bool:
    """Pack in a child process, which kills itself before the call `moment` that changes a name; return if it did."""
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    remaining = SimpleNamespace(n=moment)

    def count(call):
        def kill_in_time(*args, **kwargs):
            if remaining.n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if remaining.n is not None:
                remaining.n -= 1
            return call(*args, **kwargs)

        return kill_in_time

    def refuse(*unused):
        raise OSError(errno.EPERM, "no links here")

    try:
        if not has_links:
            os.link = refuse
        for name in ("replace", "link", "unlink", "rmdir"):
            setattr(os, name, count(getattr(os, name)))
        pack(*args, n_workers=0, progress=False, **options)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("old", "has_links", "step"),
    [
        ("larger", True, 7),
        *(
            pytest.param(old, has_links, 1, marks=pytest.mark.long)
            for old in ("none", "smaller", "larger")
            for has_links in (True, False)
        ),
    ],
)
def test_whenever_it_is_killed_there_is_the_old_pack_or_the_new_one(
    tmp_path, listed, old, has_links, step, record_property
):
    """Kill it at every `step`-th call that changes a name, then look at it as a reader, then pack again to the end."""
    table, path = listed
    was_killed = True
    moment = 0
    while was_killed:
        out = tmp_path / str(moment)
        former: dict[str, tuple[int, int]] = {}
        if old != "none":
            part, size = (table.iloc[::-1].iloc[:4], 3) if old == "smaller" else (table.iloc[::-1], 1)
            pack_in_child(None, has_links, part, path, out / "out", "x", size_per_file=size, sample_rate=8000)
            former = read_sounds(out)
        was_killed = pack_in_child(moment, has_links, table, path, out / "out", "x", size_per_file=3)
        try:
            found = read_sounds(out) if (out / "out" / "labels" / "x.tsv").exists() else {}
        except UserError:
            assert not has_links  # a shard is missing until the next start
            found = former
        if moment % 2:  # with other settings, which the shards so far do not belong to
            pack_in_child(None, has_links, table.iloc[:5], path, out / "out", "x", size_per_file=2, sample_rate=8000)
            assert len(read_sounds(out)) == 4
        assert not pack_in_child(None, has_links, table, path, out / "out", "x", size_per_file=3)
        sounds, files = read_sounds(out), list(read_files(out / "out"))
        assert len(sounds) == N_CLIPS - 1
        assert found in (former, sounds), f"killed before call {moment}"
        expected = ["hdf5/x_0.h5", "hdf5/x_1.h5", "hdf5/x_2.h5", "labels/x.report.json", "labels/x.tsv"]
        assert files == expected, f"killed before call {moment}"
        moment += step
    assert moment > 20
    record_property("packing killed at a change of names", moment // step - 1)


def test_one_process_at_a_time_makes_a_pack(tmp_path, listed):
    table, path = listed
    code = (
        "import sys, pathlib; sys.path.insert(0, '.'); from audio.pack_progress import lock_pack\n"
        "with lock_pack(pathlib.Path(sys.argv[1]), 'x'): print(flush=True); input()"
    )
    folder = tmp_path / "out" / "hdf5"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="being packed by another process"):
            pack_list(listed)
        pack(table, path, tmp_path / "out", "y", n_workers=0, progress=False)
        other.communicate("\n")
    assert pack_list(listed).n_packed == N_CLIPS - 1
    with lock_pack(folder, "z"):
        pass


def test_a_full_disk_is_a_sentence_and_packing_goes_on_after_it(tmp_path, listed, monkeypatch: pytest.MonkeyPatch):
    pack_list(listed, sample_rate=8000)
    before, sounds = read_files(tmp_path / "out"), read_sounds(tmp_path)
    room, pwrite = [800_000], os.pwrite

    def write_within(descriptor, data, position):
        if room[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(common.files.os, "pwrite", write_within)
    with pytest.raises(UserError, match=r"x_1\.h5 cannot be written \(No space left on device: at least .* needed"):
        pack_list(listed)
    after = read_files(tmp_path / "out")
    assert {name: data for name, data in after.items() if ".packing" not in name} == before
    assert read_sounds(tmp_path) == sounds
    assert not [name for name in after if "partial" in name]
    room[0] = 10**9
    assert pack_list(listed).n_packed == N_CLIPS - 1
    assert read_sounds(tmp_path)["9.wav"] == (290, 10)


def test_a_start_with_other_settings_completes_the_change_to_a_pack_that_was_being_published(
    tmp_path, listed, decode_until
) -> None:
    table, path = listed
    manifest = tmp_path / "out" / "labels" / "x.tsv"
    pack(table.iloc[::-1], path, tmp_path / "out", "x", size_per_file=1, n_workers=0, progress=False)
    decode_until(None)
    for moment in itertools.count(25):
        pack_in_child(moment, True, table, path, tmp_path / "out", "x", size_per_file=3)
        if ".x.packing" in manifest.read_text():
            break
    sounds = read_sounds(tmp_path)
    decode_until("0.wav")
    with pytest.raises(KeyboardInterrupt):
        pack(table, path, tmp_path / "out", "x", size_per_file=2, n_workers=0, progress=False)
    assert read_sounds(tmp_path) == sounds
    assert ".x.packing" not in manifest.read_text()
