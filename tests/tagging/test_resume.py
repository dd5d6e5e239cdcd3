"""Runs that are killed and started again, and runs of several processes: one output as of one run."""

import json
import re

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile

import inference
from tests.conftest import run_command, start_server, torchrun
from tests.tagging.sounds import RATE, hum_folder, humming

N_FILES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty short hums, and three files that cannot be read."""
    folder = hum_folder(tmp_path_factory.mktemp("sounds") / "hums", N_FILES)
    (folder / "007b.wav").write_text("no sound")
    (folder / "031b.wav").write_bytes(b"")
    soundfile.write(folder / "058b.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    return folder


BAD = ("007b.wav", "031b.wav", "058b.wav")


@pytest.fixture(scope="module")
def killed():
    """`killed(kills, seed, processes, *arguments)` tags with kills between, see killing.py."""
    with start_server("tests/tagging/killing.py") as run_task:
        yield lambda kills, seed, processes, *arguments: run_task(
            {"kills": kills, "seed": seed, "processes": processes, "arguments": [*map(str, arguments), "--quiet"]}
        )


def arguments_for(folder, checkpoint, output, *more):
    return folder, "-m", checkpoint, "--output", output, "-k", "2", "-c", "0.2", "--batch_size", "4", *more


def rows(path):
    if path.suffix == ".jsonl":
        found = []
        for line in path.read_text().splitlines():
            line = json.loads(line)
            place = line["filename"], line.get("start"), line.get("end")
            if "error" in line:
                found.append((*place, None, None, line["error"], None))
            found += [(*place, tag["label"], tag["probability"], None, None) for tag in line.get("tags", [])]
        return found
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return [*frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None)]


@pytest.fixture(scope="module")
def whole(folder, checkpoint, tmp_path_factory):
    """The rows of a run that nothing stopped, and its embeddings."""
    target = tmp_path_factory.mktemp("whole") / "tags.csv"
    embeddings = target.with_suffix(".h5")
    with pytest.raises(SystemExit):
        inference.main([*map(str, arguments_for(folder, checkpoint, target, "--embeddings", embeddings)), "--quiet"])
    found = rows(target)
    assert len(found) == N_FILES * 2 * 2 + len(BAD)
    return found, embeddings


def check_rows(path, whole):
    """The same rows, none twice and none missing, in whatever order."""
    found = sorted(rows(path), key=str)
    expected = sorted(whole[0], key=str)
    assert [row[:4] + row[5:] for row in found] == [row[:4] + row[5:] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[4] == pytest.approx(other[4], abs=1e-5)


def check_embeddings(path, whole):
    def by_window(path):
        with h5py.File(path) as file:
            names = file["filename"].asstr()[:][file["window/file"][:]]
            offsets = file["frame/offset"][:]
            frames = np.split(file["frame/embedding"][:], offsets[1:-1])
            keys = [*zip(names, file["window/start"][:], file["window/end"][:], strict=True)]
            assert len(set(keys)) == len(keys)
            return dict(zip(keys, zip(file["window/embedding"][:], frames, strict=True), strict=True))

    found, expected = by_window(path), by_window(whole[1])
    assert sorted(found) == sorted(expected)
    for key, (vector, frames) in expected.items():
        assert np.abs(found[key][0] - vector).max() <= 1e-5
        assert np.abs(found[key][1].astype(np.float32) - frames.astype(np.float32)).max() <= 2e-3


def left_over(path):
    return {p.name for p in path.parent.iterdir()} - {path.name, f"{path.name}.meta.json"}


@pytest.mark.parametrize(
    ("form", "processes", "seed"),
    [
        ("csv", [1], 1),
        ("jsonl", [2], 2),
        ("parquet", [1], 3),
        ("csv", [2, 2, 2, 1], 4),
        ("jsonl", [1, 1, 3], 5),
        ("parquet", [2, 1, 3], 6),
    ],
)
def test_killed_at_random_moments_the_rows_are_those_of_an_uninterrupted_run(
    folder, checkpoint, whole, tmp_path, killed, form, processes, seed
):
    target = tmp_path / f"tags.{form}"
    message = killed(5, seed, processes, *arguments_for(folder, checkpoint, target))
    check_rows(target, whole)
    assert sorted(message["codes"]) == [0] * (len(message["codes"]) - 1) + [1]  # the last one tells of unreadable files
    assert left_over(target) == set()
    assert all(f"{name}: " in message["log"] for name in BAD)
    n_left = N_FILES - sum(map(int, re.findall(r"(\d+) of \d+ files are done already", message["log"])))
    assert n_left < N_FILES
    assert 2 * n_left <= message["tagged"][-1] <= 2 * (n_left + len(BAD))  # what was done is not done again


@pytest.mark.parametrize("processes", [[1], [2, 2, 2, 1]])
def test_killed_at_random_moments_the_embeddings_are_those_of_an_uninterrupted_run(
    folder, checkpoint, whole, tmp_path, killed, processes
):
    target, embeddings = tmp_path / "tags.csv", tmp_path / "embeddings.h5"
    arguments = arguments_for(folder, checkpoint, target, "--embeddings", embeddings)
    message = killed(4, 6, processes, *arguments)
    assert sorted(message["codes"]) == [1]
    check_rows(target, whole)
    check_embeddings(embeddings, whole)
    assert left_over(target) == {"embeddings.h5"}


def test_two_processes_under_torchrun_write_what_one_writes(folder, checkpoint, whole, tmp_path):
    target, embeddings = tmp_path / "tags.csv", tmp_path / "embeddings.h5"
    arguments = arguments_for(folder, checkpoint, target, "--embeddings", embeddings, "--quiet")
    result = run_command(*torchrun(), "inference.py", *arguments)
    assert result.returncode == 1, result.stderr
    found = rows(target)
    assert [row[:4] for row in found] == [row[:4] for row in whole[0]]  # in the same order
    check_rows(target, whole)
    check_embeddings(embeddings, whole)
    assert left_over(target) == {"embeddings.h5"}
    assert f"3 of {N_FILES + 3} files could not be read" in result.stderr
    assert all(f"{name}: " in result.stderr for name in BAD)


@pytest.mark.parametrize("output", [("--format", "audacity", "--output"), ("--plot",), ("--embeddings",)])
def test_a_process_that_is_not_the_last_ends_well_though_files_cannot_be_read(checkpoint, tmp_path, killed, output):
    """Else torchrun would stop the others in the middle of their work."""
    folder = hum_folder(tmp_path / "sounds", 3)
    (folder / "000b.wav").write_text("no sound")  # of the second process, which has less to do
    message = killed(0, 0, [2], folder, "-m", checkpoint, *output, tmp_path / "out.h5")
    assert sorted(message["codes"]) == [0, 1]
    if output != ("--embeddings",):
        assert len(list((tmp_path / "out.h5").iterdir())) == 3 + 1
    assert not list(tmp_path.glob(".*"))


def test_all_is_well_where_all_files_can_be_read_by_two_processes(checkpoint, tmp_path, killed):
    folder = hum_folder(tmp_path / "sounds", 5)
    message = killed(0, 0, [2], folder, "-m", checkpoint, "--output", tmp_path / "tags.jsonl")
    assert message["codes"] == [0, 0]
    again = killed(0, 0, [2], folder, "-m", checkpoint, "--output", tmp_path / "tags.jsonl")
    assert (again["codes"], again["tagged"]) == ([0, 0], [0])
    assert len({name for name, *_ in rows(tmp_path / "tags.jsonl")}) == 5
    assert not [name for name in left_over(tmp_path / "tags.jsonl") if name != "sounds"]


def test_files_that_were_added_are_tagged_and_nothing_else(checkpoint, tmp_path):
    folder = hum_folder(tmp_path / "sounds", 3)
    target = tmp_path / "tags.csv"
    words = [str(folder), "-m", str(checkpoint), "--output", str(target), "-k", "1"]
    inference.main(words)
    before = target.read_bytes()
    soundfile.write(folder / "0000_new.wav", humming(50, 0.5), RATE)
    inference.main(words)
    assert target.read_bytes().startswith(before)
    assert [name.rsplit("/")[-1] for name, *_ in rows(target)] == ["000.wav", "001.wav", "002.wav", "0000_new.wav"]
