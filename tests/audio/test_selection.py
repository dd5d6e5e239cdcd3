import json
import time

import numpy as np
import pandas as pd
import pytest

from audio.labels import split_labels
from audio.ontology import Ontology
from audio.selection import SelectionSettings, select_clips
from common.errors import UserError

ONTOLOGY = Ontology({"Animal": ["Dog", "Cat"], "Dog": ["Bark", "Howl"], "Bark": ["Yip"], "Cat": ["Howl"]})


def random_table(n_clips, seed=0, labels=("Dog", "Bark", "Yip", "Howl", "Cat", "Speech", "Music")):
    rng = np.random.default_rng(seed)
    picked = rng.random((n_clips, len(labels))) < 0.2
    cells = [";".join(np.array(labels)[row]) for row in picked]
    return pd.DataFrame({"filename": [f"{number}.wav" for number in range(n_clips)], "labels": cells})


def slow_targets(cell, targets, below):
    """The targets of a clip, one label after the other."""
    return [target for target in targets if {target, *below[target]} & set(split_labels(cell))]


@pytest.mark.parametrize("ontology", [None, ONTOLOGY])
def test_all_clips_of_the_targets_are_chosen_and_negatives_have_none_of_them_nor_a_kind(ontology):
    table, targets = random_table(600), ["Cat", "Dog"]
    below = {"Cat": ["Howl"], "Dog": ["Bark", "Yip", "Howl"]} if ontology else {"Cat": [], "Dog": []}
    selection = select_clips(table, SelectionSettings(targets, negatives=50), ontology)
    labels = dict(zip(selection.rows, selection.labels, strict=True))
    n_negatives = 0
    for row, cell in enumerate(table["labels"]):
        expected = slow_targets(cell, targets, below)
        if expected:
            assert labels[row] == ";".join(expected)
        elif row in labels:
            assert (labels[row], bool(cell)) == ("Other", True)  # a clip without labels may be of any class
            n_negatives += 1
    assert n_negatives == selection.n_chosen["Other"] == 50
    assert selection.classes == ["Cat", "Dog", "Other"]
    for target in targets:
        of_target = [target in slow_targets(cell, targets, below) for cell in table["labels"]]
        by_name = [target in split_labels(cell) for cell in table["labels"]]
        assert selection.n_found[target] == selection.n_chosen[target] == sum(of_target)
        assert selection.n_by_kind[target] == sum(of_target) - sum(by_name)


def test_the_choice_depends_on_names_labels_and_seed_and_not_on_the_order_of_the_list():
    table = random_table(500)
    settings = SelectionSettings(["Dog"], negatives=40, balanced=True)
    chosen = select_clips(table, settings).take(table)
    shuffled = table.sample(frac=1, random_state=1)
    again = select_clips(shuffled, settings).take(shuffled)
    assert again.sort_values("filename", ignore_index=True).equals(chosen.sort_values("filename", ignore_index=True))
    other = select_clips(table, SelectionSettings(["Dog"], negatives=40, seed=1)).take(table)
    assert set(other["filename"]) != set(chosen["filename"])


