import numpy as np
import pytest

from audio.channels import Downmixer

RATE = 1000


def mix_slowly(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """By the definition: second by second, in float64; samples, and how many were of opposite polarity."""
    mixed, n_opposite = [], 0
    for start in range(0, len(samples), RATE):
        left, right = samples[start : start + RATE].astype(np.float64).T
        mean = (left + right) / 2
        energy = (np.mean(left**2) + np.mean(right**2)) / 2
        is_opposite = energy > 1e-8 and np.mean(mean**2) < 0.01 * energy
        mixed.append((left - right) / 2 if is_opposite else mean)
        n_opposite += is_opposite * len(left)
    return np.concatenate(mixed), n_opposite


@pytest.fixture
def stereo() -> np.ndarray:
    """Seconds of every relation of two channels, the last not whole."""
    rng = np.random.default_rng(0)
    left, other = rng.normal(0, 0.2, (2, 7 * RATE + 300))
    factors = np.repeat([-1.0, 1.0, -1.0, -0.9, 0.0, -0.5, -1.0, -1.0], RATE)[: len(left)]
    share = np.repeat([0.0, 0.0, 0.02, 0.3, 1.0, 0.0, 0.0, 0.0], RATE)[: len(left)]
    samples = np.stack([left, factors * left + share * other], axis=1).astype(np.float32)
    samples[6 * RATE : 7 * RATE] *= 1e-5  # nothing to be heard
    return samples


@pytest.mark.parametrize("n_block", [7, 300, 1000, 1700, 100_000])
def test_opposite_channels_are_taken_apart_second_by_second_however_blocks_are_cut(stereo, n_block) -> None:
    mixer = Downmixer(RATE)
    starts = range(0, len(stereo), n_block)
    mixed = [mixer.push(stereo[start : start + n_block], start + n_block >= len(stereo)) for start in starts]
    expected, n_opposite = mix_slowly(stereo)
    np.testing.assert_allclose(np.concatenate(mixed), expected, atol=1e-7)
    assert (mixer.n_opposite, mixer.n_samples) == (n_opposite, len(stereo))
    assert n_opposite == 2 * RATE + 300


def test_what_is_in_one_channel_alone_is_never_lost() -> None:
    left = np.sin(np.arange(3 * RATE)).astype(np.float32)
    for right in (left, -left, 0 * left, 0.5 * left, -0.5 * left):
        for samples in (np.stack([left, right], axis=1), np.stack([right, left], axis=1)):
            mixed = Downmixer(RATE).push(samples, is_last=True)
            assert np.mean(mixed**2) >= 0.05 * np.mean(samples**2)


@pytest.mark.parametrize("n_channels", [1, 3, 6])
def test_other_numbers_of_channels_are_averaged_at_once(n_channels: int) -> None:
    samples = np.random.default_rng(1).normal(size=(50, n_channels)).astype(np.float32)
    np.testing.assert_allclose(Downmixer(RATE).push(samples), samples.mean(axis=1), atol=1e-7)
