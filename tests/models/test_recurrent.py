"""Recurrent networks: a state that continues a sound, no look-ahead, padding that never counts, and their sizes."""

import copy
import itertools
import math

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from common.errors import UserError
from models import create_model, list_models, load_model, save_checkpoint
from models.onnx import export_onnx
from models.packing import count_bytes, pack_model
from models.parametrizations import bake_parametrizations
from models.recurrent import SIZES, RecurrentTagger
from tests.models.sounds import noise, padded

N_CLASSES = 4
POOLINGS = ("last", "mean", "linear_softmax")
KINDS = list(itertools.product(("lstm_small", "gru_small"), POOLINGS, (1, 3)))


def build(name: str = "lstm_small", activation: str = "sigmoid", **arguments: object) -> RecurrentTagger:
    """A small network whose output differs from step to step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"hidden_size": 12, "n_mels": 16} | arguments
        model = create_model(name, num_classes=N_CLASSES, activation=activation, **settings).eval()
        assert isinstance(model, RecurrentTagger)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        model.bands.running_mean.normal_()
        model.bands.running_var.uniform_(0.5, 2)
    return model


def spectrogram(n_clips: int, n_frames: int, seed: int = 0) -> Tensor:
    return torch.randn(n_clips, 16, n_frames, generator=torch.Generator().manual_seed(seed))


def run_slowly(model: RecurrentTagger, mel: Tensor) -> tuple[Tensor, Tensor]:
    """One clip (F,T), one step after the other, by the formulas: logits (C,), probabilities of the steps (T',C)."""
    k = model.frame_stride
    normalised = (mel - model.bands.running_mean[:, None]) / (model.bands.running_var[:, None] + 1e-5).sqrt()
    frames = [torch.zeros(16)] * (k - 1) + list(normalised.T)
    hidden = [torch.zeros(model.embed_dim) for _ in model.layers]
    cells = [torch.zeros(model.embed_dim) for _ in model.layers]
    states = []
    for first in range(0, len(frames) - k + 1, k):
        x = torch.stack(frames[first : first + k], 1).flatten()  # the k frames of a band side by side
        for i, layer in enumerate(model.layers):
            ours = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
            theirs = F.linear(hidden[i], layer.weight_hh_l0, layer.bias_hh_l0)
            if isinstance(layer, nn.LSTM):
                into, forget, new, out = (ours + theirs).chunk(4)
                cells[i] = forget.sigmoid() * cells[i] + into.sigmoid() * new.tanh()
                hidden[i] = out.sigmoid() * cells[i].tanh()
            else:
                (reset, update, new), (reset_h, update_h, new_h) = ours.chunk(3), theirs.chunk(3)
                share = (update + update_h).sigmoid()
                hidden[i] = share * hidden[i] + (1 - share) * (new + (reset + reset_h).sigmoid() * new_h).tanh()
            x = hidden[i]
        states.append(x)
    logits = model.classifier(torch.stack(states))
    p = logits.softmax(1) if model.activation == "softmax" else logits.sigmoid()
    if model.pooling == "last":
        return logits[-1], p
    if model.pooling == "mean":
        return model.classifier(torch.stack(states).mean(0)), p
    y = p.double().square().sum(0) / p.double().sum(0)
    return (y.log() if model.activation == "softmax" else y.log() - (1 - y).log()).float(), p


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("name", "pooling", "stride"), KINDS)
@torch.no_grad()
def test_a_clip_has_the_output_of_the_formulas_and_steps_of_any_number_of_frames_give_the_same(
    name, pooling, stride, activation
):
    model = build(name, activation, pooling=pooling, frame_stride=stride)
    mel = spectrogram(2, 29)
    expected = [run_slowly(model, clip) for clip in mel]
    logits = model.forward_spectrogram(mel)
    torch.testing.assert_close(logits, torch.stack([each[0] for each in expected]), atol=1e-5, rtol=1e-5)
    probabilities = torch.stack([each[1] for each in expected])
    torch.testing.assert_close(model.step_probabilities(model.encode(mel)), probabilities, atol=1e-5, rtol=1e-5)
    for cuts in ([29], [1] * 29, [2, 1, 0, 13, 5, 8]):
        state, found, start = model.initial_state(2), [], 0
        for n_new in cuts:
            output, state = model.step(mel[:, :, start : start + n_new], state)
            start += n_new
            found.append(state.probabilities)
            torch.testing.assert_close(output, model.forward_spectrogram(mel[:, :, :start]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(found, 1), probabilities, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_state_neither_grows_nor_loses_precision_over_a_long_sound():
    for pooling in POOLINGS:
        model = build(pooling=pooling)
        mel, state = spectrogram(1, 500), model.initial_state()
        sizes = set()
        for _ in range(40):
            output, state = model.step(mel, state)
            tensors = [state.frames, state.pooled, *(part for pair in state.hidden for part in pair)]
            sizes.add(sum(tensor.numel() for tensor in tensors))
        torch.testing.assert_close(output, model.forward_spectrogram(mel.repeat(1, 1, 40)), atol=1e-5, rtol=1e-5)
        assert len(sizes) == 1


def test_a_step_that_does_not_fit_its_state_is_refused():
    model = build()
    with pytest.raises(UserError, match=r"frames have shape \(2, 16, 5\); expected \(1, 16\)"):
        model.step(spectrogram(2, 5), model.initial_state())
    with pytest.raises(UserError, match="no frame so far"):
        model.step(spectrogram(1, 0), model.initial_state())
    with pytest.raises(UserError, match="pooling must be one of last, mean, linear_softmax, not 'max'"):
        build(pooling="max")
    with pytest.raises(UserError, match="has no layer 2: it has 2"):
        model.encode(spectrogram(1, 5), layers=[2])
    with pytest.raises(UserError, match="no tokens to choose from"):
        model.encode(spectrogram(1, 5), keep=lambda f, t, valid: torch.zeros(1, 1))


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_padding_never_counts(pooling):
    model = build(pooling=pooling, frame_stride=3)
    lengths = torch.tensor([40, 1, 3, 4, 17])
    mel = spectrogram(5, 40)
    together = model.encode(mel, lengths, layers=[0, 1])
    louder = torch.where(torch.arange(40) < lengths[:, None, None], mel, 1e3)
    assert torch.equal(model.forward_spectrogram(louder, lengths), model.classify(together))
    for row, length in enumerate(lengths.tolist()):
        alone = model.encode(mel[row : row + 1, :, :length], layers=[0, 1])
        n_steps = int(together.n_steps[row])
        assert alone.maps.shape[3] == n_steps == -(-length // 3)
        torch.testing.assert_close(model.classify(together)[row], model.classify(alone)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model.pool(together)[row], model.pool(alone)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model.frames(together)[row, :n_steps], model.frames(alone)[0], atol=1e-6, rtol=1e-5)
        assert not model.frames(together)[row, n_steps:].any()
        for layer in (0, 1):
            torch.testing.assert_close(together.layers[layer][row, ..., :n_steps], alone.layers[layer][0])
            steps = alone.layers[layer][0, :, 0]  # (D,T')
            expected = steps[:, -1] if pooling == "last" else steps.sum(1) / steps.shape[1]
            torch.testing.assert_close(model.pool_layers(together)[layer][row], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.pool_layers(together)[1], model.pool(together))


def test_padding_has_no_gradient_and_is_not_in_the_statistics_of_training():
    model = build().train()
    lengths = torch.tensor([20, 6])
    mel = spectrogram(2, 20).requires_grad_()
    model.forward_spectrogram(mel, lengths).square().sum().backward()
    assert mel.grad.isfinite().all()
    assert mel.grad[1, :, :5].any()
    assert not mel.grad[1, :, 6:].any()
    valid = torch.cat([mel[0].detach(), mel[1, :, :6].detach()], 1)
    expected = build().bands.running_mean * 0.99 + valid.mean(1) * 0.01
    torch.testing.assert_close(model.bands.running_mean, expected)


@pytest.mark.parametrize("name", sorted(SIZES))
@torch.no_grad()
def test_later_frames_change_no_earlier_step(name):
    model = build(name)
    mel = spectrogram(1, 40)
    other = torch.cat([mel[:, :, :21], 100 * spectrogram(1, 19, seed=1)], 2)
    steps, changed = (model.step_probabilities(model.encode(each)) for each in (mel, other))
    assert torch.equal(steps[:, :11], changed[:, :11])  # frames up to 20
    assert not torch.isclose(steps[:, 11], changed[:, 11]).any()


@torch.no_grad()
def test_features_do_not_depend_on_the_sound_behind_their_frame_nor_on_its_level():
    model = build(n_mels=64)
    wave = noise(16000, level=0.01)
    for later in (torch.zeros(8000), torch.ones(8000), noise(8000, 1, 0.9)):
        mel = model.front_end(torch.cat([wave[:8000], later])[None])[0]
        n_frames = (8000 - 400) // 160 + 1
        torch.testing.assert_close(mel[:, :n_frames], model.front_end(wave[None])[0, :, :n_frames], atol=1e-5, rtol=0)
    # ten times the amplitude is a fixed offset of all logarithms, as there is no clamp
    offset = math.log(100) / (2 * model.front_end.std)
    louder = model.front_end(10 * wave[None]) - model.front_end(wave[None])
    torch.testing.assert_close(louder, torch.full_like(louder, offset), atol=1e-4, rtol=0)


@torch.no_grad()
def test_clips_shorter_than_a_frame_have_an_output_of_their_own():
    model = build(n_mels=64)
    clips = [noise(n, n) for n in (1, 50, 399, 16000)]
    together = model.predict(*padded(clips))
    for clip, row in zip(clips, together, strict=True):
        torch.testing.assert_close(model.predict(clip[None])[0], row, atol=1e-5, rtol=0)
    assert model.n_steps(1) == 1


@pytest.mark.parametrize("name", sorted(SIZES))
def test_networks_have_the_size_that_the_formula_says(name):
    cell, hidden = SIZES[name]
    gates = {"lstm": 4, "gru": 3}[cell]
    for stride in (1, 2, 3):
        model = create_model(name, num_classes=3, frame_stride=stride)
        expected = sum(gates * hidden * (n_in + hidden + 2) for n_in in (64 * stride, hidden)) + 3 * (hidden + 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_four_bits_of_lstm_medium_are_two_percent_of_a_resnet50():
    model = create_model("lstm_medium", num_classes=3, quantize={"weights": 4, "clip": "absmax"})
    bake_parametrizations(model)
    assert len(pack_model(model).data) < 0.02 * count_bytes(create_model("resnet50_audio", num_classes=3))


class Halve(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("name", ["lstm_small", "gru_small"])
def test_weights_may_be_parametrized_and_baked_and_the_baked_network_copied(name):
    model, half = build(name), build(name)
    with torch.no_grad():
        for layer in half.layers:
            layer.weight_ih_l0.div_(2)
            layer.weight_hh_l0.div_(2)
    for layer in model.layers:
        parametrize.register_parametrization(layer, "weight_ih_l0", Halve())
        parametrize.register_parametrization(layer, "weight_hh_l0", Halve())
    mel = spectrogram(2, 15)
    torch.testing.assert_close(model.forward_spectrogram(mel), half.forward_spectrogram(mel))
    model.forward_spectrogram(mel).sum().backward()
    half.forward_spectrogram(mel).sum().backward()
    for layer, other in zip(model.layers, half.layers, strict=True):
        torch.testing.assert_close(layer.parametrizations.weight_hh_l0.original.grad, other.weight_hh_l0.grad / 2)
    bake_parametrizations(model)
    baked = copy.deepcopy(model)
    torch.testing.assert_close(baked.forward_spectrogram(mel), half.forward_spectrogram(mel))


@pytest.mark.parametrize("activations", [None, 8])
@torch.no_grad()
def test_a_quantized_network_continues_sounds_as_well(activations, tmp_path):
    model = build(quantize={"weights": 4, "activations": activations})
    save_checkpoint(tmp_path / "model.pt", model)
    loaded = load_model(tmp_path / "model.pt")
    mel, state = spectrogram(2, 30), loaded.initial_state(2)
    for start in range(0, 30, 7):
        output, state = loaded.step(mel[:, :, start : start + 7], state)
    torch.testing.assert_close(output, loaded.forward_spectrogram(mel), atol=1e-5, rtol=1e-5)
    assert all(len(row.unique()) <= 16 for layer in loaded.layers for row in layer.weight_hh_l0)


QUICK_EXPORTS = {("lstm_small", "linear_softmax"), ("gru_small", "mean")}
EXPORTS = [
    pytest.param(name, pooling, marks=[] if (name, pooling) in QUICK_EXPORTS else pytest.mark.long)
    for name, pooling in itertools.product(("lstm_small", "gru_small"), POOLINGS)
]


@pytest.mark.parametrize(("name", "pooling"), EXPORTS)
def test_an_export_holds_recurrent_operators_and_takes_any_batch_and_length(name, pooling, tmp_path):
    paths = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "fp16")}
    # which compares with PyTorch for 1 to 5 clips of 1 sample to 10 seconds
    differences = export_onnx(build(name, pooling=pooling), paths)
    assert differences["fp32"] < 1e-5
    assert differences["fp16"] < 0.01
    for path in paths.values():
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert operators.count(name[:-6].upper()) == 2


def test_every_recurrent_model_is_tested_here():
    assert set(list_models("lstm_*") + list_models("gru_*")) == set(SIZES)
