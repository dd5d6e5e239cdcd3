"""Stopping a run on a signal: the current step is finished and a state is saved, on all ranks after the same step.

A scheduler may signal one process, or all of them at slightly different times. After each step every rank sends the
signal that it has received, if any, to all others, and reads the result of `DELAY` steps before: by then it has
arrived, so no step waits for it. Hence several processes stop at most `DELAY` + 1 steps after the first signal.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.interrupts import StopSignal, respond_to_signals
from training.parallel import Ranks

DELAY = 4  # steps


class StopRequest:
    """The signal that stops a run, shared by all ranks.

    Args:
        ranks: the processes of the run.
        enabled: whether signals wait for the end of the step; otherwise they raise `StopSignal` at once.

    Attributes:
        number: of the signal that this process has received; 0 for none.
    """

    def __init__(self, ranks: Ranks, *, enabled: bool) -> None:
        self.ranks, self.enabled, self.number = ranks, enabled, 0
        self._sent: deque[tuple[Tensor, Any]] = deque()  # the number, and the transfer that makes it that of all ranks

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Keep the first signal in the block in `number`; a second one ends the process at once."""
        if not self.enabled:
            yield
            return
        with respond_to_signals(self._receive):
            yield
        if self.number:
            raise StopSignal(self.number)  # it came after the last step

    def _receive(self, number: int) -> None:
        self.number = number

    def find(self) -> int:
        """Return the signal that a rank had received `DELAY` steps ago, or 0; all ranks call this after each step."""
        if self.ranks.world_size == 1:
            return self.number
        self._send()
        return self._read() if len(self._sent) > DELAY else 0

    def find_now(self) -> int:
        """Return the signal that a rank has received, or 0; waits for all ranks, which all call this."""
        if self.ranks.world_size == 1:
            return self.number
        self._send()
        return max(self._read() for _ in range(len(self._sent)))

    def _send(self) -> None:
        number = torch.tensor(self.number if self.enabled else 0)
        self._sent.append((number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)))

    def _read(self) -> int:
        number, transfer = self._sent.popleft()
        transfer.wait()
        return int(number)