def test_negatives_are_drawn_evenly_from_the_whole_list():
    table = pd.DataFrame({"filename": [f"{n}.wav" for n in range(10_000)], "labels": ["Dog"] + ["Speech"] * 9_999})
    rows = select_clips(table, SelectionSettings(["Dog"], negatives=1000)).rows
    counts = np.histogram(rows, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 60  # of 100 each, 4 standard deviations
    assert counts.max() < 140


def test_by_default_there_are_as_many_negatives_as_clips_of_the_targets():
    table = random_table(400)
    selection = select_clips(table, SelectionSettings(["Yip"]))
    assert selection.n_chosen["Other"] == selection.n_chosen["Yip"] > 50
    many = select_clips(table, SelectionSettings(["Dog", "Bark", "Yip", "Howl", "Cat", "Speech"]))
    assert many.n_chosen["Other"] == many.n_found["Other"] < len(many.rows) / 2  # all that there are
    assert "Other" not in select_clips(table, SelectionSettings(["Yip"], negatives=0)).classes


def test_balanced_targets_have_as_many_clips_as_the_rarest():
    labels = ["Dog"] * 70 + ["Cat"] * 20 + ["Dog;Cat"] * 5 + ["Cow"] * 9 + ["Speech"] * 50
    table = pd.DataFrame({"filename": [f"{n}.wav" for n in range(len(labels))], "labels": labels})
    selection = select_clips(table, SelectionSettings(["Dog", "Cat", "Cow"], balanced=True))
    assert selection.n_chosen["Cow"] == selection.n_chosen["Cat"] == selection.n_chosen["Other"] == 9
    assert selection.n_chosen["Dog"] == 9
    assert selection.n_found == {"Dog": 75, "Cat": 25, "Cow": 9, "Other": 50}
    assert len(set(selection.rows)) == len(selection.rows) == len(selection.labels)


def test_labels_may_be_mids_and_display_names_on_either_side():
    table = pd.DataFrame({"filename": ["a", "b", "c"], "labels": ["/m/0bt9lr;/m/05tny_", "Dog", "/m/09x0r"]})
    for label in ("Dog", "/m/0bt9lr"):
        selection = select_clips(table, SelectionSettings([label]))
        assert selection.labels == ["Dog", "Dog", "Other"]
        assert selection.n_by_kind == {"Dog": 0}


def test_without_labels_those_with_enough_clips_are_kept():
    table = pd.DataFrame({"filename": list("abcdef"), "labels": ["x", "x;y", "x", "y;z", "z", "w"]})
    selection = select_clips(table, SelectionSettings(min_clips=2))
    assert selection.classes == ["x", "y", "z"]
    assert selection.labels == ["x", "x;y", "x", "y;z", "z"]


def test_the_labels_that_a_clip_had_are_kept_and_other_columns_too():
    table = pd.DataFrame({"filename": list("abc"), "labels": ["x;y", "y", "z"], "speaker": list("123")})
    subset = select_clips(table, SelectionSettings(["y"], negatives=1)).take(table)
    assert subset["all_labels"].tolist() == ["x;y", "y", "z"]
    assert subset["labels"].tolist() == ["y", "y", "Other"]
    assert subset["speaker"].tolist() == ["1", "2", "3"]
    narrower = select_clips(subset, SelectionSettings(["y"], negatives=0)).take(subset)
    assert narrower["all_labels"].tolist() == ["x;y", "y"]


@pytest.mark.parametrize(
    ("labels", "settings", "sentence"),
    [
        (["Dog", "Cat"], SelectionSettings(["Dgo"]), "no clip has the label 'Dgo' (did you mean 'Dog'?)"),
        (["Dog bark", "Cat"], SelectionSettings(["dog"]), "no clip has the label 'dog'; labels: Dog bark, Cat"),
        (["Dog", "Cat"], SelectionSettings(["Howl"]), "clips of 'Howl' in the list: 0; expected at least 1"),
        (["Dog", "Cat"], SelectionSettings(["Dog"], min_clips=2), "clips of 'Dog' in the list: 1; expected at least 2"),
        (["Dog", "Cat"], SelectionSettings(min_clips=2), "none of the 2 labels has 2 clips"),
        (["Dog", "Cat"], SelectionSettings(["Dog"], negatives=2), "2 negatives are to be drawn, but only 1 of the 2"),
        (["Dog", "Other"], SelectionSettings(["Other"]), "negatives cannot have the label 'Other'"),
        (["Dog", "Cat"], SelectionSettings(["Dog", "/m/0bt9lr"]), "the label 'Dog' is given twice"),
        (["", ""], SelectionSettings(["Dog"]), "no clip of the list has a label"),
        ([], SelectionSettings(["Dog"]), "the list has no clips"),
    ],
)
def test_faults_are_sentences(labels, settings, sentence):
    table = pd.DataFrame({"filename": list("abcdef"[: len(labels)]), "labels": labels}, dtype=str)
    with pytest.raises(UserError) as fault:
        select_clips(table, settings)
    assert sentence in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_clip_that_is_named_twice_is_refused():
    table = pd.DataFrame({"filename": ["a", "b", "a"], "labels": ["x", "y", "x"]})
    with pytest.raises(UserError, match="rows with the name of an earlier row: 1 \\(a\\)"):
        select_clips(table, SelectionSettings(["x"]))


def test_kinds_of_a_class_are_all_below_it_each_once():
    assert ONTOLOGY.descendants("Animal") == {"Dog", "Cat", "Bark", "Howl", "Yip"}
    assert ONTOLOGY.descendants("Yip") == ONTOLOGY.descendants("Speech") == set()
    assert Ontology({"a": ["b"], "b": ["a"]}).descendants("a") == {"b"}  # a loop ends


def test_an_ontology_is_read_by_names_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "ontology.json"
    bark = {"id": "/m/2", "name": "Bark", "child_ids": []}
    path.write_text(json.dumps([{"id": "/m/1", "name": "Dog", "child_ids": ["/m/2", "/m/9"]}, bark]))
    assert Ontology.read(path).children == {"Dog": ["Bark"], "Bark": []}
    for text in ("{}", "[]", "[1]", '[{"id": "/m/1", "name": "Dog", "child_ids": "x"}]', "no", '[{"name": "Dog"}]'):
        path.write_text(text)
        with pytest.raises(UserError, match="AudioSet's ontology"):
            Ontology.read(path)


def test_half_a_million_clips_take_seconds():
    table = random_table(20_000)
    table = pd.concat([table] * 25, ignore_index=True)
    table["filename"] = np.char.add(np.arange(len(table)).astype(str), ".wav")
    start = time.process_time()
    selection = select_clips(table, SelectionSettings(["Dog", "Cat"], negatives=20_000), ONTOLOGY)
    assert time.process_time() - start < 5
    assert selection.n_chosen["Other"] == 20_000
