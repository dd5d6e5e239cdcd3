"""A rank whose count stands still is named; one that computes for long is not."""

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from training import heartbeat, parallel
from training.heartbeat import Heartbeat

LIMIT = 60.0  # seconds, on a busy machine


class Clock:
    """The time of the heartbeats, which stands still until a test moves it on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        time.sleep(0.01)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


@pytest.fixture
def pair(monkeypatch, clock):
    """The heartbeats of two ranks that share a store and have counted; and the exit statuses of their processes."""
    store = dist.HashStore()
    ranks = [Heartbeat(store, rank, 2, 1.5) for rank in (0, 1)]
    ends: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", ends.append)
    for rank in ranks:
        rank.interval = 0.02
        rank.start()
    wait_until(lambda: 1 in ranks[0]._names and 0 in ranks[1]._names)
    yield *ranks, ends
    for rank in ranks:
        rank.stop()


def test_a_rank_that_stops_to_count_is_named_and_the_others_end(pair, clock, monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "MISSED_BEATS", 1000)  # the steps of the clock are no suspension
    first, second, ends = pair
    assert (first.describe_missing(1.5), ends) == ("", [])
    second.stop()  # as if it were frozen
    for thread in second._threads:
        thread.join(LIMIT)

    def pass_time() -> list[int]:
        if first._store_time == clock.now:
            clock.now += 0.5
        return ends

    wait_until(pass_time)
    assert ends[0] == 1
    errors = capfd.readouterr().err
    assert "error: rank 1 (process " in errors
    assert "does not respond for 1.5 s (rank_timeout): frozen, killed or unreachable; start the command again" in errors


def test_a_rank_that_ends_with_an_error_is_the_cause_of_a_failed_transfer(pair, monkeypatch):
    monkeypatch.setattr(heartbeat, "MISSED_BEATS", 1000)  # the steps of the clock are no missed beats
    first, second, _ = pair
    second.stop(failed=True)
    wait_until(lambda: first._counts[1] >= heartbeat.ENDED)
    found = first.explain()
    assert found.startswith("rank 1 (process ")
    assert found.endswith("ended before this one: see its message")


def test_a_rank_that_was_suspended_itself_does_not_blame_the_others(pair, clock):
    first, second, ends = pair
    first.stop()
    for thread in first._threads:
        thread.join(LIMIT)
    checks = []
    describe = second.describe_missing
    second.describe_missing = lambda *arguments: checks.append(describe(*arguments))
    clock.now += 1000
    wait_until(lambda: len(checks) > 3)
    assert not any(checks)
    assert not ends


def test_an_error_is_raised_as_it_is_also_where_the_store_has_ended_first(monkeypatch):
    calls: list[str] = []

    class EndedStore:
        def clone(self):
            return self

        def set(self, key, value):
            pass

        def add(self, key, number):
            calls.append("add")
            raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "rendezvous", lambda url: iter([(EndedStore(), 1, 2)]))
    monkeypatch.setattr(parallel.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: calls.append("destroy"))
    with pytest.raises(ValueError, match="of this rank"), parallel.process_group():
        raise ValueError("of this rank")
    assert calls == ["add", "destroy"]
