import logging

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import (
    attach_head,
    create_model,
    list_heads,
    load_head,
    load_model,
    load_tagger,
    load_weights,
    save_checkpoint,
)
from models.headed import Head
from models.heads import check_classes, save_head, weights_sha256
from tests.models.sounds import noise


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = Head(64, 3, hidden_sizes=[5], labels=["rain", "dog, barking", "sea"], activation="sigmoid").eval()
    head.mean.normal_()
    head.scale.uniform_(0.5, 2)
    head.facts = {"model": "audiotransformer_pico", "metric": "mAP", "value": 0.4567, "data": "esc10"}
    return head


@pytest.fixture
def small():
    torch.manual_seed(0)
    return create_model("audiotransformer_pico", num_classes=0, embed_dim=64, num_heads=1, depth=1).eval()


def test_a_head_standardises_and_goes_through_its_layers(head):
    embedding = torch.randn(2, 64)
    first, _, _, last = head.layers
    for row, output in zip(embedding, head(embedding), strict=True):
        scaled = torch.stack([(row[i] - head.mean[i]) / head.scale[i] for i in range(64)])
        hidden = (first.weight @ scaled + first.bias).clamp(min=0)
        torch.testing.assert_close(output, last.weight @ hidden + last.bias, atol=1e-5, rtol=1e-5)
    assert [type(layer) for layer in Head(4, 2).layers] == [nn.Linear]


def test_a_head_survives_its_file_and_is_listed(head, tmp_path):
    head.padded = True
    save_head(tmp_path / "mine.pt", head)
    (tmp_path / "broken.pt").write_bytes(b"no head")
    for again in (load_head("mine", tmp_path), load_head(tmp_path / "mine.pt")):
        embedding = torch.randn(2, 64)
        torch.testing.assert_close(again(embedding), head(embedding), atol=0, rtol=0)
        assert (again.labels, again.activation, again.facts) == (head.labels, "sigmoid", head.facts)
        assert again.hidden_sizes == (5,)
        assert again.padded
        assert not again.training
    listed = list_heads(tmp_path)
    assert listed["mine"] == "3 classes, mAP 0.457 on esc10, for audiotransformer_pico"
    assert "broken.pt" in listed["broken"]
    published = {"esc50": 50, "us8k": 10, "fsd50k": 200, "gtzan": 10, "openmic": 20, "nsynth": 11}
    published["magna-tag-a-tune"] = 50
    assert {name: int(listed[name].split()[0]) for name in published} == published


def test_a_published_head_is_one_linear_layer(tmp_path):
    state = {"probe.linear_probe.weight": torch.randn(10, 960), "probe.linear_probe.bias": torch.randn(10)}
    torch.save(state, tmp_path / "gtzan.pth")
    head = load_head(tmp_path / "gtzan.pth")
    embedding = torch.randn(3, 960)
    reference = embedding @ state["probe.linear_probe.weight"].T + state["probe.linear_probe.bias"]
    torch.testing.assert_close(head(embedding), reference, atol=1e-4, rtol=1e-4)
    assert head.padded
    state["probe.linear_probe.bias"] = torch.randn(11)
    torch.save(state, tmp_path / "gtzan.pth")
    with pytest.raises(UserError, match=r"gtzan\.pth: is not the published head 'gtzan'"):
        load_head(tmp_path / "gtzan.pth")


