"""The numbers of random streams: whoever goes on with a run, or repeats one, draws what was drawn before."""

import numpy as np

from distill.random_streams import Stream, derive_seed


def test_numbers_stay_as_they_are():
    numbers = {"FRESH_MASKS": 1, "ORDER": 2, "MIXUP": 3, "PATCH_OUT": 4, "DROPOUT": 5, "CHANCE": 6}
    numbers |= {"TOKEN_MASK": 7, "CROP": 8}
    assert {stream.name: stream.value for stream in Stream} == numbers


def test_a_stream_counts_as_its_number():
    assert derive_seed(42, Stream.ORDER) == derive_seed(42, 2) == 955475868
    one, other = (np.random.default_rng([42, stream, 1, 7]).random(5) for stream in (Stream.MIXUP, 3))
    assert one.tolist() == other.tolist()


def test_streams_differ_from_each_other():
    assert len({derive_seed(42, stream, step) for stream in Stream for step in range(100)}) == 100 * len(Stream)
