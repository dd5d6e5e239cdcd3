import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from audio.selection import compute_order
from common.errors import UserError
from scripts.lists.groups import find_groups, join_groups
from scripts.lists.options import ListOptions
from scripts.lists.splits import (
    choose_split_column,
    count_split_groups,
    draw_split,
    keep_published,
    read_published_lists,
)
from scripts.lists.stratification import stratify

SHARES = [0.6, 0.2, 0.2]


def split(labels, groups=None, shares=SHARES, seed=0, first_has_all=True):
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    order = compute_order([str(i) for i in range(len(labels))], seed)
    return stratify(labels, groups, shares, order, first_has_all=first_has_all)


def counts_of(labels, lists, n_lists=3):
    """Clips of each label in each list."""
    counted = {}
    for cell, number in zip(labels, lists, strict=True):
        for label in cell.split(";"):
            counted.setdefault(label, [0] * n_lists)[number] += 1
    return counted


def random_labels(n, n_labels, rng, most=4):
    popularity = 1 / np.arange(1, n_labels + 1)
    popularity /= popularity.sum()
    drawn = [rng.choice(n_labels, size=rng.integers(1, most + 1), p=popularity) for _ in range(n)]
    return [";".join(f"l{label:03d}" for label in sorted(set(labels.tolist()))) for labels in drawn]


def chi_square(labels, lists, shares=SHARES):
    cost = 0.0
    for counted in [*counts_of(labels, lists, len(shares)).values(), np.bincount(lists, minlength=len(shares))]:
        total = sum(counted)
        cost += (
            sum((n - total * share) ** 2 / (total * share) for n, share in zip(counted, shares, strict=True)) / total
        )
    return cost


@pytest.mark.parametrize(
    ("n", "expected"),
    [(100, [60, 20, 20]), (10, [6, 2, 2]), (5, [3, 1, 1]), (4, [2, 1, 1]), (3, [1, 1, 1]), (1, [1, 0, 0])],
)
def test_each_label_has_its_share_in_each_list(n, expected):
    labels = [f"l{label}" for label in range(7) for _ in range(n)]
    assert list(counts_of(labels, split(labels)).values()) == [expected] * 7


def test_a_label_with_two_clips_is_in_train_and_one_other_list_and_both_get_some():
    labels = [f"l{label}" for label in range(20) for _ in range(2)]
    counted = counts_of(labels, split(labels))
    assert all(n[0] == 1 for n in counted.values())
    assert sorted(Counter(tuple(n) for n in counted.values()).values()) == [10, 10]


def greedy(labels, order, shares):
    """The method as the head of stratification.py has it, for single clips, with everything counted anew each time."""
    sets = [{*cell.split(";")} for cell in labels]
    list_of = {}
    clips_of = {label: [i for i in np.argsort(order) if label in sets[i]] for label in set().union(*sets)}
    while any(i not in list_of for i in range(len(labels))):
        left = {label: [i for i in clips if i not in list_of] for label, clips in clips_of.items()}
        label = min((len(clips), label) for label, clips in left.items() if clips)[1]
        for number, i in enumerate(left[label]):
            gains = [0.0] * len(shares)
            for part in [*sorted(sets[i]), None]:
                clips = clips_of[part] if part else list(range(len(labels)))
                for which, share in enumerate(shares):
                    has = sum(list_of.get(j) == which for j in clips)
                    expected = share * len(clips) - has
                    gains[which] += (2 * expected - 1) / (share * len(clips))
            lacking = [which for which in range(len(shares)) if which not in {list_of.get(j) for j in clips_of[label]}]
            n_left = len(left[label]) - number
            allowed = range(len(shares)) if n_left > len(lacking) else lacking
            if n_left == 1 and 0 in lacking:
                allowed = [0]
            list_of[i] = max(allowed, key=lambda which: round(gains[which], 9))
    return [list_of[i] for i in range(len(labels))]


@pytest.mark.parametrize("seed", range(4))
def test_single_clips_are_shared_out_as_a_plain_program_does(seed):
    labels = random_labels(60, 12, np.random.default_rng(seed))
    shares = [0.61, 0.22, 0.17]  # no ties, which the last bit of a sum would decide
    order = compute_order([str(i) for i in range(60)], 0)
    assert split(labels, shares=shares).tolist() == greedy(labels, order, shares)


def test_several_labels_a_clip_are_stratified_far_better_than_by_chance():
    rng = np.random.default_rng(0)
    labels = random_labels(4000, 150, rng)
    lists = split(labels)
    assert np.abs(np.bincount(lists) / 4000 - SHARES).max() < 0.002
    counted = counts_of(labels, lists)
    assert all(min(n) > 0 for n in counted.values() if sum(n) >= 3)
    frequent = [n for n in counted.values() if sum(n) >= 50]
    assert np.abs(np.array([np.array(n) / sum(n) for n in frequent]) - SHARES).max() < 0.02
    by_chance = chi_square(labels, rng.permutation(lists))
    assert chi_square(labels, lists) < by_chance / 10


