"""Numbers in a column of labels beside the classes of a model."""

import logging

import pytest

from common.errors import Faults
from models.labels import audioset_labels
from tests.training.test_automatic import noise, write_pack
from training.label_numbers import check_label_numbers
from training.labelled import open_pack

OWN = ["ant", "bee", "cow", "dog", "elk"]


def check(tmp_path, cells, labels):
    sounds = [noise(0.05, 16000, number) for number in range(len(cells))]
    faults = Faults("the list")
    pack = open_pack(str(write_pack(tmp_path, sounds, cells)), faults, labelled=True)
    check_label_numbers(pack, labels, faults)
    return faults.sentences


@pytest.mark.parametrize("n_classes", [2, 10, 50])
def test_classes_that_are_counted_from_zero_are_no_classes_of_audioset(n_classes, tmp_path):
    (sentence,) = check(tmp_path, [str(number) for number in range(n_classes)], audioset_labels())
    assert f"the numbers 0 to {n_classes - 1} as labels, one a clip" in sentence
    assert "0 is 'Speech', 1 is 'Male speech, man speaking'" in sentence
    assert "run.py probe" in sentence


@pytest.mark.parametrize(
    ("cells", "labels", "message"),
    [
        (["0;1", "0;2", "1", "2"], audioset_labels(), None),  # speech, as AudioSet labels it
        (["74", "75", "74"], audioset_labels(), "74 is 'Dog', 75 is 'Bark'"),
        (["0", "0"], audioset_labels(), "0 is 'Speech'"),
        (["0", "1", "2"], OWN, "0 is 'ant', 1 is 'bee', 2 is 'cow'"),  # a list that lacks some of its classes
        (["ant", "1"], OWN, None),
        (["0", "1"], ["0", "1", "2"], None),  # names that are numbers
    ],
)
def test_other_numbers_are_taken_for_indexes_and_reported(cells, labels, message, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert check(tmp_path, cells, labels) == []
    assert (message or "") in caplog.text
    assert ("numbers are read as indices" in caplog.text) == (message is not None)
