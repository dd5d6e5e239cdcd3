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
