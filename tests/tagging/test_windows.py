import itertools

import numpy as np
import pytest

from common.errors import UserError
from tagging.windows import Windows


def cut_at_once(x, size, hop, shortest):
    """Window k starts at k hops; an incomplete one needs `shortest` samples that no other holds, but for the first."""
    n = len(x)
    return [
        (start, x[start : start + size])
        for start in range(0, n, hop)
        if start == 0 or start + size <= n or n - max(start, start - hop + size) >= shortest
    ]


def in_blocks(x, sizes):
    bounds = itertools.accumulate(itertools.chain([0], itertools.cycle(sizes)))
    for first, last in itertools.pairwise(bounds):
        if first >= len(x):
            return
        yield x[first:last]


@pytest.mark.parametrize("hop", [1, 3, 7, 9, 10, 11, 23])
@pytest.mark.parametrize("shortest", [1, 4])
@pytest.mark.parametrize("blocks", [(1,), (3, 0, 11), (10,), (1000,), (25, 1)])
def test_the_cuts_are_those_of_the_whole_sound_whatever_the_blocks(hop, shortest, blocks):
    size = 10
    for n in range(1, 60):
        x = np.arange(n, dtype=np.float32)
        windows = Windows(size, hop, shortest)
        cuts = []
        for block in in_blocks(x, blocks):
            cuts += windows.push(block)
            needed = max(windows.n_received - len(cuts) * hop, 0)
            assert len(windows._kept) == needed < size + hop
            assert windows._kept.base is None
        cuts += windows.finish()
        expected = cut_at_once(x, size, hop, shortest)
        assert [start for start, _ in cuts] == [start for start, _ in expected]
        for (_, found), (_, wanted) in zip(cuts, expected, strict=True):
            assert np.array_equal(found, wanted)


def test_a_window_does_not_keep_the_block_it_was_cut_from():
    (first, second) = Windows(10, 500).push(np.zeros(1000, np.float32))
    assert first[1].base is None
    assert second[0] == 500


def test_blocks_may_change_after_they_were_pushed():
    windows = Windows(4, 4)
    block = np.ones(3, np.float32)
    list(windows.push(block))
    block[:] = 7
    ((_, window),) = windows.push(np.ones(1, np.float32))
    assert window.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("size", "hop"), [(0, 1), (1, 0)])
def test_windows_without_samples_are_refused(size, hop):
    with pytest.raises(UserError, match="at least 1"):
        Windows(size, hop)
