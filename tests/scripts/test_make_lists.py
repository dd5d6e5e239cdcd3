import csv
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio.dataset import Pack
from audio.manifest import read_manifest
from scripts.make_lists import main
from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("my_sounds", "--folds", "5")` gives the exit status, what was printed, and the errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["make_lists.py", *words])
        status = 0
        try:
            main([*map(str, words)])
        except SystemExit as stopped:
            status = stopped.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def write(folder, *names):
    """Write files of different content."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} {number}".encode())


def read(folder="data"):
    return {
        name: read_manifest(f"{folder}/{name}.tsv", required=())
        for name in ("train", "valid", "test", "folds")
        if Path(f"{folder}/{name}.tsv").exists()
    }


def list_of_each(tables):
    return {name: part for part in ("train", "valid", "test") if part in tables for name in tables[part]["filename"]}


def rows(out):
    """The lines of the printed table: label → counts."""
    lines = out.split("\n\n")[1].splitlines()
    return {line.split("  ")[0]: [int(n) for n in line.split("  ", 1)[1].split()] for line in lines[1:]}


def test_a_folder_becomes_lists_that_pack(command, tmp_path):
    """Names with all that names can have, from the first command to the clips."""
    rng = np.random.default_rng(0)
    kinds = ["dog", 'it\'s "quoted"', "tab\there", "Zürich 日本", "a;b"]
    for kind in kinds:
        for number in range(5):
            path = tmp_path / "my sounds" / kind / f'x\t{number} "q".wav'
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, rng.uniform(-0.5, 0.5, 400), 8000)

    done = command(ROOT / "scripts/make_lists.py", "my sounds", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python scripts/wavlist_to_hdf5.py data/train.tsv data/mine" in done.stdout
    packed = {}
    for part, n in (("train", 15), ("valid", 5), ("test", 5)):
        with open(tmp_path / f"data/{part}.tsv", encoding="utf-8", newline="") as file:
            header, *listed = csv.reader(file, delimiter="\t")
        assert header == ["filename", "labels"]
        assert Counter(label for _, label in listed) == dict.fromkeys(kinds, n // 5)
        result = command(ROOT / "scripts/wavlist_to_hdf5.py", f"data/{part}.tsv", "data/mine", "-n", "0", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        table = read_manifest(tmp_path / f"data/mine/labels/{part}.tsv")
        packed |= dict(zip(table["filename"], table["labels"], strict=True))
    assert len(packed) == 25
    assert all(name.split("/")[1] == label for name, label in packed.items())


def test_names_are_those_that_find_prints(run, tmp_path):
    write(tmp_path, *(f"my_sounds/{kind}/{number}.wav" for kind in "ab" for number in range(10)))
    assert run("./my_sounds/", "--output", "out")[0] == 0
    assert set(list_of_each(read("out"))) == {
        f"./my_sounds/{kind}/{number}.wav" for kind in "ab" for number in range(10)
    }
    plain = list_of_each(read("out"))
    assert run(str(tmp_path / "my_sounds"), "--output", "other")[0] == 0
    absolute = list_of_each(read("other"))
    assert {name.rpartition("my_sounds")[2]: part for name, part in absolute.items()} == {
        name.rpartition("my_sounds")[2]: part for name, part in plain.items()
    }


def test_the_table_counts_what_the_lists_hold(run, tmp_path):
    write(tmp_path, *(f"s/{kind}/{number}.wav" for kind in ("a", "b;c", "c") for number in range(10)), "s/rare/1.wav")
    write(tmp_path, "s/x.txt", "s/.hidden.wav", "s/Dog/1.wav", "s/dog/1.wav")
    (tmp_path / "s/a/empty.wav").touch()
    (tmp_path / "s/b;c/copy.wav").write_bytes((tmp_path / "s/a/0.wav").read_bytes())
    status, out, _ = run("s")
    assert status == 0
    tables = read()
    shown = rows(out)
    for label in ("a", "b", "c", "rare", "Dog"):
        expected = [
            sum(label in cell.split(";") for cell in tables[part]["labels"]) for part in ("train", "valid", "test")
        ]
        assert shown[label][:3] == expected
    assert shown["clips"][:3] == [len(tables[part]) for part in ("train", "valid", "test")]
    assert shown["c"][3] == 21  # groups
    assert shown["clips"][3] == 33  # of 34 clips two are the same
    for text in (
        "rare (clips 1, groups 1, none in valid and test)",
        "'Dog' (1 clips) and 'dog' (1 clips)",
        "a/empty.wav",
        ".txt 1",
    ):
        assert text in out
    where = list_of_each(tables)
    assert where["s/a/0.wav"] == where["s/b;c/copy.wav"]
    assert "identical files with different labels: 1 sets" in out


def test_more_than_thirty_labels_are_summed(run, tmp_path):
    write(tmp_path, *(f"s/l{label:02d}/{number}.wav" for label in range(40) for number in range(5 if label else 10)))
    _, out, _ = run("s")
    shown = rows(out)
    assert len(shown) == 31
    assert next(iter(shown)) == "l00"
    assert shown["11 labels more"] == [33, 11, 11]
    assert shown["clips"] == [
        sum(counts) for counts in zip(*[n for label, n in shown.items() if label != "clips"], strict=True)
    ]


def test_identical_files_may_be_ignored(run, tmp_path):
    write(tmp_path, *(f"s/{kind}/{number}.wav" for kind in "ab" for number in range(10)))
    for kind in "ab":
        (tmp_path / f"s/{kind}/copy.wav").write_bytes(b"same")
    assert "same bytes" in run("s")[1]
    assert "same bytes" not in run("s", "--compare_content", "false")[1]


def test_a_pattern_with_a_speaker_keeps_speakers_apart(run, tmp_path):
    names = [f"s/{word}_{speaker}_{take}.wav" for word in ("yes", "no") for speaker in range(10) for take in range(3)]
    write(tmp_path, *names)
    status, out, _ = run("s", "--pattern", "{label}_{speaker}_{}.wav")
    assert status == 0
    tables = read()
    speakers = {part: set(table["speaker"]) for part, table in tables.items()}
    assert sorted(map(len, speakers.values())) == [2, 2, 6]
    assert len(set.union(*speakers.values())) == 10
    assert rows(out)["yes"] == [18, 6, 6, 10]
    _, out, _ = run("s", "--pattern", "{label}_{speaker}_{}.wav", "--group", "none")
    tables = read()
    assert set(tables["test"]["speaker"]) & set(tables["train"]["speaker"])


def test_spoken_words_stay_with_their_speakers(run, shared):
    folder = shared / "data" / "spoken_words"
    status, out, _ = run(str(folder), "--pattern", "{label}_{speaker}_{}_{}.flac")
    assert status == 0
    assert rows(out)["stop"] == [180, 60, 60, 30]
    assert rows(out)["clips"] == [1800, 600, 600, 30]
    tables = read()
    assert len(set(tables["train"]["speaker"])) == 18
    assert not set(tables["train"]["speaker"]) & (set(tables["valid"]["speaker"]) | set(tables["test"]["speaker"]))
    table = folder / "spoken_words.tsv"
    status, out, _ = run(str(folder), "--table", str(table), "--output", "published")
    published = read_manifest(table)
    where = list_of_each(read("published"))
    assert [where[f"{folder}/{name}"] for name in published["filename"]] == [
        {"val": "valid"}.get(name, name) for name in published["split"]
    ]


def test_esc10_keeps_its_folds(run, shared):
    folder = shared / "data" / "esc10"
    status, out, _ = run(str(folder), "--table", str(folder / "esc10.tsv"), "--label_column", "category")
    assert status == 0
    published = read_manifest(folder / "esc10.tsv")
    folds = read()["folds"].set_index("filename")
    assert folds["fold"][[f"{folder}/{name}" for name in published["filename"]]].tolist() == published["fold"].tolist()
    assert folds["labels"][f"{folder}/audio/1-100032-A.ogg"] == "dog bark"
    assert rows(out)["dog bark"] == [8, 8, 8, 8, 8]
    status, out, _ = run(str(folder), "--table", str(folder / "esc10.tsv"), "--split_column", "none", "--output", "own")
    assert rows(out)["74"] == [24, 8, 8]


def test_folds_can_be_probed(run, tone_pack, tmp_path, command):
    """folds.tsv, packed, has the columns that `run.py probe --data` reads."""
    source = tone_pack.parent.parent.parent / "sounds"
    for path in source.glob("*.wav"):
        kind = int(path.stem.split("_")[1]) % 7
        (tmp_path / f"s/kind {kind}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"s/kind {kind}/{path.name}").symlink_to(path)
    status, out, _ = run("s", "--folds", "4")
    assert status == 0
    assert rows(out)["kind 3"] == [1, 1, 1, 1]
    tables = read()
    assert len(tables["folds"]) == 28
    assert tables["test"]["fold"].tolist() == ["1"] * 7
    assert tables["valid"]["fold"].tolist() == ["2"] * 7
    result = command(ROOT / "scripts/wavlist_to_hdf5.py", "data/folds.tsv", "data/mine", "-n", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pack = Pack.open(tmp_path / "data/mine/labels/folds.tsv", required=("filename", "hdf5path", "labels", "fold"))
    assert Counter(pack.table["fold"]) == dict.fromkeys("1234", 7)


def test_a_published_split_that_leaks_is_reported(run, tmp_path):
    write(tmp_path, *(f"s/{number}.wav" for number in range(4)))
    (tmp_path / "s/4.wav").write_bytes((tmp_path / "s/0.wav").read_bytes())
    (tmp_path / "m.csv").write_text(
        "file,label,speaker,split\n0,a,x,train\n1,b,y,train\n2,a,y,test\n3,b,z,test\n4,a,x,val\n"
    )
    status, out, _ = run("s", "--table", "m.csv", "--valid", "0.3")
    assert status == 0
    assert "2 of 3 groups (by speaker) are in more than one published list" in out
    assert "1 sets of identical files are in more than one published list" in out
    assert "--valid not used" in out


def test_cuts_of_recordings_are_advised_on_and_not_acted_on(run, tmp_path):
    write(tmp_path, *(f"s/{kind}/rec{n}_{cut}.wav" for kind in "ab" for n in range(6) for cut in range(4)))
    _, out, _ = run("s")
    assert "advice" in out
    assert "groups" not in out.split("\n\n")[1]
    assert "advice" not in run("s", "--label_level", "first", "--pattern", "{recording}_{:d}")[1]


def test_lists_are_made_anew_but_not_over_others(run, tmp_path):
    write(tmp_path, *(f"s/{kind}/{number}.wav" for kind in "ab" for number in range(10)))
    assert run("s")[0] == 0
    first = (tmp_path / "data/train.tsv").read_bytes()
    assert run("s")[0] == 0
    assert (tmp_path / "data/train.tsv").read_bytes() == first
    status, out, _ = run("s", "--seed", "1", "--test", "0")
    assert status == 0
    assert "removed     data/test.tsv" in out
    assert (tmp_path / "data/train.tsv").read_bytes() != first
    assert json.loads((tmp_path / "data/lists.json").read_text())["seed"] == 1
    (tmp_path / "data/train.tsv").write_text("filename\tlabels\nmine.wav\ta\n")
    status, _, err = run("s")
    assert (status, err.count("\n")) == (1, 1)
    assert "data/train.tsv: exists" in err
    assert run("s", "--overwrite")[0] == 0
    assert (tmp_path / "data/train.tsv").read_bytes() == first


def test_labels_and_columns_of_a_table_cannot_break_the_lists(run, tmp_path):
    write(tmp_path, *(f"s/{number}.wav" for number in range(6)))
    rows_of = "".join(f'{number},"two\r\nlines","tab\tand ""quote"""\n' for number in range(6))
    (tmp_path / "m.csv").write_text(f"file,label,note\n{rows_of}", newline="")
    assert run("s", "--table", "m.csv")[0] == 0
    table = pd.concat(read().values())
    assert set(table["labels"]) == {"two lines"}
    assert set(table["note"]) == {'tab\tand "quote"'}


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ((), "FOLDER is missing", 2),
        (("nowhere",), "nowhere: there is no such folder", 1),
        (("void",), "void: the folder has no sound", 1),
        (("s", "--pattern", "{label}-{}"), "matches none of the 6 names, such as a/x_1.wav, a/x_2.wav", 1),
        (("s", "--pattern", "{speaker}_{}"), "has no {label}", 1),
        (("s", "--group", "folder"), "leave valid and test without a clip", 1),
        (("s", "--ouput", "x"), "unknown option --ouput (did you mean 'output'?)", 2),
        (("s", "--group", "foldre"), "did you mean 'folder'", 1),
        (("s", "--valid", "0.5", "--test", "0.5"), "leave no clips to train on", 2),
        (("s", "--valid", "1.5"), "--valid is 1.5; expected number, at least 0", 2),
        (("s", "--test", "nan"), "--test is 'nan'", 2),
        (("s", "--seed", "-1"), "--seed is -1", 2),
        (("s", "--folds", "1"), "--folds is 1", 2),
        (("s", "--folds", "3", "--test", "0.1"), "cannot be combined with --folds 3", 2),
        (("s", "--split_column", "split"), "--split_column 'split' is no column", 1),
        (("s", "--table", "m.csv"), "did you mean 'labl'", 1),
        (("s", "--overwrite", "maybe"), "'maybe' belongs to no option", 2),
        (("my", "sounds"), "'sounds' belongs to no option", 2),
        (("s", "--output", "m.csv"), "m.csv: is a file", 1),
    ],
)
def test_a_mistake_is_one_sentence(run, tmp_path, words, message, code):
    write(tmp_path, *(f"s/{kind}/x_{number}.wav" for kind in "ab" for number in (1, 2, 3)), "void/a.txt")
    (tmp_path / "m.csv").write_text("file,labl\nx_1,a\n")
    status, out, err = run(*words)
    assert (status, out) == (code, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_several_mistakes_are_reported_together(run):
    _, _, err = run("s", "--sed", "3", "--folds", "1")
    assert "2 faults" in err
    assert "did you mean 'seed'" in err


def test_help_names_every_option(run):
    status, out, err = run("--help")
    assert status == 0
    for option in ("pattern", "table", "group", "folds", "split_column", "label_level", "overwrite"):
        assert f"--{option}" in out + err


def test_a_folder_whose_name_joins_labels_is_named_with_what_to_do(run, tmp_path):
    write(tmp_path, *(f"s/{kind}/{number}.wav" for kind in ("a; b", "c") for number in range(10)))
    status, out, _ = run("s")
    assert status == 0
    assert "these names are several labels: 'a; b' (10 sounds: a;b); rename what is one label" in out
    assert "separates the labels" not in run("s", "--label_level", "none")[1]
    (tmp_path / "t.tsv").write_text("filename\tlabels\n" + "".join(f"c/{n}.wav\tx; y\n" for n in range(10)))
    assert (
        "these names are several labels" not in run("s", "--table", "t.tsv", "--output", "other")[1]
    )  # there it is meant


def test_a_list_of_audioset_labels_sounds_by_their_videos(run, tmp_path):
    ids = [f"{number:03}-_defghij"[:11] for number in range(12)]
    write(tmp_path, *(f"s/{half}/Y{ytid}_30.000.wav" for ytid in ids for half in ("a",)), "s/b/other.wav")
    rows = "".join(f'{ytid}, 30.000, 40.000, "/m/09x0r,/m/0dgbq"\n' for ytid in ids)
    (tmp_path / "segments.csv").write_text(f"# YTID, start_seconds, end_seconds, positive_labels\n{rows}")
    status, out, error = run("s", "--table", "segments.csv")
    assert status == 0, error
    assert "12 of them in the lists" in out
    assert set(read()["train"]["labels"]) == {"/m/09x0r;/m/0dgbq"}


def test_names_that_are_no_utf8_are_listed_split_and_packed(command, tmp_path):
    """As an archive from Windows leaves them on Linux."""
    for label in (b"stra\xdfe", b"s\xe4ge"):
        for number in range(5):
            path = tmp_path / "s" / os.fsdecode(label) / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                soundfile.write(file, np.random.default_rng(number).uniform(-0.5, 0.5, 400), 8000, format="WAV")
    done = command(ROOT / "scripts/make_lists.py", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "names that are not UTF-8 on disk, read as Windows-1252: 10" in done.stdout
    result = command(ROOT / "scripts/wavlist_to_hdf5.py", "data/train.tsv", "data/mine", "-n", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = read_manifest(tmp_path / "data/mine/labels/train.tsv")
    assert Counter(table["labels"]) == {"straße": 3, "säge": 3}
    assert set(table["filename"].str.split("/").str[1]) == {"straße", "säge"}
