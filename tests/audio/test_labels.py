import numpy as np
import pandas as pd
import pytest

from audio.labels import count_classes, describe_lookalikes, find_lookalikes, list_classes, parse_labels
from common.errors import UserError


def test_labels_become_sorted_indexes() -> None:
    labels = parse_labels(pd.Series(["74;5", "3", " 3 ; 3;"], name="labels"), 527)
    assert [label.tolist() for label in labels] == [[5, 74], [3], [3]]
    assert labels[0].dtype == np.int64


def test_all_wrong_labels_are_reported_together() -> None:
    column = pd.Series(["1", "dog", "10", "", "-1"], name="labels")
    with pytest.raises(UserError) as caught:
        parse_labels(column, 10, names=list("abcde"))
    text = str(caught.value)
    assert "has 4 faults" in text
    assert "row 2 (b): 'dog' is no class; wanted whole numbers from 0 to 9" in text
    assert "row 3 (c): '10'" in text
    assert "row 4 (d): no label" in text
    assert "row 5 (e): '-1'" in text


def test_a_million_wrong_labels_are_reported_in_a_page() -> None:
    with pytest.raises(UserError, match="and so in 99 rows more") as caught:
        parse_labels(pd.Series(["x"] * 100), 10)
    assert len(str(caught.value).splitlines()) < 30


def test_audiosets_identifiers_and_display_names_stand_for_each_other() -> None:
    column = pd.Series(["/m/09x0r;/m/0dgbq", "Speech", "Civil defense siren;/m/09x0r"], name="labels")
    named = parse_labels(column, ["Civil defense siren", "Dog", "Speech"])
    assert [label.tolist() for label in named] == [[0, 2], [2], [0, 2]]
    identified = parse_labels(column, ["/m/09x0r", "/m/0dgbq"])
    assert [label.tolist() for label in identified] == [[0, 1], [0], [0, 1]]


def test_an_identifier_that_no_class_has_is_a_fault() -> None:
    with pytest.raises(UserError, match=r"'/m/0bt9lr' is no class"):
        parse_labels(pd.Series(["/m/0bt9lr"], name="labels"), ["Speech"])  # Dog


def test_classes_of_a_list_are_display_names_in_order() -> None:
    assert list_classes(["/m/09x0r;b", "Speech", " a ;; b"]) == ["Speech", "a", "b"]
    assert list_classes(["10;9", "1"]) == ["1", "9", "10"]
    assert list_classes(["/m/0unknown"]) == ["/m/0unknown"]


def test_classes_are_counted_once_a_clip() -> None:
    assert count_classes(["dog;dog", "dog;cat", "/m/09x0r;Speech"]) == {"dog": 2, "cat": 1, "Speech": 1}


def test_dog_beside_dog_is_named_with_both_counts() -> None:
    counts = count_classes(["Dog"] * 12 + ["dog"] * 3 + ["cat"] + ["sea waves", "Sea_Waves"])
    assert find_lookalikes(counts) == [["Dog", "dog"], ["Sea_Waves", "sea waves"]]
    sentence = describe_lookalikes(counts)
    assert "'Dog' (12 clips) and 'dog' (3 clips)" in sentence
    assert "'Sea_Waves' (1 clips) and 'sea waves' (1 clips)" in sentence
    assert "write them alike" in sentence
    assert describe_lookalikes({"dog": 3, "dogs": 1}) == ""
