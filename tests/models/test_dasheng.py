"""Dasheng: patches as high as the spectrogram, chunks as published, published files."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from models import create_model, get_model_entry, load_model, save_checkpoint
from models.huggingface import get_network
from models.layers import PatchEmbed
from tests.models.sounds import noise, padded

SMALL = {"target_length": 96, "depth": 2}  # 24 columns


@pytest.fixture
def dasheng():
    torch.manual_seed(0)
    model = create_model("dasheng_pico", num_classes=3, **SMALL).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model.init_bn[1].running_mean.normal_()
    return model


def embed_slowly(model, clip: torch.Tensor) -> torch.Tensor:
    """Columns of one clip (T',D) as published code computes them, where its chunks are whole or have four frames."""
    mel = model.init_bn[1](model.front_end(clip[None])[:, :, None])[:, :, 0]  # (1,F,T)
    pieces = mel.split(model.target_length, 2)
    columns = []
    for piece in pieces:
        own = piece.shape[2] // 4
        if len(pieces) > 1:
            piece = F.pad(piece, (0, model.target_length - piece.shape[2]))
        x = F.conv2d(piece[:, None], model.patch_embed.proj.weight, model.patch_embed.proj.bias, (64, 4))
        x = x + model.time_pos_embed[..., : x.shape[3]] + model.freq_pos_embed
        x = x.flatten(2).mT
        for block in model.blocks:
            x = block(x)
        columns.append(model.norm(x)[0, :own])
    return torch.cat(columns)


@torch.inference_mode()
def test_columns_are_the_published_ones_alone_and_in_a_padded_batch(dasheng):
    clips = [noise(n, n, 0.2) for n in (1, 1000, 15_199, 15_200, 16_000, 30_000)]  # 4, 7, 95, 96, 101, 188 frames
    together, steps = dasheng.embed(*padded(clips))
    for row, clip in enumerate(clips):
        columns = embed_slowly(dasheng, clip)
        assert dasheng.n_steps(len(clip)) == len(columns)
        torch.testing.assert_close(steps[row, : len(columns)], columns, atol=2e-5, rtol=1e-4)
        assert not steps[row, len(columns) :].any()
        torch.testing.assert_close(together[row], columns.mean(0), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(dasheng.embed(clip[None])[1][0], columns, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_frames_that_do_not_fill_a_column_after_whole_chunks_change_nothing(dasheng):
    mel = torch.randn(1, 64, 99)
    assert torch.equal(dasheng.embed_clips(mel), dasheng.embed_clips(mel[:, :, :96]))
    assert dasheng.encode(mel).grid == (1, 24)


@torch.inference_mode()
def test_exports_count_the_same_columns(dasheng):
    for n_frames in (4, 7, 95, 96, 97, 101, 250):
        mel = torch.randn(2, 64, n_frames)
        torch.testing.assert_close(dasheng.embed_export(mel), dasheng.embed_clips(mel), atol=1e-5, rtol=1e-4)
        expected = dasheng.probabilities(dasheng.forward_spectrogram(mel))
        torch.testing.assert_close(dasheng.forward_export(mel), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "strides"), [((64, 4), (64, 4)), ((16, 8), (16, 8)), ((16, 8), (8, 4))])
def test_patches_of_any_shape_are_those_of_a_convolution(shape, strides):
    patches, mel = PatchEmbed(8, shape, strides), torch.randn(2, 64, 30)
    expected = F.conv2d(mel[:, None], patches.proj.weight, patches.proj.bias, strides).permute(0, 2, 3, 1)
    torch.testing.assert_close(patches(mel), expected, atol=1e-5, rtol=1e-4)


def test_patches_of_other_shapes_are_settings_of_every_transformer(tmp_path):
    model = create_model("audiotransformer_pico", num_classes=2, depth=1, patch_size=[32, 8], patch_stride=[16, 4])
    mel = torch.randn(1, 64, 40)
    assert model.encode(mel).grid == (3, 9)
    assert (model.n_rows, model.patch_size, model.patch_stride) == (3, 8, 4)
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_model(tmp_path / "model.pt")
    assert json.loads(json.dumps(again.arguments)) == again.arguments
    assert torch.equal(again.forward_spectrogram(mel), model.eval().forward_spectrogram(mel))
    with pytest.raises(UserError, match="must hold a patch of 65 bands and 4 frames"):
        create_model("dasheng_pico", patch_size=(65, 4))
    for wrong in ([64], [64, 4, 1], [0, 4], "64x4", 1.5):
        with pytest.raises(UserError, match="patch_size is"):
            create_model("dasheng_pico", patch_size=wrong)


def publish(model, path, config=None) -> None:
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("outputlayer.")}
    torch.save({"model": state, "config": config or {}}, path)


def test_published_encoders_are_read_strictly_and_only_embed(tmp_path, caplog):
    model = create_model("dasheng_pico", num_classes=0).eval()
    publish(model, tmp_path / "dasheng.pt", {"num_heads": 8, "patch_size": [64, 4], "target_length": 1008})
    clip = noise(20_000)[None]
    loaded = load_model(tmp_path / "dasheng.pt")
    assert (loaded.name, loaded.num_classes, loaded.n_steps(160_000)) == ("dasheng_pico", 0, 250)
    assert torch.equal(loaded.embed(clip)[1], model.embed(clip)[1])
    assert not caplog.records
    assert load_model("dasheng_pico", weights=tmp_path / "dasheng.pt", num_classes=7).predict(clip).shape == (1, 7)
    assert get_model_entry("dasheng_base").weights.endswith("/records/11511780/files/dasheng_base.pt?download=1")
    wide = create_model("dasheng_pico", num_classes=0, embed_dim=128, num_heads=4, depth=1)
    publish(wide, tmp_path / "wide.pt", {"num_heads": 4})
    assert load_model(tmp_path / "wide.pt").blocks[0].attn.num_heads == 4

    content = torch.load(tmp_path / "dasheng.pt")
    del content["model"]["norm.bias"]
    torch.save(content, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"1 tensors are missing: norm\.bias"):
        load_model(tmp_path / "cut.pt")


def test_files_of_other_networks_are_reported_in_one_sentence(tmp_path):
    publish(create_model("dasheng_pico", num_classes=0), tmp_path / "dasheng.pt")
    with pytest.raises(UserError, match=r"weights of Dasheng, not of 'audiotransformer_pico'") as caught:
        load_model("audiotransformer_pico", weights=tmp_path / "dasheng.pt")
    assert "\n" not in str(caught.value)
    torch.save(create_model("audiotransformer_pico").state_dict(), tmp_path / "ced.pt")
    with pytest.raises(UserError, match=r"weights of CED, not of 'dasheng_pico'") as caught:
        load_model("dasheng_pico", weights=tmp_path / "ced.pt")
    assert "\n" not in str(caught.value)


def test_it_is_no_ced_for_transformers():
    with pytest.raises(UserError, match=r"dasheng_pico is a Dasheng: only CED's audio transformers"):
        get_network(create_model("dasheng_pico"))
    with pytest.raises(UserError, match=r"matpac_pico is a MATPAC: only CED's audio transformers"):
        get_network(create_model("matpac_pico"))
