"""Batches with some fields given."""

from typing import Any

import torch

from distill.batch import Batch


def make_batch(**given: Any) -> Batch:
    """A batch with these fields; the others are of clips that have no sound and no target, and are not mixed."""
    known = [value for value in given.values() if isinstance(value, torch.Tensor)]
    n = len((known or list(given["waveforms"].values()))[0])
    fields = {
        "item": torch.arange(n),
        "epoch": torch.ones(n, dtype=torch.int64),
        "waveforms": {},
        "lengths": {rate: None for rate in given.get("waveforms", {})},
        "value": torch.zeros(n),
        "min_value": torch.zeros(n),
        "n_reference": torch.full((n,), 16000),
        "target": torch.zeros(n, 0),
        "mixup_weight": torch.ones(n),
    }
    return Batch(**fields | given)
