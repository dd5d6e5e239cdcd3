"""Heads on layers, of nearest neighbours and of prototypes: their values beside slow references, files and exports."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from models import attach_head, create_model, get_ssondo, load_head, load_model, save_checkpoint
from models.description import restore_head
from models.head_inputs import HeadInput, average_steps, count_model_steps, measure_layers
from models.headed import Head
from models.heads import save_head, weights_sha256
from models.onnx import export_onnx
from models.other_heads import NeighbourHead, PrototypeHead, create_head
from models.pooled_cnn import PooledCNN
from scripts.hf.folder import export
from scripts.hf.modeling_ced import CedForAudioClassification
from tests.models.sounds import noise
from tests.scripts.test_export_hf import clips, loaded, own_probabilities, tagger

LABELS = ["rain", "dog", "sea"]
NETWORKS = {
    "pico": ("audiotransformer_pico", {"depth": 3, "target_length": 100}),
    "cnn": ("mn01_as", {}),
    "resnet": ("resnet10_small", {}),
    "recurrent": ("gru_small", {"hidden_size": 12}),
}


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind, arguments = NETWORKS[name]
        return create_model(kind, num_classes=0, **arguments).eval()


def make(kind, model, activation="softmax", **arguments):
    """A head on a model that tells sounds apart: standardised by, and of neighbours among, twelve noises."""
    waves = torch.stack([noise(16000, seed, 10.0 ** (-seed / 4)) for seed in range(12)])
    settings = {"labels": LABELS, "activation": activation} | arguments
    settings |= {"n_examples": 12, "n_neighbours": 4} if kind == "knn" else {}
    settings |= {"n_prototypes": 7, "stride": settings.get("stride", 1)} if kind == "prototypes" else {}
    if settings.get("layers"):
        widths = measure_layers(model)
        settings["widths"] = [widths[layer] for layer in settings["layers"]]
    width = sum(settings.get("widths", ())) or model.embed_dim
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        head = create_head(kind, width, 3, **settings).eval()
        found = head.input.compute(model, *model.front_end.spectrogram(waves, None))
        head.mean.copy_(found.reshape(-1, width).mean(0))
        head.scale.copy_(found.reshape(-1, width).std(0).clamp(min=1e-3))
        if isinstance(head, NeighbourHead):
            head.store(found, F.one_hot(torch.arange(12) % 3, 3).float())
        elif head.gate is not None:
            head.gate.normal_()
        if kind != "knn":
            head.layers[-1].weight.normal_(std=0.3 if kind == "prototypes" else 1)
    head.facts = {"name": kind, "model": model.name, "weights_sha256": weights_sha256(model)}
    return head


@torch.no_grad()
def test_neighbours_vote_by_their_cosine():
    model = build("cnn")
    for activation in ("softmax", "sigmoid"):
        head = make("knn", model, activation)
        x = torch.randn(2, model.embed_dim) * head.scale + head.mean
        for row, logits in zip(x, head(x), strict=True):
            z = ((row - head.mean) / head.scale).double()
            cosines = [float(F.cosine_similarity(z, example.double(), dim=0)) for example in head.examples]
            nearest = sorted(range(12), key=lambda i: -cosines[i])[:4]
            weights = {i: math.exp(cosines[i] / 0.07) for i in nearest}
            shares = [sum(w for i, w in weights.items() if i % 3 == c) / sum(weights.values()) for c in range(3)]
            found = logits.softmax(0) if activation == "softmax" else logits.sigmoid()
            torch.testing.assert_close(found, torch.tensor(shares), atol=1e-4, rtol=0)


@torch.no_grad()
def test_neighbours_on_layers_have_the_mean_of_their_cosines():
    model = build("cnn")
    head = make("knn", model, layers=[0, 5, 16])
    x = torch.randn(2, head.embed_dim) * head.scale + head.mean
    parts = [((x - head.mean) / head.scale).split(head.widths, 1), head.examples.split(head.widths, 1)]
    cosines = [F.cosine_similarity(a[:, None], b[None], dim=2) for a, b in zip(*parts, strict=True)]
    torch.testing.assert_close(head.normalise(x) @ head.examples.T, sum(cosines) / 3, atol=1e-5, rtol=1e-4)
    assert head.layer_weights == {0: 1 / 3, 5: 1 / 3, 16: 1 / 3}


@torch.no_grad()
def test_layers_are_added_or_concatenated_by_their_weights():
    model = build("pico")
    head = make("mlp", model, layers=[0, 2])
    x = torch.randn(2, head.embed_dim)
    weights = list(head.layer_weights.values())
    assert sum(weights) == pytest.approx(1)
    z = (x - head.mean) / head.scale
    width = model.embed_dim
    expected = head.layers(weights[0] * z[:, :width] + weights[1] * z[:, width:])
    torch.testing.assert_close(head(x), expected)
    other = make("mlp", build("cnn"), layers=[0, 16])
    x = torch.randn(2, other.embed_dim)
    weights = list(other.layer_weights.values())
    first, second = ((x - other.mean) / other.scale).split(other.widths, 1)
    expected = other.layers(torch.cat([2 * weights[0] * first, 2 * weights[1] * second], 1))
    torch.testing.assert_close(other(x), expected)


def test_prototypes_are_compared_by_their_signs_and_the_gradient_passes_through():
    model = build("cnn")
    head = make("prototypes", model)
    steps = torch.randn(2, 5, model.embed_dim)
    with torch.no_grad():
        head.prototypes[0, 0] = 0.0  # counts as positive
    found = head.reduce(steps.flatten(1))
    for clip, row in zip(steps, found, strict=True):
        for prototype, value in zip(head.prototypes, row, strict=True):
            signs = torch.tensor([1.0 if number >= 0 else -1.0 for number in prototype.tolist()])
            tokens = [(token - head.mean) / head.scale for token in clip]
            cosines = [F.cosine_similarity(token, signs, dim=0) for token in tokens]
            torch.testing.assert_close(value, max(cosines) * model.embed_dim**0.5, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    through = head.prototypes.grad
    signs = torch.where(head.prototypes >= 0, 1.0, -1.0).detach().requires_grad_()
    tokens = F.normalize((steps - head.mean) / head.scale, dim=2)
    (tokens @ signs.T).amax(1).square().sum().backward()
    torch.testing.assert_close(through, signs.grad)


def test_steps_are_averaged_within_their_clip_alone():
    frames = torch.randn(3, 7, 2)
    found = average_steps(frames, torch.tensor([7, 4, 1]), 3)
    for clip, groups in enumerate(([[0, 1, 2], [3, 4, 5], [6]], [[0, 1, 2], [3], [3]], [[0], [0], [0]])):
        for group, value in zip(groups, found[clip], strict=True):
            torch.testing.assert_close(value, frames[clip, group].mean(0))
    assert average_steps(frames, None, 1) is frames
    torch.testing.assert_close(average_steps(frames, None, 1, 9)[:, :7], frames)
    torch.testing.assert_close(average_steps(frames, None, 3, 2), average_steps(frames, None, 3)[:, :2])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["mlp on layers", "knn", "prototypes"])
@torch.no_grad()
def test_a_clip_has_the_same_tags_alone_and_beside_longer_ones(name, kind, tmp_path):
    model = build(name)
    layers = {"layers": [0, 1]} if "layers" in kind else {}
    stride = {"stride": 2} if kind == "prototypes" else {}
    head = make(kind.split()[0], model, **layers, **stride)
    save_head(tmp_path / "head.pt", head)
    waves, lengths = noise(64000).reshape(2, -1), torch.tensor([32000, 9000])
    waves[1, 9000:] = 7.0
    model = attach_head(model, load_head(tmp_path / "head.pt"))
    together = model.predict(waves, lengths)
    alone = torch.cat([model.predict(waves[:1]), model.predict(waves[1:, :9000])])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 3e-4
    mel, n_frames = model.front_end.spectrogram(waves, lengths)
    scores, clip = model.tag_and_embed(mel, n_frames)
    torch.testing.assert_close(model.probabilities(scores), together, atol=1e-4, rtol=0)
    torch.testing.assert_close(clip, model.model.embed_clips(mel, n_frames))
    torch.testing.assert_close(model.probabilities(model.classify(model.encode(mel[:1], layers=(0, 1)))), alone[:1])
    stored = model.tag_embedding(model.embed_for_head(waves, lengths, as_stored=True))
    torch.testing.assert_close(stored, together, atol=0.02, rtol=0)
    save_checkpoint(tmp_path / "all.pt", model)
    torch.testing.assert_close(load_model(tmp_path / "all.pt").predict(waves, lengths), together)
    assert model.last_layer.startswith("head")


@torch.no_grad()
def test_segments_of_a_long_sound_are_averaged_before_the_head_decides():
    model = build("cnn")
    wave = noise(48000)[None]
    for head in (make("prototypes", model), make("mlp", model, layers=[3, 16])):
        head.facts["chunk_length"] = 1.0
        tagger = get_ssondo(attach_head(model, head).model)
        tagger.head, tagger.segment_samples, tagger.return_logits = head, 32000, True
        logits, clip = tagger(wave)
        parts = [head.embed_waveform(model, part, None) for part in (wave[:, :32000], wave[:, 32000:])]
        torch.testing.assert_close(logits, head((2 * parts[0] + parts[1]) / 3), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(clip, tagger.get_embeddings(wave))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("pico", kind) for kind in ("mlp on layers", "knn")),
        *((name, kind) for name in ("cnn", "resnet") for kind in ("mlp on layers", "knn", "prototypes")),
    ],
)
def test_exported_heads_tag_as_here(name, kind, tmp_path):
    model = build(name)
    layers = {"layers": [0, 1]} if "layers" in kind else {}
    own = attach_head(model, make(kind.split()[0], model, **layers))
    assert export_onnx(own, {"fp32": tmp_path / "x.onnx"})["fp32"] < 1e-3  # compared at several lengths


def test_prototypes_of_a_transformer_are_not_exported(tmp_path):
    model = build("pico")
    own = attach_head(model, make("prototypes", model))
    with pytest.raises(UserError, match="takes time steps, which exported files of transformers do not have"):
        export_onnx(own, {"fp32": tmp_path / "x.onnx"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mlp on layers", "knn", "prototypes"])
@torch.inference_mode()
def test_transformers_computes_the_same(kind, tmp_path):
    model = tagger(num_classes=7, target_length=248)
    layers = {"layers": [0, 1]} if "layers" in kind else {}
    own = attach_head(model, make(kind.split()[0], model, **layers))
    export(own, tmp_path / "hf")
    hf, extractor = loaded(tmp_path / "hf", CedForAudioClassification)
    sounds = clips(0.4, 1.0, 2.5, 4.3)
    wanted = own_probabilities(own, sounds)
    logits = hf(**extractor(sounds, sampling_rate=16000, return_tensors="pt")).logits
    torch.testing.assert_close(logits.softmax(-1), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(own_probabilities(load_model(tmp_path / "hf"), sounds), wanted, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused_with_a_sentence(monkeypatch):
    model = build("cnn")
    assert count_model_steps(model, 2.0) == model.n_steps(64000)
    with monkeypatch.context() as patch:
        patch.delattr(PooledCNN, "n_steps")  # as a network that has clip embeddings alone
        with pytest.raises(UserError, match="mn01_as has no time steps, only clip embeddings"):
            count_model_steps(model, 2.0)
    with pytest.raises(UserError, match="5 neighbours among 4 training clips: expected 1 to 4; give --neighbours"):
        NeighbourHead(8, 2, n_examples=4, n_neighbours=5)
    with pytest.raises(UserError, match="0 prototypes"):
        PrototypeHead(8, 2, n_prototypes=0, stride=1)
    with pytest.raises(UserError, match=r"layers 0, 1 of widths 8: expected a width for each layer, 8 in all"):
        Head(8, 2, layers=[0, 1], widths=[8])
    on_layers = make("mlp", model, layers=[0, 16])
    with pytest.raises(UserError, match=r"audiotransformer_pico has no layer 16: it has 3"):
        attach_head(build("pico"), on_layers)
    with pytest.raises(UserError, match=r"takes layers 0, 1 of widths 8, 8, those of 'gru_small' have others"):
        attach_head(build("recurrent"), make("mlp", model, layers=[0, 1]))
    for kind in ("knn", "prototypes"):
        head = make(kind, model)
        config, state = copy.deepcopy(head.config()), head.state_dict()
        for key in ("n_examples", "n_prototypes"):
            if key in config:
                with pytest.raises(UserError, match="described as larger than it is"):
                    restore_head(config | {key: 2**30}, state, "head.pt")
        with pytest.raises(UserError, match="head"):
            restore_head(config | {"kind": "tree"}, state, "head.pt")


@torch.no_grad()
def test_the_input_of_layers_is_that_of_the_model():
    model = build("resnet")
    mel = model.front_end(noise(32000).reshape(2, -1))
    found = HeadInput(layers=(1, 4)).compute(model, mel, None)
    torch.testing.assert_close(found, torch.cat(model.embed_layers(mel, None, (1, 4)), 1))
    assert found.shape[1] == sum(measure_layers(model)[layer] for layer in (1, 4))
