"""AST beside Hugging Face's, with published and image weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from models import create_model, get_model_entry, list_models, load_model, load_weights, save_checkpoint
from models.audio_spectrogram_transformer import AST
from models.weight_sources import fetch
from tests.models.sounds import noise, padded

SMALL = {"target_length": 64, "depth": 2}  # 12 x 5 patches


@pytest.fixture
def ast():
    torch.manual_seed(0)
    model = create_model("ast_pico", num_classes=4, **SMALL).eval()
    nn.init.normal_(model.mlp_head[1].weight, std=0.3)
    return model


def huggingface_folder(folder, **settings):
    """A folder written by transformers itself, and the model that it wrote."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    arguments = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 200}
    arguments |= {"max_length": 100, "num_labels": 3, "id2label": {0: "dog", 1: "rain, heavy", 2: "bell"}}
    model = transformers.ASTForAudioClassification(transformers.ASTConfig(**arguments | settings)).eval()
    for parameter in model.parameters():  # norms and tokens are ones and zeros at the start
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    extractor = transformers.ASTFeatureExtractor(max_length=model.config.max_length, mean=-5.0, std=3.0)
    extractor.save_pretrained(folder)
    return model, extractor


@pytest.mark.parametrize("settings", [{}, {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}])
def test_a_folder_of_transformers_outputs_as_transformers_does_from_the_waveform_on(tmp_path, settings):
    theirs, extractor = huggingface_folder(tmp_path, **settings)
    ours = load_model(tmp_path)
    assert isinstance(ours, AST)
    assert ours.labels == ["dog", "rain, heavy", "bell"]
    clips = [noise(9_000, 1, 0.3), noise(12_345, 2, 0.02), noise(16_000, 3)]
    given = extractor([clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = theirs(given).logits
        for clip, features, row in zip(clips, given, expected, strict=True):
            mel = F.pad(ours.front_end(clip[None]), (0, 100), value=ours.fill)[0, :, : len(features)]
            torch.testing.assert_close(mel.T, features, atol=5e-4, rtol=0)  # float32 of the quietest bins
            torch.testing.assert_close(ours(clip[None])[0], row, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(*padded(clips)), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_for_another_network_or_spectrogram_is_refused_with_all_that_is_wrong(tmp_path):
    huggingface_folder(tmp_path, time_stride=8, hidden_act="relu")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": 32000}))
    with pytest.raises(UserError, match=r"(?s)3 faults.*time_stride 8.*hidden_act 'relu'.*sampling_rate 32000"):
        load_model(tmp_path)


def test_a_folder_whose_spectrograms_are_not_normalised_gets_them_so(tmp_path):
    huggingface_folder(tmp_path)
    normalised = load_model(tmp_path).front_end(noise(8000)[None])
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    plain = load_model(tmp_path).front_end(noise(8000)[None])
    torch.testing.assert_close(plain, normalised * 2 * 3.0 - 5.0)


def test_the_published_layout_loads_strictly_and_without_imagenets_last_layers(ast, tmp_path):
    state = {f"module.v.{key}" if "mlp_head" not in key else f"module.{key}": v for key, v in ast.state_dict().items()}
    published = state | {f"module.v.head{which}.bias": torch.zeros(1000) for which in ("", "_dist")}
    torch.save(published, tmp_path / "published.pth")
    loaded = load_model("ast_pico", weights=tmp_path / "published.pth", **SMALL)
    wave = noise(9000)[None]
    with torch.no_grad():
        assert torch.equal(loaded(wave), ast(wave))
    del state["module.v.norm.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"1 tensors are missing: norm\.bias"):
        load_model("ast_pico", weights=tmp_path / "short.pth", **SMALL)


@pytest.mark.parametrize("frames", [44, 104])
def test_positions_of_another_length_are_the_middle_ones_or_stretched(ast, frames, caplog):
    other = create_model("ast_pico", num_classes=4, **SMALL | {"target_length": frames})
    own = ast.pos_embed[:, 2:].unflatten(1, (12, 5))
    fitted = other.adapt_weights(ast.state_dict())["pos_embed"]
    assert "pos_embed is fitted from 12 x 5" in caplog.text
    assert torch.equal(fitted[:, :2], ast.pos_embed[:, :2])
    columns = fitted[:, 2:].unflatten(1, (12, -1))
    if frames == 44:
        assert torch.equal(columns, own[:, :, 1:4])
    else:
        expected = F.interpolate(own.permute(0, 3, 1, 2), (12, 9), mode="bilinear", align_corners=False)
        torch.testing.assert_close(columns.permute(0, 3, 1, 2), expected)


def test_deit_gives_its_weights(tmp_path, caplog):
    """By timm's own network of that name, with random weights: colours summed, positions fitted, heads left out."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10)
    torch.save(deit.state_dict(), tmp_path / "deit.pt")
    ast = create_model("ast_tiny", num_classes=3, target_length=304)  # 12 x 29 patches of 14 x 14
    start = ast.mlp_head[1].weight.clone()
    load_weights(ast, tmp_path / "deit.pt", pre_training=True)
    given = deit.state_dict()
    torch.testing.assert_close(ast.patch_embed.proj.weight[:, 0], given["patch_embed.proj.weight"].sum(1))
    grid = given["pos_embed"][:, 2:].transpose(1, 2).unflatten(2, (14, 14))
    wide = F.interpolate(grid[:, :, 1:13], (12, 29), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ast.pos_embed[:, 2:], wide.flatten(2).transpose(1, 2))
    assert torch.equal(ast.blocks[11].attn.qkv.weight, given["blocks.11.attn.qkv.weight"])
    assert torch.equal(ast.mlp_head[1].weight, start)
    assert "last layers (mlp_head" in caplog.text


def test_initialisation_from_timm_that_cannot_be_had_is_reported():
    with pytest.raises(UserError, match=r"timm has no model 'deit_tinny'"):
        load_weights(create_model("ast_pico", **SMALL), "timm:deit_tinny", pre_training=True)


def test_a_network_of_timms_is_read_by_name_from_a_file_fetched_by_hand(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    fetched = tmp_path / "checkpoints" / "deit_tiny_distilled_patch16_224.fb_in1k.safetensors"
    fetched.parent.mkdir()
    deit = timm.create_model("deit_tiny_distilled_patch16_224")
    save_file({key: value.contiguous() for key, value in deit.state_dict().items()}, fetched)
    ast = create_model("ast_tiny", num_classes=3, target_length=64)
    load_weights(ast, "timm:deit_tiny_distilled_patch16_224", pre_training=True)
    assert torch.equal(ast.blocks[3].mlp.fc1.weight, deit.blocks[3].mlp.fc1.weight)


def test_published_files_have_copies_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("models.downloads.transfer", lambda url, path: torch.save({"x": torch.zeros(1)}, path))
    names = [name for name in list_models("ast_*") if get_model_entry(name).weights]
    copies = [fetch(get_model_entry(name).weights).name for name in names]
    assert copies == [name.removeprefix("ast_") + ".pth" for name in names]


def test_short_clips_read_zero_before_normalisation_where_they_end(ast):
    wave = noise(6000)[None]
    mel = ast.front_end(wave)
    by_hand = torch.full((1, 128, 64), (0 + 4.2677393) / (2 * 4.5689974))
    by_hand[:, :, : mel.shape[2]] = mel
    with torch.no_grad():
        torch.testing.assert_close(ast(wave), ast.forward_spectrogram(by_hand))


@torch.inference_mode()
def test_clips_of_all_lengths_in_one_batch_are_tagged_and_embedded_as_alone(ast):
    clips = [noise(n, n, 0.2) for n in (50, 4_000, 10_395, 10_400, 25_000)]
    together, lengths = padded(clips)
    answers, (vectors, frames) = ast.predict(together, lengths), ast.embed(together, lengths)
    for row, clip in enumerate(clips):
        torch.testing.assert_close(answers[row], ast.predict(clip[None])[0], atol=1e-6, rtol=0)
        vector, steps = ast.embed(clip[None])
        torch.testing.assert_close(vectors[row], vector[0], atol=1e-5, rtol=1e-5)
        assert steps.shape[1] == ast.n_steps(len(clip))
        torch.testing.assert_close(frames[row, : steps.shape[1]], steps[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_clip_is_embedded_by_the_mean_of_its_two_tokens_chunks_averaged_by_their_frames(ast):
    mel = ast.front_end(noise(20_000)[None])  # 123 frames, two chunks
    rest = F.pad(mel[:, :, 64:], (0, 128 - mel.shape[2]), value=ast.fill)
    pieces = [ast.forward_features(piece)[:, :2].mean(1) for piece in (mel[:, :, :64], rest)]
    torch.testing.assert_close(ast.embed_spectrogram(mel)[0], (64 * pieces[0] + 59 * pieces[1]) / 123)


def test_it_learns_is_saved_and_is_itself_again(ast, tmp_path):
    ast.train()
    ast(noise(10_000)[None]).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ast.parameters())
    save_checkpoint(tmp_path / "ast.pt", ast)
    loaded, wave = load_model(tmp_path / "ast.pt"), noise(5000)[None]
    with torch.no_grad():
        assert torch.equal(loaded(wave), ast.eval()(wave))


def test_ten_seconds_are_1214_tokens():
    model = create_model("ast_tiny", depth=1)
    assert model.pos_embed.shape == (1, 1214, 192)
    assert create_model("ast_tiny", depth=1, target_length=512).pos_embed.shape[1] == 602
    assert create_model("ast_tiny", depth=1, target_length=128).pos_embed.shape[1] == 146
