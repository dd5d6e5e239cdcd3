import json
import logging
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.dataset import Pack
from audio.manifest import read_manifest
from audio.pack import pack
from models.labels import read_labels
from scripts import make_lists
from scripts.make_subset import main

SEGMENTS = """# Segments csv created
# num_ytids=5
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/0bt9lr,/t/dd00088"
-0mjrMposBM, 80.000, 90.000, "/m/05tny_"
-1HlfoHZCEE, 6.000, 16.000, "/m/09x0r"
-1OlgJWehn8, 30.000, 40.000, "/m/04rlf,/m/06bz3"
-1PZQg5Gi8A, 0.000, 9.000, "/t/dd00002,/m/09x0r"
"""
BARK = {"id": "/m/05tny_", "name": "Bark", "child_ids": []}
ONTOLOGY = json.dumps([{"id": "/m/0bt9lr", "name": "Dog", "child_ids": ["/m/05tny_"]}, BARK])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("list.tsv", "--labels", "Dog")` gives the exit status, what was printed, and the errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)  # commands of other tests set another

    def call(*words, command=main):
        status = 0
        try:
            command([*map(str, words)])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    monkeypatch.setattr(sys, "argv", ["make_subset.py"])
    return call


def write_table(path, rows, columns="filename labels"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [columns.split(), *rows]))


def test_a_subset_of_audiosets_segments_is_a_list_with_classes_and_a_record(run, tmp_path):
    (tmp_path / "segments.csv").write_text(SEGMENTS)
    (tmp_path / "ontology.json").write_text(ONTOLOGY)
    words = ("--labels", "Dog", "Baby cry, infant cry", "--negatives", "1", "--output", "data/set/train.tsv")
    status, out, err = run("segments.csv", *words)
    assert (status, err) == (0, "")
    table = read_manifest("data/set/train.tsv", required=("filename", "labels"))
    assert table["filename"].tolist()[:2] == ["Y--PJHxphWEs_30.000.wav", "Y-0mjrMposBM_80.000.wav"]
    assert table["labels"].tolist()[:2] == ["Dog", "Dog"]  # a bark is a dog's
    assert sorted(table["labels"][2:]) == ["Baby cry, infant cry", "Other"]
    assert table["all_labels"][0] == "/m/0bt9lr;/t/dd00088"
    assert table["start_seconds"][0] == "30.000"
    assert read_labels("data/set/train_labels.csv") == ["Dog", "Baby cry, infant cry", "Other"]
    record = json.loads((tmp_path / "data/set/train.json").read_text())
    assert record["clips"] == {"Dog": 2, "Baby cry, infant cry": 1, "Other": 1}
    assert record["clips_by_kind"] == {"Dog": 1, "Baby cry, infant cry": 0}
    assert record["lists"].keys() == {"segments.csv"}
    rows = [line.split() for line in out.splitlines()]
    assert ["Dog", "2", "1", "2"] in rows
    assert "0 of the 4 files are here" in out
    assert "next        python scripts/wavlist_to_hdf5.py data/set/train.tsv data/set" in out
    # without the ontology, a bark is none, and may be a negative
    status, out, _ = run("segments.csv", *words, "--ontology", "none", "--overwrite")
    assert ["Dog", "1", "0", "1"] in [line.split() for line in out.splitlines()]


def test_sounds_are_found_below_a_folder_and_clips_without_one_left_out(run, tmp_path):
    (tmp_path / "segments.csv").write_text(SEGMENTS)
    for name in ("--PJHxphWEs.wav", "deep/Y-1HlfoHZCEE_6.000.flac", "-1OlgJWehn8_30000_40000.wav", "unrelated.wav"):
        (tmp_path / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sounds" / name).write_bytes(name.encode())
    status, out, err = run(
        "segments.csv", "--labels", "Dog", "--folder", "sounds", "--negatives", 2, "--output", "s.tsv"
    )
    assert (status, err) == (0, "")
    table = read_manifest("s.tsv")
    assert sorted(table["filename"]) == [
        "sounds/--PJHxphWEs.wav",
        "sounds/-1OlgJWehn8_30000_40000.wav",
        "sounds/deep/Y-1HlfoHZCEE_6.000.flac",
    ]
    assert "3 clips in segments.csv with a sound below sounds" in out
    assert "3 of the 3 files are here" in out


def test_names_beside_their_list_are_found_from_the_subset(run, tmp_path):
    write_table(tmp_path / "lists/a.tsv", [["x.wav", "Dog"], ["y.wav", "Cat"]])
    (tmp_path / "lists/x.wav").write_bytes(b"x")
    (tmp_path / "b.csv").write_text('filename,labels,speaker\nz.wav,"Dog",me\n')
    status, _, err = run("lists/a.tsv", "b.csv", "--labels", "Dog", "--output", "other/s.tsv")
    assert (status, err) == (0, "")
    table = read_manifest("other/s.tsv")
    assert table["filename"].tolist() == ["lists/x.wav", "y.wav", "z.wav"]
    assert table["speaker"].tolist() == ["", "", "me"]


def test_a_subset_of_a_pack_is_read_as_one(run, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * rng.standard_normal(800), 8000)
    rows = [[f"{number}.wav", ("Dog", "Cat", "Cow")[number % 3]] for number in range(6)]
    write_table(tmp_path / "all.tsv", rows)
    pack(read_manifest("all.tsv"), "all.tsv", "data", "all", sample_rate=8000, n_workers=1)
    status, out, _ = run("data/labels/all.tsv", "--labels", "Cow", "Dog", "--negatives", 1, "--output", "set/s.tsv")
    assert status == 0
    assert "next" not in out
    whole, part = Pack.open("data/labels/all.tsv"), Pack.open("set/s.tsv", required=("filename", "labels", "hdf5path"))
    assert len(part) == 5
    for row, name in enumerate(part.names):
        assert np.array_equal(part.read(row), whole.read(whole.names.index(name)))


def test_numbers_are_indices_of_audioset_unless_they_are_what_is_chosen(run, tmp_path):
    write_table(tmp_path / "n.tsv", [["a.wav", "74;75"], ["b.wav", "0"], ["c.wav", "75"]])
    assert run("n.tsv", "--labels", "Dog", "--output", "names.tsv")[0] == 0
    assert read_manifest("names.tsv")["labels"].tolist() == ["Dog", "Other"]
    assert run("n.tsv", "--labels", "75", "--output", "numbers.tsv")[0] == 0
    assert read_manifest("numbers.tsv")["labels"].tolist() == ["75", "Other", "75"]


def test_a_second_call_changes_nothing_and_other_files_stay(run, tmp_path):
    write_table(tmp_path / "a.tsv", [["x.wav", "Dog"], ["y.wav", "Cat"]])
    assert run("a.tsv", "--labels", "Dog", "--output", "s.tsv")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("a.tsv", "--labels", "Dog", "--output", "s.tsv")[0] == 0
    status, _, err = run("a.tsv", "--labels", "Cat", "--output", "s.tsv")
    assert status == 1
    assert "exists with other content; choose another --output, or add --overwrite" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run("a.tsv", "--labels", "Cat", "--output", "s.tsv", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        ([["x", "Dog"], ["y", "Cat"]], ["--labels", "Dgo"], "a.tsv: no clip has the label 'Dgo' (did you mean 'Dog'?)"),
        ([["x", "Dog"], ["y", "Cat"]], ["--labels", "Bark"], "a.tsv: clips of 'Bark' in the list: 0"),
        ([["x", "Dog"], ["y", "Cat"]], ["--labels", "Dog", "--negatives", "2"], "2 negatives are to be drawn"),
        ([["x", "Dog"], ["x", "Cat"]], ["--labels", "Dog"], "a.tsv: rows with the name of an earlier row: 1 (x)"),
        ([["x", ""], ["y", ""]], ["--labels", "Dog"], "a.tsv: no clip of the list has a label"),
        ([], ["--labels", "Dog"], "a.tsv: the table has a header but no rows"),
        ([["x", "Dog"], ["y", "Cat"]], [], "--labels is missing"),
        ([["x", "Dog"], ["y", "Cat"]], ["--labels", "Dog", "--ontology", "o.json"], "o.json: cannot be read"),
        ([["x", "Dog"], ["y", "Cat"]], ["--labels", "Dog", "--output", "out.json"], "expected the name of a list"),
    ],
)
def test_faults_are_one_sentence_and_nothing_is_written(run, tmp_path, rows, words, sentence):
    write_table(tmp_path / "a.tsv", rows)
    status, out, err = run("a.tsv", "--output", "out/s.tsv", *words)
    assert (status, out) == (1, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]


def test_make_lists_chooses_by_the_same_rule(run, tmp_path):
    for number in range(60):
        path = tmp_path / "sounds" / ("Dog", "Cat", "Cow")[number % 3] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{number}".encode())
    words = ("--labels", "Dog", "--negatives", "10")
    status, out, err = run("sounds", *words, command=make_lists.main)
    assert (status, err) == (0, "")
    lists = pd.concat([read_manifest(f"data/{name}.tsv") for name in ("train", "valid", "test")])
    assert lists["labels"].value_counts().to_dict() == {"Dog": 20, "Other": 10}
    assert ["Other", "40", "10"] in [line.split() for line in out.splitlines()]
    status, _, err = run("sounds", "--negatives", "10", command=make_lists.main)
    assert status != 0
    assert "--negatives 10 is the number of clips without any of --labels" in err
