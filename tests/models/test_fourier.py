import math

import pytest
import torch

from models.ced_mel import CedMel
from models.efficientat_mel import EfficientAtMel
from models.fourier import MelPower, PortableFrontEnd
from models.frontends import FrontEnd, build_front_end
from tests.models.sounds import noise

FRONT_ENDS = {
    "CED": CedMel(min_frames=16),
    "EfficientAT": EfficientAtMel(),
    "not centred": CedMel(center=False, n_fft=400, win_size=400, hop_size=100),
    "prime, short window, long hop": CedMel(n_fft=397, win_size=300, hop_size=450, n_mels=20),
}


def by_definition(front_end: FrontEnd, waveform: torch.Tensor) -> torch.Tensor:
    """Mel power (F,T) of one framed waveform (S,), frame by frame, from the sum that defines the Fourier transform."""
    n_fft = front_end.n_fft
    left = (n_fft - front_end.win_size) // 2
    window = torch.zeros(n_fft, dtype=torch.float64)
    window[left : left + front_end.win_size] = front_end.window.double()
    n = torch.arange(n_fft, dtype=torch.float64)
    columns = []
    for start in range(0, len(waveform) - n_fft + 1, front_end.hop_size):
        frame = waveform[start : start + n_fft].double() * window
        power = torch.stack(
            [
                (frame * (2 * math.pi * k * n / n_fft).cos()).sum() ** 2
                + (frame * (2 * math.pi * k * n / n_fft).sin()).sum() ** 2
                for k in range(n_fft // 2 + 1)
            ]
        )
        columns.append(front_end.mel_weights.double().T @ power)
    return torch.stack(columns, 1).float()


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_mel_power_is_that_of_the_fourier_transform(front_end):
    waves = torch.stack([noise(1700, seed) for seed in range(2)])
    found = MelPower(front_end)(waves)
    expected = torch.stack([by_definition(front_end, wave) for wave in waves])
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_it_gives_what_the_front_end_gives_at_any_length_and_level(front_end):
    portable = PortableFrontEnd(front_end)
    for n_samples in (1, 300, 777, 5001, 40000):
        waves = torch.stack([noise(n_samples), noise(n_samples, 1, 1e-4), torch.zeros(n_samples)])
        torch.testing.assert_close(portable(waves), front_end(waves), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_a_front_end_is_built_again_from_its_description(front_end):
    again = build_front_end(front_end.description)
    assert type(again) is type(front_end)
    assert again.description == front_end.description
    wave = noise(5000)[None]
    assert torch.equal(again(wave), front_end(wave))
