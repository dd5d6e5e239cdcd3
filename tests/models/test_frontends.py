import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchaudio.compliance import kaldi

from common.errors import UserError
from models.ced_mel import CedMel
from models.efficientat_mel import EfficientAtMel
from models.frontends import build_front_end
from models.kaldi_mel import KaldiMel
from models.matpac_mel import MatpacMel
from models.slaney_mel import SlaneyMel
from tests.models.sounds import noise, padded


def test_ced_mel_is_what_its_formula_says():
    wave = noise(4000)
    mel = CedMel()(wave[None])[0]
    extended = F.pad(wave[None], (256, 256), mode="reflect")[0]
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(512) / 512)
    power = torch.stack([torch.fft.rfft(extended[i : i + 512] * window).abs() ** 2 for i in range(0, 4001, 160)])
    corners = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), 66) / 2595) - 1)
    bins = torch.arange(257) * 31.25
    weights = torch.zeros(257, 64)
    for band in range(64):
        low, mid, high = corners[band : band + 3]
        weights[:, band] = torch.clamp(torch.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)), min=0)
    wanted = 10 * torch.log10(torch.clamp(power @ weights, min=1e-10)).T
    torch.testing.assert_close(mel, wanted, atol=2e-3, rtol=0)


def test_ced_mel_numbers_of_frames_and_levels():
    front_end = CedMel()
    assert front_end(torch.zeros(1, 16000)).shape == (1, 64, 101)
    assert front_end.n_frames(160000) == 1001
    assert front_end.n_frames(torch.tensor([16000, 160000])).tolist() == [101, 1001]
    assert torch.all(front_end(torch.zeros(1, 16000)) == -100)
    assert abs(front_end(noise(160000)[None]).mean().item() - 6.7) < 0.3


@pytest.mark.parametrize(
    "front_end", [CedMel(), CedMel(center=False), CedMel(min_frames=16), EfficientAtMel(), MatpacMel()]
)
def test_a_clip_in_a_padded_batch_has_the_features_it_has_alone(front_end):
    clips = [noise(n, seed=n) for n in (1, 2, 255, 256, 257, 2399, 2400, 9000, 16001)]
    batch, lengths = padded(clips)
    together = front_end(batch, lengths)
    silence = front_end.power_db_to_value(-100.0)
    for mel, clip in zip(together, clips, strict=True):
        alone = front_end(clip[None])[0]
        n_frames = front_end.n_frames(len(clip))
        assert alone.shape[1] == n_frames
        torch.testing.assert_close(mel[:, :n_frames], alone, atol=1e-4, rtol=1e-4)
        assert torch.all(mel[:, n_frames:] == silence)


