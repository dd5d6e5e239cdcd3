import numpy as np
import pytest
import torch

from common.errors import UserError
from models import create_model, load_model
from models.layers import Attention
from tests.models.sounds import noise, padded

CHUNK = 161_919  # samples of 1012 frames at most


@pytest.fixture(scope="module")
def published(shared):
    return np.load(shared / "fixtures" / "ced_tiny_random_io.npz")


@pytest.fixture(scope="module")
def tiny(shared):
    return load_model("ced_tiny", weights=shared / "fixtures" / "ced_tiny_random.pt")


def clips_of(published):
    names = [key.removeprefix("wav/") for key in published if key.startswith("wav/")]
    return names, [torch.from_numpy(published[f"wav/{name}"].astype("float32") / 32768) for name in names]


@torch.inference_mode()
def test_published_outputs_and_features_of_every_clip_alone(tiny, published):
    for name, clip in zip(*clips_of(published), strict=True):
        np.testing.assert_allclose(tiny.predict(clip[None])[0], published[f"out/{name}"], atol=1e-5, rtol=0)
        mel = tiny.front_end(clip[None])[0]
        np.testing.assert_allclose(mel.mean(1), published[f"out/{name}/mel_mean"], atol=1e-3, rtol=0)
        np.testing.assert_allclose(mel[:, :4], published[f"out/{name}/mel_head"], atol=1e-3, rtol=0)


