"""ResNet-10: padding counts nowhere, in training neither."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from models import create_model
from models.onnx import export_onnx


def test_its_layers_are_those_of_a_residual_network_of_ten():
    model = create_model("resnet10", num_classes=5)
    kernels = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) + 1 == 10  # and the last, linear one
    assert sum(p.numel() for p in model.parameters()) == 308_021
    assert model.embed_dim == 128


def test_a_forward_pass_is_that_of_plain_operations():
    torch.manual_seed(0)
    model = create_model("resnet10", num_classes=5, width=4, n_mels=32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    mel = torch.randn(2, 32, 75) * 10 - 30
    state = model.state_dict()

    def norm(x, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    def layer(x, name, stride=1, pad=1):
        return norm(F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=pad), f"{name}.norm")

    x = norm(mel[:, :, None], "bands")[:, :, 0][:, None]
    x = layer(x, "stem", 2).relu()
    for block, stride in enumerate((1, 2, 2, 2)):
        y = layer(layer(x, f"blocks.{block}.first", stride).relu(), f"blocks.{block}.second")
        shortcut = layer(x, f"blocks.{block}.shortcut", stride, 0) if block else x
        x = (y + shortcut).relu()
    expected = x.mean((2, 3)) @ state["classifier.1.weight"].T + state["classifier.1.bias"]
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_spectrogram(mel), expected, atol=1e-5, rtol=1e-4)


def test_clips_in_a_padded_batch_get_what_they_get_alone():
    torch.manual_seed(0)
    model = create_model("resnet10", num_classes=5, width=4).eval()
    waveform = torch.randn(4, 32000) * torch.tensor([0.5, 0.01, 0.1, 0.001])[:, None]
    lengths = torch.tensor([32000, 300, 16001, 8159])
    with torch.inference_mode():
        together = model(waveform, lengths)
        clips, frames = model.embed(waveform, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = waveform[row : row + 1, :length]
            torch.testing.assert_close(together[row], model(alone)[0], atol=1e-5, rtol=1e-4)
            clip, own = model.embed(alone)
            torch.testing.assert_close(clips[row], clip[0], atol=1e-5, rtol=1e-4)
            steps = model.n_steps(length)
            assert own.shape[1] == steps
            torch.testing.assert_close(frames[row, :steps], own[0], atol=1e-5, rtol=1e-4)
            assert not frames[row, steps:].any()


def test_what_lies_in_the_padding_changes_nothing_in_training():
    torch.manual_seed(0)
    model = create_model("resnet10", num_classes=5, width=4, dropout=0.0)
    mel = torch.randn(3, 64, 90) * 10 - 30
    n_frames = torch.tensor([90, 33, 17])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    outputs, statistics = [], []
    for filler in (-100.0, 25.0):
        model.load_state_dict(state)
        behind = torch.arange(90) >= n_frames[:, None, None]
        outputs.append(model.forward_spectrogram(mel.masked_fill(behind, filler), n_frames))
        statistics.append({name: value.clone() for name, value in model.named_buffers() if "running" in name})
    torch.testing.assert_close(*outputs)
    for name, value in statistics[0].items():
        torch.testing.assert_close(value, statistics[1][name], msg=name)
    # The first norm's statistics are those of the clips' own frames, put together.
    own = torch.cat([mel[row, :, :n] for row, n in enumerate(n_frames.tolist())], dim=1)
    expected = 0.99 * state["bands.running_mean"] + 0.01 * own.mean(1)
    torch.testing.assert_close(statistics[0]["bands.running_mean"], expected)


@pytest.mark.parametrize("waveform", [False, True])
def test_it_can_be_exported_for_any_batch_and_length(tmp_path, waveform):
    torch.manual_seed(0)
    model = create_model("resnet10", num_classes=3, width=4, hop_size=80, f_max=4000.0).eval()
    export_onnx(model, {"fp32": tmp_path / "model.onnx"}, waveform=waveform)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for n_clips, n_samples in ((1, 400), (3, 16000), (2, 40001)):
        sound = torch.randn(n_clips, n_samples) * 0.1
        given = sound if waveform else model.front_end(sound)
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        np.testing.assert_allclose(found, model.predict(sound).numpy(), atol=2e-5)