def test_groups_are_never_split_and_every_label_is_in_every_list_where_they_allow():
    rng = np.random.default_rng(1)
    sizes = rng.lognormal(1.5, 1, 400).astype(int) + 1
    groups = np.repeat(np.arange(400), sizes)
    label_of = rng.integers(0, 20, 400)
    labels = [f"l{label_of[group]}" for group in groups]
    lists = split(labels, groups)
    assert count_split_groups(groups, [str(number) for number in lists]) == 0
    counted = np.array(list(counts_of(labels, lists).values()))
    assert np.abs(counted / counted.sum(axis=1, keepdims=True) - SHARES).max() < 0.05


def test_few_groups_are_shared_out_better_than_any_of_hundreds_of_draws():
    """30 speakers who say different words; greedy alone is beaten here."""
    rng = np.random.default_rng(2)
    groups = rng.choice(25, size=2000, p=rng.dirichlet(np.ones(25)))
    groups = np.unique(groups, return_inverse=True)[1]
    habits = rng.dirichlet(np.ones(20), size=25)
    labels = [f"l{rng.choice(20, p=habits[group])}" for group in groups]
    found = chi_square(labels, split(labels, groups))
    draws = [chi_square(labels, rng.choice(3, size=groups.max() + 1, p=SHARES)[groups]) for _ in range(500)]
    assert found < 0.9 * min(draws)


def test_the_split_is_a_function_of_names_labels_and_seed():
    rng = np.random.default_rng(3)
    labels = random_labels(300, 20, rng)
    names = [f"n{i}" for i in range(300)]
    for groups in (np.arange(300), rng.integers(0, 40, 300)):
        groups = np.unique(groups, return_inverse=True)[1]
        lists = stratify(labels, groups, SHARES, compute_order(names, 7))
        rows = rng.permutation(300)
        again = stratify(
            [labels[row] for row in rows],
            rng.permutation(groups.max() + 1)[groups[rows]],
            SHARES,
            compute_order([names[row] for row in rows], 7),
        )
        assert again.tolist() == lists[rows].tolist()
        assert stratify(labels, groups, SHARES, compute_order(names, 8)).tolist() != lists.tolist()


def test_clips_without_labels_have_their_share_too():
    labels = ["a"] * 10 + [""] * 90
    lists = split(labels)
    assert np.bincount(lists).tolist() == [60, 20, 20]
    assert np.bincount(lists[:10]).tolist() == [6, 2, 2]
    assert np.bincount(split([""] * 50)).tolist() == [30, 10, 10]


def test_as_many_labels_as_clips_take_no_quadratic_time():
    labels = [f"l{i};m{i % 7}" for i in range(30_000)]
    start = time.process_time()
    lists = split(labels, np.arange(30_000) // 2)
    assert (
        time.process_time() - start < 10
    )  # half a second; a minute and more where all labels are gone through for each
    assert not lists.any()  # each label is in one group alone, so train has all


def test_groups_are_joined_by_every_column_and_by_equal_files():
    one, two = ["a", "a", "b", "", "", "c"], ["", "x", "x", "y", "z", "z"]
    assert join_groups(6, [one]).tolist() == [0, 0, 1, 2, 3, 4]
    assert join_groups(6, [one, two]).tolist() == [0, 0, 0, 1, 2, 2]
    assert join_groups(6, [one, two], [[3, 4]]).tolist() == [0, 0, 0, 1, 1, 1]
    assert join_groups(3, []).tolist() == [0, 1, 2]


def test_joined_groups_are_the_connected_components():
    rng = np.random.default_rng(0)
    columns = [[str(key) for key in rng.integers(0, 80, 100)] for _ in range(2)]
    groups = join_groups(100, columns)
    reached = np.eye(100, dtype=bool) | np.any(
        [[[a == b for b in column] for a in column] for column in columns], axis=0
    )
    for _ in range(100):
        reached = reached @ reached
    assert np.array_equal(groups[:, None] == groups, reached)


def clips(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"filename": [f"d{i % 2}/x/{i}.wav" for i in range(n)], **columns})


def test_groups_come_from_columns_folders_and_usual_names():
    table = clips(labels=list("aabb"), speaker=list("pqpp"), take=list("1234"))
    assert find_groups(table, "").columns == ["speaker"]
    assert find_groups(table, "").joined.tolist() == [0, 1, 0, 0]
    assert find_groups(table, "none").joined.tolist() == [0, 1, 2, 3]
    assert find_groups(table, "take").joined.tolist() == [0, 1, 2, 3]
    by_folder = find_groups(table, "folder")
    assert by_folder.joined.tolist() == [0, 1, 0, 1]
    assert table["folder"].tolist() == ["d0/x", "d1/x", "d0/x", "d1/x"]
    assert find_groups(table, "speaker,folder").joined.tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="did you mean 'speaker'"):
        find_groups(table, "speakr")


