import numpy as np
import pytest

from tagging.events import merge_events
from tagging.files import TaggedWindow


def by_timeline(windows, n):
    """Mark every hundredth of a second of every label, and look for stretches."""
    best = {}
    for window in windows:
        for label, value in window.tags:
            line = best.setdefault(label, np.zeros(n))
            part = line[round(window.start * 100) : round(window.end * 100)]
            np.maximum(part, value, out=part)
    events = []
    for label, line in best.items():
        edges = np.diff(np.concatenate([[0], line > 0, [0]]).astype(int))
        for start, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            events.append((start / 100, end / 100, label, line[start:end].max()))
    return sorted(events, key=lambda event: (event[0], -event[3]))


@pytest.mark.parametrize("seed", range(40))
def test_events_are_the_stretches_of_a_timeline(seed):
    rng = np.random.default_rng(seed)
    size, hop = rng.integers(1, 300, 2) / 100
    windows = []
    for k in range(rng.integers(1, 30)):
        values = rng.choice(np.linspace(0.01, 1, 99), 5, replace=False)  # no two alike: the order is then one only
        tags = [(label, float(value)) for label, value in zip("abcde", values, strict=True) if rng.random() < 0.5]
        windows.append(TaggedWindow(k * hop, k * hop + size, sorted(tags, key=lambda tag: -tag[1])))
    windows[-1].end -= rng.integers(0, round(size * 100)) / 100  # the last one is what remains
    before = [(window.start, window.end, list(window.tags)) for window in windows]
    found = [(event.start, event.end, *event.tags[0]) for event in merge_events(windows)]
    assert all(len(event.tags) == 1 for event in merge_events(windows))
    expected = by_timeline(windows, 10000)
    assert [label for *_, label, _ in found] == [label for *_, label, _ in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[:2] == pytest.approx(other[:2], abs=1e-6)
        assert one[3] == other[3]
    assert [(window.start, window.end, window.tags) for window in windows] == before  # left as they were


def test_windows_that_touch_are_one_event_and_a_gap_parts_them():
    rate, size = 16000, 11117  # ends and starts of neighbours are the same fraction
    touching = [TaggedWindow(k * size / rate, (k + 1) * size / rate, [("rain", 0.1 * k)]) for k in range(1, 9)]
    (event,) = merge_events(touching)
    assert (event.start, event.end, event.tags) == (size / rate, 9 * size / rate, [("rain", 0.8)])
    apart = [TaggedWindow(k, k + 0.999, [("rain", 0.5)]) for k in range(3)]
    assert len(merge_events(apart)) == 3


def test_no_windows_and_windows_without_tags_are_no_events():
    assert merge_events([]) == []
    assert merge_events([TaggedWindow(0, 1), TaggedWindow(1, 2)]) == []
