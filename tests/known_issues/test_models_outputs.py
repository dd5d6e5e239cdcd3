"""Traps around what a tagger's output is called and how it becomes a probability."""

import pytest
import torch

from models import create_model
from tests.models.sounds import noise


@pytest.mark.parametrize("pooling", ["mean", "token", "dm", "logit"])
@torch.inference_mode()
def test_the_sigmoid_is_applied_once(pooling):
    # Scores that pass a second sigmoid are squeezed into 0.5 to 0.73.
    torch.manual_seed(0)
    model = create_model("audiotransformer_pico", num_classes=4, pooling=pooling).eval()
    model.outputlayer[1].bias.copy_(torch.tensor([-9.0, -3.0, 3.0, 9.0]))
    wave = noise(16000)[None]
    predicted = model.predict(wave)[0]
    torch.testing.assert_close(predicted, torch.tensor([-9.0, -3.0, 3.0, 9.0]).sigmoid(), atol=0.05, rtol=0.9)
    assert predicted[0] < 0.001
    assert predicted[3] > 0.999
    assert torch.equal(model.probabilities(model(wave))[0], predicted)


@torch.inference_mode()
def test_outputs_are_called_what_they_are():
    # Published "logits" were probabilities.
    wave = noise(16000)[None]
    for pooling in ("mean", "token", "dm", "logit"):
        model = create_model("audiotransformer_pico", num_classes=4, pooling=pooling).eval()
        model.outputlayer[1].bias.fill_(-5.0)
        assert model.outputs == ("logits" if pooling == "logit" else "probabilities")
        assert bool((model(wave) < 0).all()) == (model.outputs == "logits")
    assert create_model("mn01_as", num_classes=4).outputs == "logits"


@torch.inference_mode()
def test_softmax_of_logit_pooling_is_a_softmax():
    model = create_model("audiotransformer_pico", num_classes=4, pooling="logit", activation="softmax").eval()
    for n_samples in (16000, 400_000):
        wave = noise(n_samples)[None]
        torch.testing.assert_close(model.predict(wave), model(wave).softmax(1))
        torch.testing.assert_close(model.predict(wave).sum(), torch.tensor(1.0))
