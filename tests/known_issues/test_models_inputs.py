"""Traps that published taggers fell into between the waveform and the network."""

import pytest
import torch

from common.errors import UserError
from models import create_model
from tests.models.sounds import noise, padded


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=7).eval()
    torch.nn.init.normal_(model.outputlayer[1].weight, std=0.2)
    return model


@pytest.mark.parametrize("n_frames", [2024, 3036])
@torch.inference_mode()
def test_no_chunk_is_dropped_at_exact_multiples_of_the_chunk(model, n_frames):
    # `splits[:-1]` dropped the last full chunk: of 2024 frames only 1012 were heard.
    mel = model.front_end(noise((n_frames - 1) * 160)[None])
    assert mel.shape[2] == n_frames
    chunks = torch.cat([model.forward_spectrogram(chunk) for chunk in mel.split(1012, dim=2)])
    torch.testing.assert_close(model.forward_spectrogram(mel)[0], chunks.mean(0))
    louder = torch.cat([mel[..., :-1012], mel[..., -1012:] + 20], dim=2)
    assert (model.forward_spectrogram(louder) - model.forward_spectrogram(mel)).abs().max() > 1e-3


@torch.inference_mode()
def test_one_frame_more_than_a_chunk_is_given(model):
    mel = model.front_end(noise(1012 * 160)[None])
    assert mel.shape[2] == 1013
    last = torch.zeros(1, 64, 1012)
    last[..., :1] = mel[..., 1012:] - model.init_bn[1].running_mean[:, None]
    first, second = model.forward_spectrogram(mel[..., :1012]), model.forward_spectrogram(last)
    torch.testing.assert_close(model.forward_spectrogram(mel), (first + second) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["passt_pico", "ast_pico"])
@torch.inference_mode()
def test_what_follows_the_first_ten_seconds_counts_by_its_length(name):
    # PaSST left out columns without a position, AST frames: whatever came after 10 s changed nothing. Chunks that all
    # count the same are the opposite fault: one frame and silence had half of the probabilities.
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, depth=1).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    size = model.target_length
    mel = torch.randn(1, 128, size + 500)
    whole, first = (model.forward_spectrogram(mel[..., :n]).sigmoid() for n in (size + 500, size))
    louder = torch.cat([mel[..., :size], mel[..., size:] + 2], dim=2)
    assert (model.forward_spectrogram(louder).sigmoid() - whole).abs().max() > 0.01
    for n_more in (1, 15, 20):
        found = model.forward_spectrogram(mel[..., : size + n_more]).sigmoid()
        assert (found - first).abs().max() <= (n_more / (size + n_more) if n_more >= 16 else 1e-6)


def test_the_dynamic_range_is_clamped_below_the_clips_own_peak(model):
    # The floor was 120 dB below the loudest clip of the batch: a silent clip beside a loud one read -83 dB.
    quiet, loud = torch.zeros(16000), noise(16000, level=0.9)
    mel = model.front_end(torch.stack([quiet, loud]))
    assert torch.all(mel[0] == -100)
    click = torch.zeros(16000)
    click[8000] = 1e3
    alone = model.front_end(click[None])[0]
    assert alone.min().item() == pytest.approx(alone.max().item() - 120)


def test_the_dynamic_range_does_not_look_at_padding(model):
    clip = noise(8000, level=1e-4)
    alone = model.front_end(clip[None])[0]
    mel = model.front_end(*padded([clip, noise(16000)], filling=0.9))[0]
    torch.testing.assert_close(mel[:, : alone.shape[1]], alone, atol=1e-4, rtol=0)
    # A click at a clip's very end is loudest in the first frame that is not its own.
    click = torch.zeros(8150)
    click[-1] = 1e3
    together = model.front_end(*padded([click, noise(16000)], filling=0.0))[0]
    torch.testing.assert_close(together[:, :51], model.front_end(click[None])[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_one_second_alone_is_one_second_padded_to_five(model):
    # Without masks the probability of the same clip differed by up to 0.396.
    clip = noise(16000)
    alone = model.predict(clip[None])[0]
    for filling in (0.0, 0.9, float("nan")):
        together = model.predict(*padded([clip, noise(80000, seed=1)], filling=filling))[0]
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    unmasked = model.predict(torch.cat([clip, torch.zeros(64000)])[None])[0]
    assert (unmasked - alone).abs().max() > 0.01  # zeros that are part of the clip are heard


@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as"])
@torch.inference_mode()
def test_any_length_from_one_sample_up_is_tagged(name):
    # Below 2400 samples the front-end or the patch embedding raised.
    model = create_model(name, num_classes=3).eval()
    clips = [noise(n, seed=n) for n in (1, 2, 100, 256, 257, 512, 513, 514, 515, 2399, 2400, 2401)]
    outputs = torch.stack([model.predict(clip[None])[0] for clip in clips])
    assert outputs.isfinite().all()
    torch.testing.assert_close(model.predict(*padded(clips)), outputs, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_a_too_short_clip_is_one_followed_by_silence(model):
    clip = noise(700)
    extended = torch.cat([clip, torch.zeros(1700)])
    assert torch.equal(model(clip[None]), model(extended[None]))


@pytest.mark.parametrize("name", ["audiotransformer_pico", "mn01_as"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.inference_mode()
def test_nan_and_infinity_are_reported_and_do_not_reach_neighbours(name, value):
    # NaN went in and NaN came out, silently.
    model = create_model(name, num_classes=3).eval()
    batch = noise(32000).reshape(2, 16000)
    clean = model(batch)
    batch[1, 5000] = value
    torch.testing.assert_close(model(batch)[0], clean[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="clips 1 of the batch contain NaN or infinite samples"):
        model.predict(batch)


@torch.inference_mode()
def test_long_clips_of_a_batch_do_not_mix(model):
    # The Hugging Face port reshaped chunks of several clips into one another, and averaged embeddings before the head.
    clips = [noise(400_000, seed=seed, level=level) for seed, level in ((0, 0.3), (1, 0.01), (2, 0.1))]
    together = model.predict(torch.stack(clips))
    for clip, row in zip(clips, together, strict=True):
        chunks = torch.cat(
            [model.forward_spectrogram(c) for c in model.front_end(clip[None])[..., :2024].split(1012, 2)]
        )
        torch.testing.assert_close(model.predict(clip[None])[0], row, atol=1e-6, rtol=1e-5)
        mel = model.front_end(clip[None])[..., :2024]
        torch.testing.assert_close(model.forward_spectrogram(mel)[0], chunks.mean(0), atol=1e-6, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_waveform_without_batch_axis_is_refused(model):
    with pytest.raises(UserError, match=r"expected \(B,S\)"):
        model(noise(16000))
