import numpy as np

from training.holdout import hold_out


def test_clips_are_held_out_of_every_class_and_by_name_alone():
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), [50, 30, 20, 1])
    names = [f"{index}.wav" for index in range(101)]
    labels = [np.array([kind]) for kind in kinds]
    held = hold_out(names, labels, 4, 0.2)
    assert np.bincount(kinds[held], minlength=4).tolist() == [10, 6, 4, 0]
    order = rng.permutation(101)
    again = hold_out([names[row] for row in order], [labels[row] for row in order], 4, 0.2)
    np.testing.assert_array_equal(again, held[order])
    assert not hold_out(names, labels, 4, 0).any()


def test_a_clip_stays_where_a_class_would_have_no_other():
    pair = [np.array([0, 1]), np.array([0])]  # the second class has one clip alone
    for fraction in (0.1, 0.9):
        assert not hold_out(["x", "y"], pair, 2, fraction)[0]
    single = [np.array([kind]) for kind in range(4)]
    assert not hold_out(list("abcd"), single, 4, 0.5).any()
    assert hold_out(list("abcd"), single, 4, 0.5, spare_single_clips=False).sum() == 2


def test_clips_without_labels_are_held_out_by_name():
    assert hold_out([f"{i}.wav" for i in range(10)], [np.empty(0, np.int64)] * 10, 3, 0.3).sum() == 3


def test_groups_are_held_out_whole():
    rng = np.random.default_rng(0)
    groups = [f"speaker {index}" for index in rng.integers(0, 20, 400)]
    labels = [np.array([kind]) for kind in rng.integers(0, 4, 400)]
    names = [f"{index}.wav" for index in range(400)]
    held = hold_out(names, labels, 4, 0.2, groups)
    inside = {group for group, out in zip(groups, held, strict=True) if out}
    assert not inside & {group for group, out in zip(groups, held, strict=True) if not out}
    assert 0.13 < held.mean() < 0.27
    order = rng.permutation(400)
    again = hold_out([names[row] for row in order], [labels[row] for row in order], 4, 0.2, [groups[r] for r in order])
    np.testing.assert_array_equal(again, held[order])


def test_of_few_large_groups_the_smallest_is_held_out_and_none_that_alone_has_a_class():
    groups = ["a"] * 10 + ["b"] * 8 + ["c"] * 6
    names = [f"{index}.wav" for index in range(24)]
    labels = [np.array([index % 2]) for index in range(24)]
    assert np.flatnonzero(hold_out(names, labels, 2, 0.1, groups)).tolist() == list(range(18, 24))
    labels[20] = np.array([2])  # a class that only the smallest group has
    assert not hold_out(names, labels, 3, 0.1, groups).any()
