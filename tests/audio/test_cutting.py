"""Clips are cut into the chunks that a slow loop finds."""

import pickle

import numpy as np
import pytest

from audio.cutting import Chunks
from common.errors import UserError


def test_chunks_are_those_of_ced() -> None:
    # 10-s chunks at 10 Hz: exactly one; a tail of 4.9 s and of 5 s; a short only chunk; nothing.
    chunks = Chunks.cut(np.array([100, 149, 150, 7, 0, 200]), 10, 10.0)
    assert list(chunks) == [
        (0, 0, 100),
        (1, 0, 100),
        (2, 0, 100),
        (2, 100, 150),
        (3, 0, 7),
        (5, 0, 100),
        (5, 100, 200),
    ]


def test_short_tails_are_kept_on_request() -> None:
    chunks = Chunks.cut(np.array([149]), 10, 10.0, drop_short_tail=False)
    assert list(chunks) == [(0, 0, 100), (0, 100, 149)]


def by_hand(n_samples: list[int], length: int, drop_short_tail: bool) -> list[tuple[int, int, int]]:
    """Cut clip after clip, sample after sample."""
    found = []
    for clip, n in enumerate(n_samples):
        start = 0
        while start < n:
            stop = start
            while stop < n and stop < start + length:
                stop += 1
            if start == 0 or stop - start >= length / 2 or not drop_short_tail:
                found.append((clip, start, stop))
            start = stop
    return found


@pytest.mark.parametrize("drop_short_tail", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 1000])
def test_chunks_of_any_lengths_are_those_of_a_slow_loop(length, drop_short_tail) -> None:
    n_samples = np.random.default_rng(length).integers(0, 60, 80)
    chunks = Chunks.cut(n_samples, 4, length / 4, drop_short_tail)
    expected = by_hand(n_samples.tolist(), length, drop_short_tail)
    assert len(chunks) == len(expected) > 70
    assert list(chunks) == [chunks[i] for i in range(len(chunks))] == expected
    assert chunks.n_samples.tolist() == [stop - start for _, start, stop in expected]
    assert chunks.seconds.tolist() == [(stop - start) / 4 for _, start, stop in expected]
    odd = [i for i, chunk in enumerate(expected) if chunk[0] % 2]
    assert list(chunks.select(np.array(odd))) == list(chunks.select(chunks.clip % 2 == 1)) == [expected[i] for i in odd]


def test_whole_clips_are_one_chunk_each() -> None:
    chunks = Chunks.whole(np.array([5, 0, 9], np.int32), 16000)
    assert list(chunks) == [(0, 0, 5), (1, 0, 0), (2, 0, 9)]


@pytest.mark.parametrize("make", [lambda n: Chunks.cut(n, 100, 1.0), lambda n: Chunks.whole(n, 100)])
def test_a_worker_gets_three_plain_arrays(make) -> None:
    """However many chunks there are: an object for each would be copied into every process that counts references."""
    chunks = make(np.full(10_000, 250))
    assert {array.dtype for array in (chunks.clip, chunks.start, chunks.stop)} == {np.dtype(np.int64)}
    pickled = pickle.dumps(chunks)
    assert len(pickled) < 24 * len(chunks) + 1000
    again = pickle.loads(pickled)
    assert list(again) == list(chunks)
    assert again.sample_rate == 100


def test_chunks_know_pythons_integers() -> None:
    """What reads a pack, and what is written into JSON."""
    assert {type(value) for value in Chunks.whole(np.array([5]), 16000)[0]} == {int}
    with pytest.raises(IndexError):
        Chunks.whole(np.array([5]), 16000)[1]


def test_a_chunk_without_samples_is_an_error() -> None:
    with pytest.raises(UserError, match="have no sample"):
        Chunks.cut(np.array([100]), 16000, 0.0)
