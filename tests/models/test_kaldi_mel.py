"""Kaldi's filter bank is the one that torchaudio computes, in PyTorch, in a padded batch and in an exported graph."""

import math

import onnxruntime
import pytest
import torch
from torch import nn
from torchaudio.compliance import kaldi

from common.errors import UserError
from models.base import AudioTagger, Encoded
from models.fourier import PortableFrontEnd
from models.frontends import build_front_end
from models.kaldi_mel import KaldiMel
from models.onnx import export_onnx
from tests.models.sounds import noise, padded

MEAN, STD = -4.2677393, 4.5689974
LENGTHS = (400, 401, 559, 560, 7777, 16001, 40003)


def as_published(wave, mean=MEAN, std=STD, sample_rate=16000, n_mels=128):
    """What AST's feature extractor computes of one clip (S,): (F,T)."""
    bank = kaldi.fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=n_mels,
        dither=0.0,
        frame_shift=10,
    )
    return ((bank - mean) / (2 * std)).T


def sound(n_samples):
    """A decaying chord over hiss, with hum and a constant, and a second half that is silent but for the constant."""
    time = torch.arange(n_samples) / 16000
    pitches = torch.tensor([50.0, 440.0, 659.3, 3520.0])[:, None]
    chord = (torch.sin(2 * math.pi * pitches * time) * torch.exp(-3 * time)).sum(0) * 0.1
    wave = chord + noise(n_samples, n_samples, 10.0 ** -(1 + n_samples % 3)) + 0.03
    wave[n_samples // 2 :] = 0.03
    return wave


@pytest.mark.parametrize("n_samples", LENGTHS)
def test_it_is_what_torchaudio_computes(n_samples):
    wave = sound(n_samples)
    expected = as_published(wave)
    assert expected.shape == (128, KaldiMel().n_frames(n_samples))
    torch.testing.assert_close(KaldiMel()(wave[None])[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(PortableFrontEnd(KaldiMel())(wave[None])[0], expected, atol=1e-4, rtol=0)


def test_it_is_what_torchaudio_computes_at_other_rates_and_sizes():
    wave = sound(9001)
    front_end = KaldiMel(sample_rate=8000, n_mels=40, n_fft=256, win_size=200, hop_size=80, mean=-1.0, std=0.5)
    assert front_end.f_max == 4000
    expected = as_published(wave, -1.0, 0.5, 8000, 40)
    torch.testing.assert_close(front_end(wave[None])[0], expected, atol=1e-3, rtol=0)  # mean power / (2 std) is larger


def test_a_transform_no_larger_than_the_window_and_an_odd_remainder():
    wave = sound(5001)
    for n_fft, win_size in ((400, 400), (511, 400)):
        front_end = KaldiMel(n_fft=n_fft, win_size=win_size)
        frame = wave[160 * 3 : 160 * 3 + win_size].double()
        frame = frame - frame.mean()
        frame = torch.stack([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(win_size)])
        n = torch.arange(win_size, dtype=torch.float64)
        frame = frame * (0.5 - 0.5 * torch.cos(2 * math.pi * n / (win_size - 1)))
        power = torch.fft.rfft(frame, n_fft).abs() ** 2
        expected = (power @ front_end.mel_weights.double()).clamp(min=2.0**-23).log()
        expected = ((expected - MEAN) / (2 * STD)).float()
        torch.testing.assert_close(front_end(wave[None])[0, :, 3], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(PortableFrontEnd(front_end)(wave[None])[0, :, 3], expected, atol=1e-4, rtol=0)


def test_a_clip_in_a_padded_batch_has_the_features_it_has_alone():
    front_end = KaldiMel()
    clips = [sound(n) for n in (1, 399, *LENGTHS)]
    together = front_end(*padded(clips))
    for mel, clip in zip(together, clips, strict=True):
        n_frames = front_end.n_frames(len(clip))
        expected = as_published(nn.functional.pad(clip, (0, max(0, 400 - len(clip)))))
        torch.testing.assert_close(mel[:, :n_frames], expected, atol=1e-4, rtol=0)
        assert torch.all(mel[:, n_frames:] == front_end.power_db_to_value(-100.0))


def test_numbers_of_frames():
    front_end = KaldiMel()
    assert [front_end.n_frames(n) for n in (1, 400, 559, 560, 16000, 160000)] == [1, 1, 1, 2, 98, 998]
    assert front_end.n_frames(torch.tensor([1, 559, 560, 160000])).tolist() == [1, 1, 2, 998]


def test_levels_in_its_own_scale():
    front_end = KaldiMel(mean=-4.0, std=3.0)
    assert front_end.zero_value == pytest.approx(4 / 6)
    assert front_end.power_db_to_value(20.0) == pytest.approx((math.log(100) + 4) / 6)
    silence = front_end(torch.zeros(1, 4000))
    torch.testing.assert_close(silence, torch.full_like(silence, front_end.power_db_to_value(-100.0)))
    assert front_end.power_db_to_value(-100.0) == pytest.approx((math.log(1.1920929e-07) + 4) / 6)


def test_a_constant_is_not_given():
    wave = noise(8000)[None]
    front_end = KaldiMel()
    torch.testing.assert_close(front_end(wave + 0.25), front_end(wave), atol=1e-3, rtol=0)


def test_a_tone_peaks_in_the_band_whose_centre_is_nearest():
    front_end = KaldiMel()
    tone = torch.sin(2 * math.pi * 2000 * torch.arange(16000) / 16000)
    assert front_end(tone[None])[0].mean(1).argmax() == (front_end.band_centers_hz - 2000).abs().argmin()


def test_it_is_built_again_from_its_description_and_is_no_part_of_a_checkpoint():
    front_end = KaldiMel(n_mels=64, f_max=7600.0, mean=-4.6476, std=4.5699)
    again = build_front_end(front_end.description)
    assert isinstance(again, KaldiMel)
    assert again.description == front_end.description
    assert (again.n_mels, again.f_max, again.mean, again.std) == (64, 7600.0, -4.6476, 4.5699)
    wave = noise(5000)[None]
    assert torch.equal(again(wave), front_end(wave))
    assert not front_end.state_dict()
    with pytest.raises(UserError, match="fit into 0 to 8000"):
        KaldiMel(f_max=9000)


def test_autocast_leaves_features_in_float32():
    wave = noise(8000)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = KaldiMel()(wave)
    assert mel.dtype == torch.float32
    torch.testing.assert_close(mel, KaldiMel()(wave))


class Levels(AudioTagger):
    """Tags by the mean of each band."""

    last_layer = "linear"

    def __init__(self):
        super().__init__(KaldiMel(n_mels=32), num_classes=3, embed_dim=32)
        self.linear = nn.Linear(32, 3)

    def encode(self, mel, n_frames=None, *, keep=None, layers=()):
        return Encoded(mel.shape[0], maps=mel[:, :, None])

    def classify(self, encoded):
        return self.linear(encoded.maps.mean((2, 3)))


def test_a_graph_that_takes_waveforms_computes_it(tmp_path):
    torch.manual_seed(0)
    model = Levels().eval()
    differences = export_onnx(model, {"fp32": tmp_path / "x.onnx"}, waveform=True)
    assert differences["fp32"] < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    for n_samples in (1, 399, 401, 16001, 160000):
        waves = torch.stack([sound(n_samples), noise(n_samples, 1, 1e-3), torch.zeros(n_samples)])
        found = torch.from_numpy(session.run(None, {"waveform": waves.numpy()})[0])
        torch.testing.assert_close(found, model.predict(waves), atol=1e-5, rtol=0)
