"""A rank whose count stands still is named; one that computes for long is not."""

import time

import pytest
import torch.distributed as dist

from training import heartbeat
from training.heartbeat import Heartbeat


@pytest.fixture
def pair(monkeypatch):
    """The heartbeats of two ranks that share a store; that of rank 0 is started."""
    store = dist.HashStore()
    ranks = [Heartbeat(store, rank, 2, 0.6) for rank in (0, 1)]
    for rank in ranks:
        rank.interval = 0.1
    ends: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", ends.append)
    ranks[0].start()
    yield *ranks, ends
    for rank in ranks:
        rank.stop()


def test_a_rank_that_stops_to_count_is_named_and_the_others_end(pair, capfd):
    first, second, ends = pair
    second.start()
    time.sleep(0.5)
    assert (first.describe_missing(0.6), ends) == ("", [])
    second.stop()  # as if it were frozen
    time.sleep(1.2)
    assert ends
    assert ends[0] == 1
    errors = capfd.readouterr().err
    assert "error: rank 1 (process " in errors
    assert "does not respond for 0.6 s (rank_timeout): frozen, killed or unreachable; start the command again" in errors


def test_a_rank_that_ends_with_an_error_is_the_cause_of_a_failed_transfer(pair, monkeypatch):
    monkeypatch.setattr(heartbeat, "ENDED_SECONDS", 0.1)
    first, second, _ = pair
    second.start()
    time.sleep(0.3)
    second.stop(failed=True)
    found = first.explain()
    assert found.startswith("rank 1 (process ")
    assert found.endswith("ended before this one: see its message")


def test_a_rank_that_was_suspended_itself_does_not_blame_the_others(pair, monkeypatch):
    _, second, ends = pair
    second.start()
    time.sleep(0.3)
    clock = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + 1000)
    time.sleep(0.5)
    assert not ends