def test_identical_files_are_joined_and_noted():
    groups = find_groups(clips(labels=list("aabb")), "", [["d0/x/0.wav", "d0/x/2.wav"], ["d1/x/1.wav", "gone.wav"]])
    assert groups.joined.tolist() == [0, 1, 0, 2]
    assert groups.by_column.tolist() == [0, 1, 2, 3]
    assert groups.identical == [[0, 2]]
    assert "different labels: 1 sets (d0/x/0.wav (a), d0/x/2.wav (b))" in "\n".join(groups.notes)


def draw(labels, groups=None, **options):
    groups = np.arange(len(labels)) if groups is None else np.array(groups)
    return draw_split(
        labels, groups, ListOptions(folder="sounds", **options), compute_order([str(i) for i in range(len(labels))], 0)
    )


def test_lists_with_a_share_of_zero_are_left_out():
    drawn = draw(["a"] * 10, valid=0, test=0.3)
    assert Counter(drawn.lists) == {"train": 7, "test": 3}
    assert draw(["a"] * 10, valid=0, test=0).names == ["train"]


def test_folds_are_equal_and_the_first_two_are_test_and_valid():
    drawn = draw([label for label in "abc" for _ in range(10)], folds=5)
    assert drawn.folds is not None
    assert Counter(drawn.folds) == dict.fromkeys("12345", 6)
    assert {(fold, name) for fold, name in zip(drawn.folds, drawn.lists, strict=True)} == {
        ("1", "test"), ("2", "valid"), ("3", "train"), ("4", "train"), ("5", "train"),
    }  # fmt: skip
    assert set(draw(["a"] * 10, folds=2).lists) == {"test", "train"}
    assert Counter(draw(["a"] * 10, folds=5, valid=0).lists) == {"test": 2, "train": 8}


def test_lists_that_stay_empty_are_an_error():
    with pytest.raises(UserError, match="leave valid and test without a clip"):
        draw(["a", "b", "c"])
    with pytest.raises(UserError, match=r"9 clips in 2 groups .* leave test"):
        draw(["a"] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1])
    with pytest.raises(UserError, match="cannot fill 5 folds"):
        draw(["a"] * 4, folds=5)


@pytest.mark.parametrize(
    ("values", "read"),
    [
        (["train", "Test", "val"], {"train": "train", "Test": "test", "val": "valid"}),
        (["dev", "eval"], {"dev": "train", "eval": "test"}),
        (["training", "dev", "testing"], {"training": "train", "dev": "valid", "testing": "test"}),
        (["1", "2", "10"], None),
        (["fold1", "fold2"], None),
    ],
)
def test_published_names_of_lists_are_known(values, read):
    assert read_published_lists(pd.Series(values, name="split")) == read


@pytest.mark.parametrize("values", [["train", "other"], ["1", "1"], ["train", "1"], [str(i) for i in range(101)]])
def test_other_values_are_no_split(values):
    with pytest.raises(UserError, match="the column 'split' holds"):
        read_published_lists(pd.Series(values, name="split"))


def keep(values, valid=0.2, labels=None, groups=None, name="split"):
    labels = ["a"] * len(values) if labels is None else labels
    groups = np.arange(len(values)) if groups is None else np.array(groups)
    order = compute_order([str(i) for i in range(len(values))], 0)
    return keep_published(pd.Series(values, name=name), labels, groups, valid, order)


def test_a_published_split_is_kept():
    kept = keep(["train", "val", "test", "train"])
    assert kept.lists == ["train", "valid", "test", "train"]
    assert kept.published
    assert keep(["train", "val", "train"]).lists == ["train", "valid", "train"]


def test_valid_clips_are_drawn_from_train_where_none_are_published():
    labels = ["a"] * 10 + ["b"] * 10 + ["a"] * 5
    groups = [i // 2 for i in range(20)] + [20] * 5
    kept = keep(["train"] * 20 + ["test"] * 5, labels=labels, groups=groups)
    assert kept.lists[20:] == ["test"] * 5
    assert Counter(zip(labels[:20], kept.lists[:20], strict=True)) == {
        ("a", "train"): 8, ("a", "valid"): 2, ("b", "train"): 8, ("b", "valid"): 2,
    }  # fmt: skip
    assert count_split_groups(np.array(groups), kept.lists) == 0
    assert keep(["train"] * 4 + ["test"], valid=0).names == ["train", "test"]


def test_published_folds_are_kept_in_the_order_of_their_numbers():
    kept = keep(["10", "2", "9", "10"], name="fold")
    assert kept.folds == ["10", "2", "9", "10"]
    assert kept.lists == ["train", "test", "valid", "train"]


def test_the_column_of_a_split_is_found_or_an_error():
    table = clips(labels=["a"], Fold=["1"], set=["train"])
    assert choose_split_column(table) == "Fold"
    assert choose_split_column(table, "set") == "set"
    assert choose_split_column(table, "none") == ""
    assert choose_split_column(clips(labels=["a"])) == ""
    with pytest.raises(UserError, match="did you mean 'set'"):
        choose_split_column(table, "sett")
