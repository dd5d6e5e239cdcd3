"""Progress bars."""

import sys
from typing import Any

from tqdm import tqdm


def create_progress(iterable: Any = None, **options: Any) -> tqdm:
    """Return a tqdm bar that disappears at the end, and is drawn every 30 s only where it goes to a log."""
    return tqdm(iterable, leave=False, mininterval=0.1 if sys.stderr.isatty() else 30, **options)