@torch.inference_mode()
def test_published_outputs_in_one_padded_batch_in_any_order(tiny, published):
    names, clips = clips_of(published)
    for order in (range(len(clips)), np.random.default_rng(3).permutation(len(clips))):
        outputs = tiny.predict(*padded([clips[i] for i in order]))
        for output, i in zip(outputs, order, strict=True):
            np.testing.assert_allclose(output, published[f"out/{names[i]}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("mini", 256), ("small", 384), ("base", 768)])
def test_number_of_parameters_is_the_published_one(size, width):
    model = create_model(f"audiotransformer_{size}")
    assert sum(p.numel() for p in model.parameters()) == 144 * width**2 + 1011 * width + 655
    assert model.embed_dim == width


def test_ten_seconds_are_248_tokens(pico):
    assert pico.forward_features(torch.zeros(1, 64, 1001)).shape == (1, 248, 64)
    assert pico.n_steps(160000) == 62


@pytest.mark.parametrize("pooling", ["mean", "token", "dm", "logit"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@torch.inference_mode()
def test_every_pooling_predicts_probabilities_and_ignores_padding_and_order(pooling, activation):
    torch.manual_seed(1)
    model = create_model("audiotransformer_pico", num_classes=5, pooling=pooling, activation=activation).eval()
    torch.nn.init.normal_(model.outputlayer[1].weight, std=0.2)
    clips = [noise(n, seed=n) for n in (100, 16000, 40000, CHUNK, CHUNK + 160, 2 * CHUNK)]
    together = model.predict(*padded(clips))
    assert together.min() > 0
    assert together.max() < 1
    if activation == "softmax":
        torch.testing.assert_close(together.sum(1), torch.ones(len(clips)))
    for clip, row in zip(clips, together, strict=True):
        torch.testing.assert_close(model.predict(clip[None])[0], row, atol=1e-5, rtol=0)
    assert (together[1] - together[2]).abs().max() > 1e-3


@torch.inference_mode()
def test_logit_and_mean_pooling_agree_on_short_and_long_clips(pico):
    logit = create_model("audiotransformer_pico", num_classes=7, pooling="logit").eval()
    logit.load_state_dict(pico.state_dict())
    for n_samples in (16000, 400_000):
        wave = noise(n_samples, seed=5)[None]
        assert logit(wave).min() < 0
        torch.testing.assert_close(logit(wave).sigmoid(), pico(wave), atol=1e-6, rtol=1e-5)


def test_logits_of_extreme_chunks_stay_finite(pico):
    from models.chunks import join_logits

    rows, clip = torch.tensor([[60.0, -60.0], [-60.0, -70.0]]), torch.tensor([0, 0])
    joined = join_logits(rows, clip, 1, "mean", "sigmoid")[0]
    wanted = [0.0, np.log((np.exp(-60) + np.exp(-70)) / 2)]
    np.testing.assert_allclose(joined, wanted, rtol=1e-5, atol=1e-6)
    assert join_logits(rows, clip, 1, "max", "sigmoid")[0].tolist() == [60.0, -60.0]


@torch.inference_mode()
def test_eval_avg_max_takes_the_largest_probability_of_a_chunk(pico):
    largest = create_model("audiotransformer_pico", num_classes=7, eval_avg="max").eval()
    largest.load_state_dict(pico.state_dict())
    mel = pico.front_end(noise(2 * CHUNK + 161, seed=2)[None])[:, :, :2024]
    chunks = torch.cat([pico.forward_spectrogram(mel[..., :1012]), pico.forward_spectrogram(mel[..., 1012:])])
    torch.testing.assert_close(largest.forward_spectrogram(mel)[0], chunks.amax(0))
    torch.testing.assert_close(pico.forward_spectrogram(mel)[0], chunks.mean(0))


def test_attention_is_softmax_of_scores_times_values():
    torch.manual_seed(0)
    attention = Attention(32, 4)
    x = torch.randn(2, 5, 32)
    query, key, value = attention.qkv(x).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) / 8**0.5
    keep = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None]
    for bias, masked in ((None, scores), (keep, scores.masked_fill(~keep, -torch.inf))):
        wanted = attention.proj((masked.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 32))
        out, keys = attention(x, bias)
        torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(keys, key)


def test_a_mask_is_used_only_where_clips_differ(pico, monkeypatch):
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    batch = noise(32000).reshape(2, 16000)
    pico(batch)
    pico(batch, torch.tensor([16000, 16000]))
    pico(batch, torch.tensor([8000, 8000]))
    pico(noise(400_000)[None])
    assert masks == [None] * 16
    pico(batch, torch.tensor([16000, 8000]))
    assert masks[-1].shape == (2, 1, 1, 24)
    assert masks[-1].sum() == 24 + 12


@torch.inference_mode()
def test_embeddings_are_means_of_tokens(pico):
    wave = noise(48000)[None]
    tokens = pico.forward_features(pico.front_end(wave))  # (1, 4 * 18, D)
    clip, frames = pico.embed(wave)
    torch.testing.assert_close(clip, tokens.mean(1))
    torch.testing.assert_close(frames, tokens.reshape(1, 4, 18, 64).mean(1))
    assert pico.n_steps(48000) == 18


@torch.inference_mode()
def test_embeddings_of_a_padded_batch_are_those_of_each_clip(pico):
    clips = [noise(n, seed=n) for n in (1, 16000, CHUNK + 1000, 400_000)]
    clip, frames = pico.embed(*padded(clips))
    for wave, vector, steps in zip(clips, clip, frames, strict=True):
        alone, alone_steps = pico.embed(wave[None])
        n_steps = pico.n_steps(len(wave))
        assert alone_steps.shape[1] == n_steps
        torch.testing.assert_close(vector, alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steps[:n_steps], alone_steps[0], atol=1e-5, rtol=1e-5)
        assert torch.all(steps[n_steps:] == 0)


def test_patch_out_drops_columns_and_rows_only_in_training_and_by_its_generator(monkeypatch):
    model = create_model("audiotransformer_pico", num_classes=3, time_patch_out=2, freq_patch_out=1)
    sizes = []
    model.norm.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    mel = torch.randn(2, 64, 101)
    outputs = []
    for seed in (0, 0, 1):
        model.generator = torch.Generator().manual_seed(seed)
        outputs.append(model.forward_spectrogram(mel))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval().forward_spectrogram(mel)
    assert sizes == [4 * 3] * 3 + [6 * 4]


def test_patch_out_keeps_something_of_every_clip_of_a_padded_batch():
    model = create_model("audiotransformer_pico", num_classes=3, time_patch_out=60)
    for seed in range(5):
        model.generator = torch.Generator().manual_seed(seed)
        assert model.forward_spectrogram(torch.randn(2, 64, 1001), torch.tensor([16, 1001])).isfinite().all()


def test_statistics_of_the_input_normalisation_leave_padding_out():
    clips = [noise(4000, level=1.0), noise(16000, seed=1, level=0.1)]
    model = create_model("audiotransformer_pico", num_classes=3)
    model(*padded(clips))
    own = torch.cat([model.front_end(clip[None])[0] for clip in clips], dim=1)  # (F, T of both)
    torch.testing.assert_close(model.init_bn[1].running_mean, 0.01 * own.mean(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling": "logit", "init_bn": True},
        {"target_length": 1012, "pooling": "logit"},
        {"init_bn": False, "init_values": 1e-4, "drop_path_rate": 0.1, "qkv_bias": False, "center": False},
        {"n_mels": 128, "patch_stride": 10, "f_min": 50, "f_max": None, "hop_size": 320, "drop_rate": 0.1},
    ],
)
def test_published_arguments_are_taken(arguments):
    model = create_model("audiotransformer_pico", num_classes=4, **arguments)
    assert model(noise(32000).reshape(2, 16000)).shape == (2, 4)
    assert model.arguments == arguments


def test_softmax_and_names_without_weight_decay():
    model = create_model("audiotransformer_pico", pooling="token")
    assert model.no_weight_decay() == {"time_pos_embed", "freq_pos_embed", "cls_token", "token_pos_embed"}


def test_faults_of_arguments_are_reported_together():
    with pytest.raises(UserError, match=r"(?s)2 faults.*pooling must be one of.*cannot be shared among 5 heads"):
        create_model("audiotransformer_pico", pooling="men", num_heads=5)


def test_a_spectrogram_that_does_not_fit_is_reported(pico):
    with pytest.raises(UserError, match="64 bands and at least 16 frames, not 64 bands and 15 frames"):
        pico.forward_spectrogram(torch.zeros(1, 64, 15))
    with pytest.raises(UserError, match="not 128 bands"):
        pico.forward_spectrogram(torch.zeros(1, 128, 50))
