from collections.abc import Sequence

import numpy as np
import pytest

from audio.scale import ScaleError, ScaleRestorer

RATE = 100


def restore(blocks: Sequence[Sequence[float]]) -> tuple[list[list[float]], float | None]:
    restorer = ScaleRestorer()
    arrays = ((np.array(block, np.float32)[:, None], RATE) for block in blocks)
    return [block[:, 0].tolist() for block, _ in restorer.restore(arrays)], restorer.full_scale


@pytest.mark.parametrize(
    ("blocks", "full_scale"),
    [
        ([[0.5, -0.25]], 1.0),
        ([[0.5, 1.5, -0.25]], 1.0),  # one sample beyond full scale
        ([[0.5, 900.0, 0.25, -0.25, 0.1]], 1.0),  # or far beyond it
        ([[1.0, -1.0, 0.0]], None),  # clipped, perhaps
        ([[1.5, 8.5, -7.25]], 1.0),  # very loud
        ([[3, -2, 0]], 32768.0),  # faint integers
        ([[0, 0], [1, 0, -1], [200, 3]], 32768.0),  # after silence, and noise of a bit
        ([[32767, -32768]], 32768.0),
        ([[8388607, 3]], 8388608.0),
        ([[2147483520, 3]], 2147483648.0),
        ([[20000.7, -3000.2, 300.5, 0.2]], 32768.0),  # integers, resampled
        ([[0, 0], [0.5, 0.3]], 1.0),
    ],
)
def test_full_scale_is_known_by_the_values(blocks, full_scale) -> None:
    restored, found = restore(blocks)
    assert found == full_scale
    assert restored == [(np.array(block, np.float32) / (full_scale or 1.0)).tolist() for block in blocks]


@pytest.mark.parametrize(
    "blocks",
    [
        [[0.5, 0.3], [2000.5, 300.1, 7.5]],  # of the first 10 s one thing is certain, of what follows another
        [[20.0, 30.0], [5_000_000.0, 3.0]],
        [[5_000_000.7, 300_000.2, 77_777.7, 1e10]],
    ],
)
def test_what_is_not_certain_is_refused_with_a_sentence(blocks) -> None:
    with pytest.raises(ScaleError, match="store it with full scale 1"):
        restore(blocks)


def test_values_that_may_be_either_are_held_for_a_minute_only() -> None:
    given = []

    def blocks():
        for number in range(90):
            given.append(number)
            yield np.ones((RATE, 1), np.float32), RATE

    first = next(ScaleRestorer().restore(blocks()))
    assert len(given) == 60
    assert first[0].max() == 1.0
