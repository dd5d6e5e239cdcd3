"""Finds ranks that are frozen, killed or unreachable, for which the others would wait without end.

Each rank counts in the store of the process group, in a thread of its own, so that a rank that computes or reads for
long still counts. A rank whose count has stood still for `timeout` seconds is missing: the others name it and end.
"""

import os
import socket
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from common.interrupts import write_error

ENDED = 1 << 40  # added to the count of a rank that ends with an error
ENDED_SECONDS = 5.0  # after which a rank that still waits for such a rank ends
MISSED_BEATS = 4  # of a rank, after which it is named as the cause of a failed connection


class Heartbeat:
    """Counts for this rank, and watches the counts of the others.

    Args:
        store: of the process group.
        rank: of this process.
        world_size: number of processes.
        timeout: seconds after which a rank without a new count is missing.

    Attributes:
        hint: what to do, for the message.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]  # a connection is not shared by threads
        self.rank, self.timeout = rank, timeout
        self.interval = max(1.0, world_size / 16)  # seconds; a store serves thousands of requests a second
        self.hint = "start the command again"
        self._others = [other for other in range(world_size) if other != rank]
        self._names: dict[int, str] = {}  # kept here: a thread that waits for the store blocks all others that use it
        now = time.monotonic()
        self._counts = dict.fromkeys(self._others, 0)
        self._times = dict.fromkeys(self._others, now)  # of the last new count
        self._store_time = now
        self._stopped = threading.Event()
        self.store.set(f"process/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """Stop the threads; with `failed`, the other ranks learn that this one has ended."""
        self._stopped.set()
        if failed and time.monotonic() - self._store_time < MISSED_BEATS * self.interval:
            with suppress(RuntimeError):  # the process that keeps the store has just ended
                self.store.add(f"count/{self.rank}", ENDED)

    def _beat(self) -> None:
        while not self._stopped.wait(self.interval):
            try:
                self.store.add(f"count/{self.rank}", 1)
                for other in self._others:
                    count = self.store.add(f"count/{other}", 0)  # unlike `get`, it does not wait for the first one
                    if other not in self._names and count:
                        self._names[other] = f" ({self.store.get(f'process/{other}').decode()})"
                    if count != self._counts[other]:
                        self._counts[other], self._times[other] = count, time.monotonic()
                self._store_time = time.monotonic()
            except RuntimeError:  # the process that keeps the store has ended
                return

    def _watch(self) -> None:
        """End this process, whose main thread may wait in a transfer, when a rank is missing."""
        last = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            if now - last > MISSED_BEATS * self.interval:  # this process was suspended, and perhaps all are
                self._store_time, self._times = now, dict.fromkeys(self._others, now)
            last = now
            found = self.describe_missing(self.timeout, now)
            if found and not self._stopped.is_set():
                write_error(f"\nerror: {found}; {self.hint}\n")
                os._exit(1)

    def describe_missing(self, seconds: float, now: float | None = None) -> str:
        """Return a sentence on ranks that have ended, or have been missing for some seconds; "" if there are none."""
        now = time.monotonic() if now is None else now
        if now - self._store_time > seconds:
            return f"the process that connects the ranks (torchrun, or rank 0) does not respond for {seconds:g} s"
        silent = {other: now - self._times[other] for other in self._others}
        ended = [rank for rank in self._others if self._counts[rank] >= ENDED and silent[rank] > ENDED_SECONDS]
        if ended:
            return f"{self._name(ended)} ended before this one: see its message"
        missing = [rank for rank in self._others if silent[rank] > seconds and self._counts[rank] < ENDED]
        reason = f"for {seconds:g} s (rank_timeout): frozen, killed or unreachable"
        return f"{self._name(missing)} does not respond {reason}" if missing else ""

    def explain(self) -> str:
        """Wait some seconds for the cause of a failed transfer; return a sentence."""
        deadline = time.monotonic() + max(ENDED_SECONDS, MISSED_BEATS * self.interval) + 2 * self.interval
        while time.monotonic() < deadline:
            if found := self.describe_missing(MISSED_BEATS * self.interval):
                return found.replace(" (rank_timeout)", "")
            time.sleep(0.1)
        return "the connection to another rank has failed, though all ranks respond"

    def _name(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank}{self._names.get(rank, '')}" for rank in ranks[:8])
