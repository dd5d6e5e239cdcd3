"""What a worker of `test_interrupts` does; it imports nothing slow."""

import os
import time

from common.interrupts import start_worker


def work() -> None:
    """Print the number of the process after longer than it takes to look for its parent."""
    start_worker()
    time.sleep(0.3)
    print(os.getpid(), flush=True)
    time.sleep(60)
