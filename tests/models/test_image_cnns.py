"""ResNet-50 and DenseNet-121: timm's networks with one channel, for any length, from its weights for pictures."""

import logging

import pytest
import timm
import torch
from torch import nn

from models import create_model, get_model_entry, load_weights
from models.onnx import export_onnx
from tests.models.sounds import noise

VARIANTS = ("resnet50", "densenet121")
N_WEIGHTS = {"resnet50": 23_501_760, "densenet121": 6_947_584}  # without classifier


def build(variant):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(f"{variant}_audio", num_classes=3)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(torch.stack([noise(8000, seed, 10.0**-seed) for seed in range(3)]))
        nn.init.normal_(model.classifier.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_it_is_timms_network_with_one_channel_and_a_linear_layer(variant):
    model = build(variant)
    reference = timm.create_model(variant, in_chans=1, num_classes=3).eval()
    last = {"resnet50": "fc", "densenet121": "classifier"}[variant]
    state = {key.replace("classifier", last).removeprefix("body."): value for key, value in model.state_dict().items()}
    reference.load_state_dict(state, strict=True)
    wave = noise(31 * 160 + 400)[None]  # 32 frames, of which no average leaves one out
    torch.testing.assert_close(model(wave), reference(model.front_end(wave)[:, None]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == N_WEIGHTS[variant] + 3 * (model.embed_dim + 1)
    for n_frames in (1, 31, 33, 65):
        assert model.encode(torch.randn(1, 64, n_frames)).maps.shape[2:] == (2, -(-n_frames // 32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_starts_from_pictures(variant, tmp_path, caplog):
    assert get_model_entry(f"{variant}_audio").initialisation == f"timm:{variant}"
    pictures = timm.create_model(variant, num_classes=10).eval()
    torch.save(pictures.state_dict(), tmp_path / "pictures.pt")
    model = create_model(f"{variant}_audio", num_classes=3).eval()
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "pictures.pt", pre_training=True)
    assert "3 colours" in caplog.text
    assert "classifier of images is left out" in caplog.text
    grey = torch.randn(1, 64, 64)
    with torch.inference_mode():
        expected = pictures.forward_features((grey[:, None] / 3).expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.forward_features(grey), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_takes_any_length(variant, tmp_path):
    assert export_onnx(build(variant), {"fp32": tmp_path / "model.onnx"}, waveform=True)["fp32"] < 1e-4
