import csv

import pytest

from common.errors import UserError
from models import audioset_labels, read_labels
from models.labels import AUDIOSET_LABELS


def test_audioset_names_are_the_published_ones(shared):
    with open(shared / "data" / "audioset" / "class_labels_indices.csv", newline="") as file:
        published = [row["display_name"] for row in csv.DictReader(file)]
    assert audioset_labels() == published
    assert len(published) == 527


def test_every_name_of_the_shipped_table_is_quoted():
    lines = AUDIOSET_LABELS.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "index,mid,display_name"
    for index, line in enumerate(lines[1:]):
        number, mid, name = line.split(",", 2)
        assert number == str(index)
        assert mid.startswith(("/m/", "/g/", "/t/"))
        assert name[0] == name[-1] == '"'


def test_a_list_given_out_can_be_changed_without_harm():
    audioset_labels().clear()
    assert len(audioset_labels()) == 527


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("index,mid,display_name\n", "no labels below the header"),
        ('index,mid,display_name\n1,/m/a,"Speech"\n', "row 2 reads"),
        ("index,mid,display_name\n0,/m/a,Male speech, man speaking\n", "names with commas are quoted"),
    ],
)
def test_broken_tables_are_reported(tmp_path, text, sentence):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_labels(tmp_path / "labels.csv")


def test_a_missing_table_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a label table"):
        read_labels(tmp_path / "none.csv")
