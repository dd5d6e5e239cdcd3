"""Traps that exported audio taggers fell into."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from models import create_model
from models.onnx import _CONVERSIONS, export_onnx
from models.onnx_tracing import _trace
from tagging.onnx_engine import OnnxEngine
from tests.models.sounds import noise

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network whose training left the sigmoid to the loss, and its file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("audiotransformer_pico", num_classes=4, pooling="logit", depth=1).eval()
    with torch.no_grad():
        model.outputlayer[1].bias.copy_(torch.tensor([-9.0, -3.0, 3.0, 9.0]))
    path = tmp_path_factory.mktemp("onnx") / "pico.onnx"
    export_onnx(model, {"fp32": path}, waveform=True)
    return model, path


def test_the_sigmoid_is_inside_and_is_applied_once(exported):
    # A second one squeezed scores into 0.5 to 0.73; a missing one gave a runtime logits for probabilities.
    model, path = exported
    found = OnnxEngine(path).predict([noise(16000).numpy()])[0]
    np.testing.assert_allclose(found, model.predict(noise(16000)[None])[0].numpy(), atol=1e-6)
    assert found[0] < 0.001
    assert found[3] > 0.999


@pytest.mark.parametrize("seconds", [0.01, 10.1, 11.4, 25.0])
def test_clips_shorter_than_a_patch_and_longer_than_the_network_are_tagged(exported, seconds):
    # "63 by 71" was what clips of more than 10.1 s crashed with.
    model, path = exported
    wave = noise(round(seconds * 16000))
    found = OnnxEngine(path).predict([wave.numpy()])[0]
    np.testing.assert_allclose(found, model.predict(wave[None])[0].numpy(), atol=1e-6)


class Ceiling(nn.Module):
    """Rounds a quotient of shapes up in the way that is usual in Python."""

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        return feats[:, 0, :1] + -(-feats.shape[2] // 10)


@pytest.mark.parametrize("length", [5, 10, 11])
def test_negative_quotients_of_shapes_are_rounded_down_in_graphs(length):
    # PyTorch's exporter writes a division that rounds towards zero; `models.onnx` has one of its own.
    graph = _trace(Ceiling(), torch.zeros(2, 3, 25), "feats", "prob", 18)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"feats": np.zeros((1, 3, length), np.float32)})[0]
    assert found.item() == -(-length // 10)


class Saturating(nn.Module):
    """A product of large weights and inputs of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8, bias=False)
        nn.init.constant_(self.layer.weight, 1.0)

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        return self.layer(feats.transpose(1, 2)).mean(1)


def test_eight_bit_products_do_not_overflow_the_sixteen_bits_they_are_added_in():
    # On processors without VNNI two products of 8 by 8 bits saturate; mn04's probabilities were off by 0.28.
    model = Saturating()
    given = torch.full((1, 64, 20), 7.0)
    graph = _CONVERSIONS["int8"](_trace(model, given.repeat(2, 1, 1), "feats", "prob", 18))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"feats": given.numpy()})[0]
    np.testing.assert_allclose(found, model(given).detach().numpy(), rtol=0.01)