def test_what_is_no_head_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"no head is called 'esc5' \(did you mean 'esc50'\?\)"):
        load_head("esc5", tmp_path)
    torch.save({"model": {}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="expected a head, with 'head' and 'config'"):
        load_head("model", tmp_path)
    with pytest.raises(UserError, match="every width must be at least 1"):
        Head(64, 0)


@torch.inference_mode()
def test_a_model_with_a_head_tags_as_the_head_does(small, head, caplog):
    head.facts["weights_sha256"] = weights_sha256(small)
    with caplog.at_level(logging.WARNING):
        tagger = attach_head(small, head)
    assert not caplog.records
    clips, lengths = noise(32000).reshape(2, -1), torch.tensor([16000, 7000])
    clip, frames = small.embed(clips, lengths)
    torch.testing.assert_close(tagger(clips, lengths), head(clip))
    torch.testing.assert_close(tagger.predict(clips, lengths), head(clip).sigmoid())
    torch.testing.assert_close(tagger.embed(clips, lengths)[1], frames)
    mel, n_frames = tagger.front_end(clips, lengths), tagger.front_end.n_frames(lengths)
    torch.testing.assert_close(tagger.forward_spectrogram(mel, n_frames), head(clip), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tagger.tag_and_embed(mel, n_frames)[1], clip, atol=1e-5, rtol=1e-5)
    assert (tagger.labels, tagger.num_classes, tagger.embed_dim) == (head.labels, 3, 64)
    assert tagger.state_dict()[f"{tagger.last_layer}.weight"].shape == (3, 5)


def test_a_padded_head_gets_short_clips_as_those_it_was_trained_on(small, head):
    """Filled up with zeros that count as sound, whatever lies behind a clip in its batch."""
    head.padded = True
    tagger = attach_head(small, head)
    waves = noise(32000).reshape(2, 16000)
    whole = torch.zeros(2, 160000)
    whole[0, :16000], whole[1, :9000] = waves[0], waves[1, :9000]
    with torch.no_grad():
        found = tagger(waves, torch.tensor([16000, 9000]))
        torch.testing.assert_close(found, head(small.embed(whole)[0]), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, head(small.embed(waves, torch.tensor([16000, 9000]))[0]), atol=1e-2)


def test_a_head_on_other_weights_is_reported_and_on_another_width_refused(small, head, caplog):
    head.facts["weights_sha256"] = weights_sha256(small)
    with torch.no_grad():
        next(small.parameters()).add_(1)
    with caplog.at_level(logging.WARNING):
        attach_head(small, head)
    assert "trained on other weights" in caplog.text
    with pytest.raises(UserError, match=r"takes embeddings of width 64, .* have 96; it was trained on 'audiotra"):
        attach_head(create_model("mn01_as", num_classes=0), head)


def test_the_hash_of_a_models_weights_leaves_its_classes_out(small):
    torch.manual_seed(0)
    tagger = create_model("audiotransformer_pico", num_classes=7, embed_dim=64, num_heads=1, depth=1)
    tagger.load_state_dict({**tagger.state_dict(), **_without_last(small)})
    assert weights_sha256(tagger) == weights_sha256(small)


def _without_last(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith(model.last_layer)}


@pytest.fixture
def saved(small, head, tmp_path, monkeypatch):
    """A working folder with the model, as a checkpoint, and the head "mine"."""
    monkeypatch.chdir(tmp_path)
    head.facts |= {"weights_sha256": weights_sha256(small), "name": "mine"}
    save_checkpoint("model.pt", small)
    save_head("heads/mine.pt", head)
    return tmp_path


@torch.inference_mode()
def test_a_model_and_a_head_are_loaded_as_one_tagger(saved, small, head, caplog):
    tagger = load_tagger("model.pt", head="mine")
    clips = noise(32000).reshape(2, -1)
    torch.testing.assert_close(tagger.predict(clips), head(small.embed(clips)[0]).sigmoid())
    assert (tagger.labels, tagger.name, tagger.full_name) == (head.labels, small.name, "audiotransformer_pico+mine")
    assert not caplog.records  # these are the weights that the head was trained on
    assert load_tagger("model.pt").full_name == "audiotransformer_pico"
    merged = load_tagger("model.pt", head="mine", token_merging=4)
    assert merged.arguments["token_merging"] == 4
    small.merge_tokens(4)
    torch.testing.assert_close(merged.predict(clips), head(small.embed(clips)[0]).sigmoid())


def test_what_does_not_go_together_is_a_sentence(saved):
    for source, name, sentence in (
        ("gone.pt", "mime", r"no head is called 'mime' \(did you mean 'mine'\?\)"),  # before the model is read
        ("tagger.onnx", "mine", r"tagger\.onnx has no embeddings for --head"),
        (
            "tagger.onnx",
            None,
            r"tagger\.onnx is an exported model, which can only tag \(inference\.py",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            load_tagger(source, head=name)
    with pytest.raises(UserError, match=r"probe model\.pt --data PACK\.tsv"):
        check_classes(load_tagger("model.pt"), "model.pt")
    check_classes(load_tagger("model.pt", head="mine"), "model.pt")


@torch.inference_mode()
def test_a_checkpoint_holds_the_head_too(saved, small, head, caplog):
    tagger = load_tagger("model.pt", head="mine")
    save_checkpoint("both.pt", tagger)
    again = load_model("both.pt")
    clips = noise(32000).reshape(2, -1)
    torch.testing.assert_close(again.predict(clips), tagger.predict(clips), atol=0, rtol=0)
    assert (again.labels, again.activation, again.full_name) == (head.labels, "sigmoid", tagger.full_name)
    assert weights_sha256(again) == weights_sha256(small)
    other = Head(64, 2, labels=["a", "b"]).eval()
    save_head("heads/other.pt", other)
    replaced = load_tagger("both.pt", head="other")  # one head, not one on the other
    torch.testing.assert_close(replaced.predict(clips), other(small.embed(clips)[0]).softmax(1))
    fresh = create_model("audiotransformer_pico", num_classes=5, embed_dim=64, num_heads=1, depth=1).eval()
    load_weights(fresh, "both.pt")
    torch.testing.assert_close(fresh.embed(clips)[0], small.embed(clips)[0])
    assert load_model("both.pt", num_classes=4).predict(clips).shape == (2, 4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("audiotransformer_pico", {"target_length": 248}),
        ("audiotransformer_pico", {"target_length": 248, "pooling": "token"}),
        ("audiotransformer_pico", {"target_length": 248, "patch_stride": 10, "token_merging": 8}),
        ("ast_pico", {}),
        ("passt_pico", {}),
        ("mn01_as", {}),
        ("eres2net", {}),
        ("resnet10_small", {}),
    ],
)
def test_embeddings_in_shapes_alone_are_those_of_the_model(name, arguments):
    """What graphs hold below a head, also of clips of several chunks and of less than a patch."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=0, **arguments).eval()
    for n_samples in (1, 4000, 33333, 80000, 210001):
        clips = noise(2 * n_samples).reshape(2, -1)
        expected = model.embed(clips)[0]
        torch.testing.assert_close(model.embed_export(model.front_end(clips)), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_spectrograms_of_short_clips_are_filled_up_for_a_padded_head(small, head):
    """As waveforms are, but for the frames that hold both sound and zeros."""
    head.padded = True
    tagger = attach_head(small, head)
    clips, lengths = noise(32000).reshape(2, 16000), torch.tensor([16000, 9000])
    mel, n_frames = tagger.front_end(clips, lengths), tagger.front_end.n_frames(lengths)
    found, expected = tagger.forward_spectrogram(mel, n_frames), tagger(clips, lengths)
    unfilled = head(small.embed(clips, lengths)[0])
    assert (found - expected).abs().max() < 0.05 * (unfilled - expected).abs().max()
