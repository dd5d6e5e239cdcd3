"""Networks of convolutions: one pass gives tags and embeddings, stages can be read, columns are counted."""

import copy

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import create_model, list_models
from models.pooled_cnn import PooledCNN
from models.registry import get_model_entry
from tests.models.sounds import noise

# A narrow network of every kind, as one with other widths of the same class computes alike.
SIZES = {
    "mn01_as": {},
    "dymn04_as": {"width": 0.1},
    "efficientnet_b0": {"n_mels": 64},
    "efficientnet_b0 attention": {"n_mels": 64, "pooling": "attention"},
    "resnet10_small": {},
    "densenet121_audio": {"n_mels": 32},
    "mobilenetv3": {"width": 0.1},
    "dymn": {"width": 0.1},
    "eres2net": {"m_channels": 4, "num_blocks": [1] * 5},
}


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(kind.split()[0], num_classes=5, **SIZES[kind]).eval()


@pytest.fixture(params=SIZES, scope="module")
def model(request):
    return build(request.param)


def spectrogram(model, seconds=(1.0, 0.4, 1.0)):
    """Spectrograms of three clips (B,F,T), and the frames of each (B,)."""
    rate = model.sample_rate
    waveform = noise(3 * rate).reshape(3, -1) * torch.tensor([[1.0], [0.01], [0.1]])
    return model.front_end.spectrogram(waveform, torch.tensor([round(rate * each) for each in seconds]))


def stages(model):
    """The modules whose outputs `layers` are, by their names in the state dict."""
    network = model.model if hasattr(model, "model") else model
    if hasattr(network, "features"):
        return list(network.features)
    if hasattr(network, "in_c"):
        return [network.in_c, *network.layers, network.out_c]
    if hasattr(network, "parts"):
        return [network.body.get_submodule(names[-1]) for names in network.parts.stages]
    if hasattr(network, "body"):
        return [network.body.bn1, *network.body.blocks, network.body.bn2]
    if hasattr(network, "stem"):
        return [network.stem, *network.blocks]
    return [network.layer1, *(network.get_submodule("fuse_mode" + "12345"[:stage]) for stage in (2, 3, 4, 5))]


def test_every_network_of_convolutions_is_tested_here():
    kinds = {getattr(entry.factory, "func", entry.factory) for entry in map(get_model_entry, list_models())}
    known = {type(build(kind)) for kind in SIZES}
    assert {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, PooledCNN)} == known


@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_tags_and_embeddings_of_one_pass_are_those_of_each_alone_bit_for_bit(model, padded):
    mel, n_frames = spectrogram(model)
    if not padded:
        n_frames = None
    output, clip = model.tag_and_embed(mel, n_frames)
    assert torch.equal(output, model.forward_spectrogram(mel, n_frames))
    assert torch.equal(clip, model.embed_spectrogram(mel, n_frames)[0])
    assert torch.equal(clip, model.embed_clips(mel, n_frames))
    assert clip.std(0).max() > 0
    waveform = noise(2 * model.sample_rate).reshape(2, -1)
    output, clip = model.tag_and_embed(model.front_end(waveform))
    assert torch.equal(output, model(waveform))
    assert torch.equal(clip, model.embed(waveform)[0])