def test_autocast_leaves_features_in_float32():
    wave = noise(8000)[None]
    for front_end in (CedMel(), EfficientAtMel()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mel = front_end(wave)
        assert mel.dtype == torch.float32
        torch.testing.assert_close(mel, front_end(wave))


@pytest.mark.parametrize(("front_end", "hertz"), [(CedMel(), 1000.0), (EfficientAtMel(), 5000.0)])
def test_a_tone_peaks_in_the_band_whose_centre_is_nearest(front_end, hertz):
    assert front_end.band_centers_hz.shape == (front_end.n_mels,)
    time = torch.arange(front_end.sample_rate) / front_end.sample_rate
    mel = front_end(torch.sin(2 * math.pi * hertz * time)[None])[0]
    assert mel.mean(1).argmax() == (front_end.band_centers_hz - hertz).abs().argmin()


def test_decibels_in_the_scale_of_each_front_end():
    assert CedMel().power_db_to_value(-30.0) == -30.0
    assert EfficientAtMel().power_db_to_value(0.0) == pytest.approx((math.log(1 + 1e-5) + 4.5) / 5)
    silence = EfficientAtMel()(torch.zeros(1, 4000))
    torch.testing.assert_close(silence, torch.full_like(silence, EfficientAtMel().power_db_to_value(-200)))


def test_only_ced_mel_has_tensors_in_a_checkpoint():
    assert set(CedMel().state_dict()) == {"0.spectrogram.window", "0.mel_scale.fb"}
    assert not EfficientAtMel().state_dict()


def test_f_max_none_is_half_the_sample_rate():
    assert CedMel(f_max=None).f_max == 8000


def test_faults_are_sentences():
    with pytest.raises(UserError, match="fit into 0 to 8000"):
        CedMel(f_max=9000)
    with pytest.raises(UserError, match="win_size 600"):
        CedMel(win_size=600)
    with pytest.raises(UserError, match="at least one sample"):
        CedMel()(torch.zeros(2, 0))
    with pytest.raises(UserError, match="1 to 100 samples"):
        CedMel()(torch.zeros(2, 100), torch.tensor([0, 100]))
    assert isinstance(CedMel(), nn.Module)


def published_features(wave, f_min, f_max):
    """What EfficientAT's and PaSST's front-end gives for one clip (S,) and edges, by torchaudio's filters: (F,T)."""
    emphasised = wave[1:] - 0.97 * wave[:-1]
    window = torch.hann_window(800, periodic=False)
    spectrum = torch.stft(emphasised, 1024, 320, 800, window, center=True, return_complex=True)
    banks = kaldi.get_mel_banks(128, 1024, 32000.0, f_min, f_max, 100.0, -500.0, 1.0)[0]
    mel = F.pad(banks, (0, 1)) @ spectrum.abs().square()
    return ((mel + 1e-5).log() + 4.5) / 5


def test_edges_of_the_bands_are_drawn_for_each_batch_of_training_as_published():
    front_end = EfficientAtMel()
    front_end.vary_edges(10, 2000)
    front_end.generator = torch.Generator()
    batch = torch.stack([noise(8000, seed) for seed in range(2)])
    drawn = torch.Generator()
    lows, highs = set(), set()
    for seed in range(200):
        drawn.manual_seed(seed)
        low = int(torch.randint(10, (), generator=drawn))
        high = 16000 - int(torch.randint(2000, (), generator=drawn))
        lows.add(low)
        highs.add(high)
        if seed < 8:
            front_end.generator.manual_seed(seed)
            for clip, mel in zip(batch, front_end(batch), strict=True):  # one draw for all of them
                torch.testing.assert_close(mel, published_features(clip, low, high), atol=1e-3, rtol=0)
            assert (front_end(batch) - EfficientAtMel()(batch)).abs().max() > 0.05  # and the next draw
    assert lows == set(range(10))
    assert 14001 <= min(highs) < 14100
    assert 15900 < max(highs) <= 16000


def test_edges_stay_in_evaluation_and_where_nothing_is_to_vary():
    wave = noise(8000)[None]
    plain, varied = EfficientAtMel(), EfficientAtMel()
    torch.testing.assert_close(plain(wave)[0], published_features(wave[0], 0.0, 15000.0), atol=1e-3, rtol=0)
    varied.vary_edges(1, 1)
    assert torch.equal(varied(wave), plain(wave))
    varied.vary_edges(10, 2000)
    state = torch.get_rng_state()
    assert torch.equal(varied.eval()(wave), plain(wave))
    assert torch.equal(torch.get_rng_state(), state)
    assert varied.description == plain.description  # what a file that was exported says of its features
    assert torch.equal(build_front_end(varied.description)(wave), plain(wave))


@pytest.mark.parametrize("ranges", [(0, 2000), (10, 1.5), (10, 2002), (10, 30000), (True, 1)])
def test_ranges_of_edges_that_lead_out_of_the_spectrum_are_refused(ranges):
    with pytest.raises(UserError, match="fmin_aug_range"):
        EfficientAtMel().vary_edges(*ranges)


SETTINGS = ["class", "sample_rate", "n_mels", "n_fft", "win_size", "hop_size", "f_min", "f_max"]
# what descriptions in files that were written before hold
DESCRIPTIONS = [
    ["CedMel", 16000, 64, 512, 512, 160, 0.0, 8000.0, {"center": True, "min_frames": 16}],
    ["CedMel", 8000, 40, 512, 400, 80, 20.0, 4000.0, {"center": False, "min_frames": 1, "band_limit": 3000.0}],
    ["EfficientAtMel", 32000, 128, 1024, 800, 320, 0.0, 15000.0, {"min_frames": 16}],
    ["KaldiMel", 16000, 128, 512, 400, 160, 20.0, 8000.0, {"mean": -4.2677393, "std": 4.5689974}],
    ["MatpacMel", 16000, 80, 400, 400, 160, 50.0, 8000.0, {"mean": -7.056, "std": 4.193, "center": False}],
    ["SlaneyMel", 32000, 80, 1024, 1024, 512, 50.0, 16000.0, {"min_frames": 17}],
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda each: each[0])
def test_descriptions_in_files_are_read_and_written_as_they_were(description):
    given = dict(zip(SETTINGS, description, strict=False)) | description[-1]
    text = json.dumps(given)
    front_end = build_front_end(json.loads(text))
    assert type(front_end).__name__ == given["class"]
    assert json.dumps(front_end.description) == text
    for name, value in given.items():
        assert name == "class" or getattr(front_end, name) == value
    with pytest.raises(UserError, match=r"cannot be built .*unexpected keyword argument 'n_mel'"):
        build_front_end({**given, "n_mel": 64})


@pytest.mark.parametrize("kind", [CedMel, EfficientAtMel, KaldiMel, MatpacMel, SlaneyMel])
def test_a_front_end_has_its_defaults_where_nothing_else_is_given(kind):
    front_end, n_mels = kind(n_mels=32), kind.defaults.n_mels
    for name, value in asdict(kind.defaults).items():
        assert getattr(kind(), name) == (kind().sample_rate / 2 if value is None else value)
    assert (front_end.n_mels, front_end.sample_rate) == (32, kind.defaults.sample_rate)
    assert kind().n_mels == n_mels == kind().mel_weights.shape[1] != 32
    assert kind(f_max=None).f_max == kind().sample_rate / 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_mel'"):
        kind(n_mel=64)


@pytest.mark.parametrize(
    ("front_end", "n_samples"),
    [
        (CedMel(), 257),  # half a transform, and one for its reflection
        (CedMel(min_frames=16), 2400),
        (CedMel(center=False, min_frames=3), 832),
        (EfficientAtMel(), 514),  # one more, which pre-emphasis takes away
        (EfficientAtMel(min_frames=16), 4801),
        (KaldiMel(), 400),  # a window
        (MatpacMel(), 400),
        (MatpacMel(center=True), 201),
        (SlaneyMel(min_frames=3), 2048),
    ],
)
def test_shorter_clips_are_extended_to_the_fewest_samples_that_make_a_frame(front_end, n_samples):
    assert front_end.min_samples == n_samples
    least = front_end.n_frames(n_samples)
    assert front_end.min_frames <= least == front_end.n_frames(1) == front_end(noise(1)[None]).shape[2]
    assert front_end.n_frames(torch.tensor([1, n_samples])).tolist() == [least, least]
    longer = front_end.n_frames(n_samples + front_end.hop_size)
    assert longer == least + 1 == front_end(noise(n_samples + front_end.hop_size)[None]).shape[2]
