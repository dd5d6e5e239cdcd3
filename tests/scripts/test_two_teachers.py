"""The experiment of two teachers, on tones with tiny networks."""

import json

import pandas as pd
import pytest
import torch
import yaml

from common.errors import UserError
from models import create_model, save_checkpoint
from scripts.benchmarks.two_teachers import TwoTeachers, TwoTeachersOptions, main
from tests.training.test_embedding_training import SETTINGS


@pytest.fixture
def folder(tone_pack, tmp_path):
    """The lists of two sets of tones, two teachers and a configuration of students."""
    table = pd.read_csv(tone_pack, sep="\t").sort_values("filename")
    parts = {"unlabelled1": slice(21), "esc_train1": slice(21), "esc_test1": slice(21, None)}
    parts |= {"words_train": slice(14), "words_val": slice(14, 21), "words_test": slice(21, None)}
    (tmp_path / "lists").mkdir()
    for name, rows in parts.items():
        table[rows].to_csv(tmp_path / "lists" / f"{name}.tsv", sep="\t", index=False)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "one.pt", create_model("mn01_as", num_classes=0))
    student = SETTINGS | {"train_data": "", "embeddingspath": "", "epochs": 1}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    return tmp_path


def options(folder, **given):
    teachers = {"first": str(folder / "one.pt"), "second": "two.pt"}
    places = {"lists": str(folder / "lists"), "student": str(folder / "student.yaml"), "output": str(folder / "out")}
    return teachers | places | {"seeds": 1} | given


@pytest.mark.long
def test_students_of_each_teacher_and_of_both_are_probed_once(folder, capsys):
    given = options(folder, teacher_epochs=1)
    del given["second"]  # it is trained here
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    main(words)
    table = capsys.readouterr().out
    for row in ("first teacher", "second teacher", "student of first", "student of second", "student of both"):
        assert f"| {row}" in table
    (run,) = {path.parent for path in (folder / "out/runs/models/both").rglob("run.json")}
    entry = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"cosine_1", "cosine_2"} <= entry.keys()
    files = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.pt")}
    main(words)  # nothing is run again
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.pt")} == files


def test_a_folder_of_other_options_is_refused(folder):
    TwoTeachers(TwoTeachersOptions(**options(folder)))
    TwoTeachers(TwoTeachersOptions(**options(folder, seeds=3, only=[2])))
    with pytest.raises(UserError, match=r"has runs with other options \(teacher_weights\): give another --output"):
        TwoTeachers(TwoTeachersOptions(**options(folder, teacher_weights=[1, 2])))