def test_a_pass_in_training_updates_batch_norm_once(model):
    trained = copy.deepcopy(model).train()
    norms = [module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [int(norm.num_batches_tracked) for norm in norms]
    trained.tag_and_embed(torch.randn(2, trained.front_end.n_mels, 100))
    assert [int(norm.num_batches_tracked) for norm in norms] == [number + 1 for number in before]


@torch.inference_mode()
def test_layers_are_what_the_stages_gave(model):
    found = {}
    hooks = [
        stage.register_forward_hook(lambda _, __, output, number=number: found.update({number: output}))
        for number, stage in enumerate(stages(model))
    ]
    mel = spectrogram(model)[0]
    encoded = model.encode(mel, layers=range(len(hooks)))
    for hook in hooks:
        hook.remove()
    assert list(encoded.layers) == list(found) == list(range(len(hooks)))
    for number, output in found.items():
        reference = output[0] if isinstance(output, tuple) else output  # maps, and the columns of each clip
        if number == 0 and model.name == "resnet10_small":
            reference = reference.relu()  # behind the first convolution
        assert torch.equal(encoded.layers[number], reference)
    assert torch.equal(encoded.layers[len(hooks) - 1], encoded.maps)
    assert torch.equal(encoded.maps, model.forward_features(mel))
    assert torch.equal(model.encode(mel).maps, encoded.maps)
    assert not model.encode(mel).layers
    some = model.encode(mel, layers=(-1, 1))
    assert torch.equal(some.layers[-1], encoded.maps)
    assert torch.equal(some.layers[1], encoded.layers[1])


@torch.inference_mode()
def test_pooled_layers_are_means_of_each_stage_over_the_clip_alone(model):
    mel, n_frames = spectrogram(model)
    assert model.n_layers == len(stages(model))
    numbers = (*range(model.n_layers), -2)
    together = model.embed_layers(mel, n_frames, layers=numbers)
    assert torch.equal(together[model.n_layers - 1], model.embed_clips(mel, n_frames))
    assert torch.equal(together[-1], together[model.n_layers - 2])
    for row, length in enumerate(n_frames.tolist()):
        encoded = model.encode(mel[row : row + 1, :, :length], layers=numbers)
        for number, embeddings in zip(numbers[:-2], together[:-2], strict=True):
            maps = encoded.layers[number][0]
            expected = maps.double().sum((1, 2)) / maps[0].numel()
            torch.testing.assert_close(embeddings[row].double(), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(UserError, match=f"has no layer {model.n_layers}"):
        model.embed_layers(mel, n_frames, layers=(model.n_layers,))


def test_gradients_reach_the_stages_below_a_layer_and_no_others(model):
    trained = copy.deepcopy(model)
    trained.encode(spectrogram(trained)[0], layers=(1,)).layers[1].square().sum().backward()
    reached = [
        any(p.grad is not None and bool(p.grad.any()) for p in stage.parameters()) for stage in stages(trained)[:3]
    ]
    assert reached == [True, True, False]


def test_what_cannot_be_encoded_is_refused_with_what_there_is(model):
    mel, number = spectrogram(model)[0], len(stages(model))
    for layer in (number, -number - 1):
        with pytest.raises(UserError, match=rf"has no layer {layer}: it has {number}, 0 to {number - 1}; -1 is the"):
            model.encode(mel, layers=(0, layer))
    with pytest.raises(UserError, match=rf"{model.name} has no tokens to choose from"):
        model.encode(mel, keep=lambda rows, columns, valid: torch.zeros(3, 1, dtype=torch.long))


@torch.inference_mode()
def test_columns_are_every_strides_frame_rounded_up(model):
    for n_frames in (1, model.stride, model.stride + 1, 3 * model.stride - 1, 3 * model.stride):
        mel = torch.randn(1, model.front_end.n_mels, max(n_frames, 2))
        assert model.encode(mel).maps.shape[3] == -(-mel.shape[2] // model.stride)
    rate = model.sample_rate
    steps = model.embed(noise(rate)[None])[1].shape[1]
    assert steps == model.n_steps(rate) == -(-model.front_end.n_frames(rate) // model.stride)


@torch.inference_mode()
def test_where_padding_is_masked_the_steps_of_each_clip_are_counted():
    model = build("resnet10_small")
    mel, n_frames = spectrogram(model)
    encoded = model.encode(mel, n_frames)
    assert encoded.n_steps.tolist() == [-(-n // 16) for n in n_frames.tolist()]
    frames, clip = model.frames(encoded), model.pool(encoded)
    for row, number in enumerate(encoded.n_steps.tolist()):
        assert not frames[row, number:].any()
        torch.testing.assert_close(clip[row], frames[row, :number].mean(0))
    assert model.encode(mel).n_steps is None
