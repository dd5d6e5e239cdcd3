"""A change of parameters is an argument of the model: what training wrote is what everything else computes with."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from common.errors import UserError
from models import create_model, load_model, load_weights, save_checkpoint
from models.onnx import export_onnx
from models.parametrizations import bake_parametrizations, register_parametrization
from models.weight_sources import read_weights
from tests.models.sounds import noise

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure


class AddedProduct(nn.Module):
    """W + a b of a small rank: the weights as they were, and a change that is learnt beside them."""

    def __init__(self, shape, rank):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(shape[0], rank)), nn.Parameter(torch.ones(rank, shape[1]))

    def forward(self, weight):
        return weight + self.a @ self.b

    def right_inverse(self, weight):
        return weight


class Levels(nn.Module):
    """Weights in steps of a size, gradients as if they were not."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, weight):
        return weight + ((weight / self.step).round() * self.step - weight).detach()


@register_parametrization("test_low_rank")
def add_product(model, *, rank, only="fc1"):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(only):
            parametrize.register_parametrization(layer, "weight", AddedProduct(layer.weight.shape, rank))


@register_parametrization("test_levels")
def round_weights(model, *, step):
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(layer, "weight", Levels(step))


CHANGES = {"test_low_rank": {"rank": 2}, "test_levels": {"step": 0.05}}
SOUND = torch.stack([noise(16000, 1), noise(16000, 2)])


def build(name="audiotransformer_pico", changes=CHANGES, **arguments):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, parametrize=changes, **arguments).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".a"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("name", ["audiotransformer_pico", "resnet10_small", "mobilenetv3"])
def test_a_checkpoint_is_read_as_it_was_written(name, tmp_path):
    changes = CHANGES if name == "audiotransformer_pico" else {"test_levels": {"step": 0.05}}
    model = build(name, changes)
    save_checkpoint(tmp_path / "own.pt", model)
    again = load_model(tmp_path / "own.pt")
    assert again.arguments == model.arguments == {"parametrize": changes}
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again.predict(SOUND), model.predict(SOUND))
    assert not torch.allclose(again.predict(SOUND), build(name, {}).predict(SOUND), atol=1e-4)


def test_what_is_drawn_for_the_network_does_not_depend_on_its_changes():
    plain, changed = build(changes={}).state_dict(), build().state_dict()
    for key, value in plain.items():
        stem, _, last = key.rpartition(".")
        original = changed.get(f"{stem}.parametrizations.{last}.original", changed.get(key))
        assert torch.equal(value, original)


def test_plain_weights_become_the_originals(tmp_path):
    """Those of a network without the change, of which training starts."""
    torch.manual_seed(3)
    save_checkpoint(tmp_path / "plain.pt", create_model("audiotransformer_pico", num_classes=5))
    plain = read_weights(tmp_path / "plain.pt")[0]
    for model in (build(), load_model(tmp_path / "plain.pt", parametrize=CHANGES)):
        if not model.arguments["parametrize"] or model.training is False:
            load_weights(model, tmp_path / "plain.pt", pre_training=True)
        layer = model.blocks[0].mlp.fc1
        assert torch.equal(layer.parametrizations.weight.original, plain["blocks.0.mlp.fc1.weight"])
        assert torch.equal(model.patch_embed.proj.parametrizations.weight.original, plain["patch_embed.proj.weight"])
        changed = layer.parametrizations.weight[0](plain["blocks.0.mlp.fc1.weight"])
        torch.testing.assert_close(layer.weight, (changed / 0.05).round() * 0.05)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_computes_with_the_changed_weights(precision, tmp_path):
    model = build(pooling="logit", depth=1)
    export_onnx(model, {precision: tmp_path / "own.onnx"})
    session = onnxruntime.InferenceSession(str(tmp_path / "own.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"feats": model.front_end(SOUND).numpy()})
    np.testing.assert_allclose(found, model.predict(SOUND).numpy(), atol=1e-5 if precision == "fp32" else 0.05)
    assert parametrize.is_parametrized(model.blocks[0].mlp.fc1)  # the model itself stays as it is
    baked, before = build(pooling="logit", depth=1), model.predict(SOUND)
    bake_parametrizations(baked)
    assert not any(parametrize.is_parametrized(module) for module in baked.modules())
    assert torch.equal(baked.predict(SOUND), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test_lowrank": {"rank": 2}}, r"no change is called 'test_lowrank' \(did you mean 'test_low_rank'\?\)"),
        ({"test_low_rank": {}}, "test_low_rank cannot be applied with {}: .*rank"),
        ("test_low_rank", "parametrize is 'test_low_rank'; expected names of changes"),
    ],
)
def test_an_unknown_change_is_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("audiotransformer_pico", num_classes=2, parametrize=changes)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_checkpoint(tmp_path / "wide.pt", create_model("audiotransformer_pico", num_classes=5, embed_dim=128))
    with pytest.raises(UserError, match="have another shape"):
        load_weights(build(), tmp_path / "wide.pt")
