"""The independent random streams of a run. Their numbers affect results and must not change."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Use of a stream, and what it depends on besides the run's seed."""

    FRESH_MASKS = 1  # epoch, item: masks without the store's seeds (`disable_consistency`)
    ORDER = 2  # the pass, see `distill.dataset.EpochBatches`
    MIXUP = 3  # epoch, item: the weight of each clip
    PATCH_OUT = 4  # the step; the same on all ranks
    DROPOUT = 5  # the step and the rank; stochastic depth as well
    CHANCE = 6  # the epoch: the permutations of `training.chance`
    TOKEN_MASK = 7  # epoch, item: masked tokens of self-supervised objectives
    CROP = 8  # epoch, item: their part of a long clip


def derive_seed(*key: int) -> int:
    """Return the seed for a key: the run's seed, a `Stream`, and what the stream depends on."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
