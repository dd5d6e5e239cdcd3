"""EfficientNet: what timm computes, tagged by its own head, whole through checkpoints, graphs and ranks."""

import copy
import logging
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import distributed as dist
from torch import nn

from common.errors import UserError
from models import create_model, get_model_entry, load_model, load_weights, save_checkpoint
from models.efficientnet import AttentionPooling, EfficientNet
from models.kaldi_mel import KaldiMel
from models.onnx import export_onnx
from tests.batches import make_batch
from tests.models.sounds import noise, padded
from training.parallel import share_batch_norm
from training.student import start_from_data

POOLINGS = ("mean", "attention")
LABELS = ["rain", "dog, barking", "sea"]


def small(pooling="mean", **arguments):
    """A tiny EfficientNet whose norms know noise of all levels and whose answers spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EfficientNet("test_efficientnet", num_classes=3, pooling=pooling, n_mels=64, **arguments)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(torch.stack([noise(8000, seed, 10.0**-seed) for seed in range(4)]))
        for norm in norms:
            norm.momentum = 0.1
        nn.init.normal_(model.classifier.weight, std=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=POOLINGS)
def model(request):
    return small(request.param)


def test_it_is_timms_network_and_a_linear_layer():
    model = small()
    reference = timm.create_model("test_efficientnet", in_chans=1, num_classes=3).eval()
    state = {key.removeprefix("body."): value for key, value in model.state_dict().items()}
    reference.load_state_dict(state, strict=True)
    wave = noise(20001)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(wave), reference(model.front_end(wave)[:, None]))


def test_numbers_of_parameters():
    def millions(**arguments):
        return sum(p.numel() for p in create_model("efficientnet_b2", **arguments).parameters()) / 1e6

    assert millions() == pytest.approx(7.70 + 1409 * 527 / 1e6, abs=0.01)  # of ImageNet's 9.11, 1.41 are its classifier
    assert millions(pooling="attention") == pytest.approx(13.6, abs=0.05)  # PSLA


def test_attention_pooling_is_what_its_formula_says():
    torch.manual_seed(0)
    pooling = AttentionPooling(6, 3, num_heads=2)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter)
    columns = torch.randn(2, 5, 6)
    logits, weights = pooling(columns)
    found = (logits.sigmoid() * weights).sum((1, 3))
    importance = pooling.head_score.exp() / pooling.head_score.exp().sum()
    for clip in range(2):
        for label in range(3):
            expected = 0.0
            for head in range(2):
                attention = torch.stack(
                    [
                        torch.sigmoid(
                            column @ pooling.attention_weight[label, head] + pooling.attention_bias[label, head]
                        )
                        for column in columns[clip]
                    ]
                )
                tags = torch.stack(
                    [
                        torch.sigmoid(column @ pooling.weight[label, head] + pooling.bias[label])
                        for column in columns[clip]
                    ]
                )
                expected = expected + importance[head] * (tags * attention / attention.sum()).sum()
            torch.testing.assert_close(found[clip, label], expected)


def test_attention_pooling_that_is_sure_gives_no_more_than_one():
    model = small("attention")
    wave = torch.stack([noise(32000, seed) for seed in range(8)])
    with torch.inference_mode():
        model.classifier.bias.fill_(40.0)
        maps = model.forward_features(model.front_end(wave)).mean(2).transpose(1, 2)
        logits, weights = model.classifier(maps)
        assert (logits.sigmoid() * weights).sum((1, 3)).max() > 1  # rounding
        assert model.predict(wave).max() == 1


def test_attention_pooling_tags_the_columns_of_the_map():
    model = small("attention")
    assert model.outputs == "probabilities"
    wave = noise(20001)[None]
    with torch.inference_mode():
        columns = model.forward_features(model.front_end(wave)).mean(2).transpose(1, 2)
        logits, weights = model.classifier(columns)
        expected = (logits.sigmoid() * weights).sum((1, 3))
        torch.testing.assert_close(model(wave), expected)
        torch.testing.assert_close(model.predict(wave), expected)
    model.activation = "softmax"
    one_of_all = model.predict(wave)
    torch.testing.assert_close(one_of_all.sum(1), torch.ones(1))
    assert one_of_all.std() > 0.01


def test_the_front_end_is_pslas():
    front_end = create_model("efficientnet_b0").front_end
    assert isinstance(front_end, KaldiMel)
    assert (front_end.sample_rate, front_end.n_mels) == (16000, 128)
    wave = noise(4000)[None]
    logarithms = KaldiMel(mean=0.0, std=0.5)(wave)
    torch.testing.assert_close(front_end(wave), (logarithms + 4.6476) / 4.5699)


@torch.inference_mode()
def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone(model):
    clips = [noise(n, seed=n) for n in (9000, 1, 700, 12000, 9000)]
    batch, lengths = padded(clips)
    together = model.predict(batch, lengths)
    by_mel = model.forward_spectrogram(model.front_end(batch, lengths), model.front_end.n_frames(lengths))
    embedded, frames = model.embed(batch, lengths)
    assert together.std(0).max() > 0.05
    for i, clip in enumerate(clips):
        torch.testing.assert_close(together[i], model.predict(clip[None])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.probabilities(by_mel)[i], together[i], atol=1e-5, rtol=0)
        alone, alone_frames = model.embed(clip[None])
        n_steps = model.n_steps(len(clip))
        assert alone_frames.shape == (1, n_steps, model.embed_dim)
        torch.testing.assert_close(embedded[i], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(frames[i, :n_steps], alone_frames[0], atol=1e-4, rtol=1e-4)
        assert torch.all(frames[i, n_steps:] == 0)


@torch.inference_mode()
def test_steps_of_any_length():
    model = small()
    for n_samples in (1, 400, 560, 5360, 5519, 5520, 40000):  # 32 and 33 frames begin at 5360 and 5520
        assert model.embed(noise(n_samples)[None])[1].shape[1] == model.n_steps(n_samples)
    assert [model.n_steps(n) for n in (1, 5519, 5520)] == [1, 1, 2]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_learns(pooling):
    torch.manual_seed(0)
    model = small(pooling, dropout=0.1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    waves, target = torch.stack([noise(8000, seed, 0.1**seed) for seed in range(3)]), torch.eye(3)
    losses = []
    for _ in range(5):
        loss = nn.functional.binary_cross_entropy(model.probabilities(model(waves)), target)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_stochastic_depth_is_timms():
    assert create_model("efficientnet_b0").body.blocks[-2][-1].drop_path.drop_prob == pytest.approx(0.2 * 14 / 16)
    still = create_model("efficientnet_b0", num_classes=2, drop_path_rate=0.0)
    assert isinstance(still.body.blocks[-2][-1].drop_path, nn.Identity)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_checkpoint_holds_all_of_it(pooling, tmp_path, caplog):
    model = create_model("efficientnet_b0", labels=LABELS, pooling=pooling, n_mels=64).eval()
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_model(tmp_path / "model.pt")
    wave = noise(9000)[None]
    assert (again.name, again.labels) == ("efficientnet_b0", LABELS)
    assert again.arguments == {"pooling": pooling, "n_mels": 64}
    assert torch.equal(again.predict(wave), model.predict(wave))
    assert not caplog.records
    other = load_model(tmp_path / "model.pt", num_classes=5)
    assert "initialised anew" in caplog.text
    with torch.inference_mode():
        torch.testing.assert_close(other.embed(wave)[0], model.embed(wave)[0])
    assert other.predict(wave).shape == (1, 5)
    with pytest.raises(UserError, match=r"classifier\.attention_weight"):
        load_model(tmp_path / "model.pt", pooling="mean" if pooling == "attention" else "attention")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_starts_from_pictures(pooling, tmp_path, caplog):
    assert get_model_entry("efficientnet_b2").initialisation == "timm:efficientnet_b2"
    torch.manual_seed(0)
    pictures = timm.create_model("efficientnet_b0", num_classes=10).eval()
    torch.save(pictures.state_dict(), tmp_path / "pictures.pt")
    model = create_model("efficientnet_b0", num_classes=3, pooling=pooling, n_mels=64)
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "pictures.pt", pre_training=True)
    assert "3 colours" in caplog.text
    assert "classifier of images is left out" in caplog.text
    assert "initialised anew" in caplog.text
    model.eval()
    grey = torch.randn(2, 64, 70)
    with torch.inference_mode():
        expected = pictures.forward_features((grey[:, None] / 3).expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.forward_features(grey), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_first_output_is_the_prior(pooling):
    torch.manual_seed(0)
    model = create_model("efficientnet_b0", num_classes=2, pooling=pooling, n_mels=64, drop_path_rate=0.0)
    batch = make_batch(
        waveforms={16000: torch.stack([noise(8000, seed, 0.1**seed) for seed in range(4)])},
        lengths={16000: torch.full((4,), 8000)},
        target=torch.tensor([[0.9, 0.02]]).expand(4, 2),
    )
    start_from_data(model, [batch])
    found = model.eval().predict(batch.waveforms[16000])
    torch.testing.assert_close(found, batch.target, atol=0.1, rtol=0)


def run(path, given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]


@pytest.mark.parametrize(("pooling", "waveform"), [("mean", True), ("attention", False)])
def test_it_can_be_exported(pooling, waveform, tmp_path):
    model = small(pooling)
    if pooling == "attention":  # a class that no column is thought to matter for: their weights still sum to one
        nn.init.constant_(model.classifier.attention_bias[0], -200.0)
    targets = {precision: tmp_path / f"x.{precision}.onnx" for precision in ("fp32", "int8")}
    differences = export_onnx(model, targets, waveform=waveform)
    assert differences["fp32"] < 1e-5
    spread = []
    for n_samples in (1, 700, 5519, 24001):
        wave = torch.stack([noise(n_samples, seed, 10.0 ** -(1 + seed)) for seed in range(3)])
        given, expected = wave if waveform else model.front_end(wave), model.predict(wave).numpy()
        spread.append(expected.std(0).min())
        np.testing.assert_allclose(run(targets["fp32"], given), expected, atol=1e-4)
        np.testing.assert_allclose(run(targets["int8"], given), expected, atol=0.1)
    assert max(spread) > 0.02
    operators = {node.op_type for node in onnx.load(targets["int8"]).graph.node}
    assert {"Conv", "MatMulInteger"} <= operators
    assert "ConvInteger" not in operators


def test_shared_batch_norm_keeps_the_activation_that_a_norm_holds(tmp_path):
    model = small(drop_path_rate=0.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        shared = copy.deepcopy(model)
        share_batch_norm(shared)
        assert shared.state_dict().keys() == model.state_dict().keys()
        waves = torch.stack([noise(9000, seed) for seed in range(2)])
        for mode in (False, True):
            torch.testing.assert_close(shared.train(mode)(waves), model.train(mode)(waves), atol=1e-3, rtol=1e-3)
    finally:
        dist.destroy_process_group()


def test_faults_are_sentences():
    with pytest.raises(UserError, match="pooling must be one of mean, attention, not 'max'"):
        create_model("efficientnet_b0", pooling="max")
    with pytest.raises(UserError, match="unknown argument 'variant'"):
        create_model("efficientnet_b0", variant="efficientnet_b2")


def test_other_models_do_not_wait_for_timm():
    code = "import sys, models; models.create_model('audiotransformer_pico'); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
