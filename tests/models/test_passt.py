"""PaSST: the published layout, patch-out, positions of other lengths."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models.vit
from models import create_model, load_model, load_weights, save_checkpoint
from tests.models.sounds import noise, padded

SMALL = {"target_length": 96, "depth": 2}  # 12 x 9 patches


@pytest.fixture
def passt():
    torch.manual_seed(0)
    model = create_model("passt_pico", num_classes=4, **SMALL).eval()
    nn.init.normal_(model.head[1].weight, std=0.3)
    return model


def test_names_shapes_and_size_are_the_published_ones(shared):
    published = json.loads((shared / "fixtures/state_dicts/passt_s_swa_p16_128_ap476.json").read_text())
    model = create_model("passt_s")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["n_parameters"]


def test_the_head_reads_the_mean_of_both_tokens(passt):
    mel = passt.front_end(noise(20_000)[None])
    with torch.no_grad():
        tokens = passt.forward_features(mel)
        torch.testing.assert_close(passt.forward_spectrogram(mel), passt.head((tokens[:, 0] + tokens[:, 1]) / 2))
        torch.testing.assert_close(passt.embed_spectrogram(mel)[0], (tokens[:, 0] + tokens[:, 1]) / 2)


def test_short_clips_have_the_first_positions(passt):
    mel = passt.front_end(noise(12_000)[None])  # 38 frames, 3 columns
    x = F.conv2d(mel[:, None], passt.patch_embed.proj.weight, passt.patch_embed.proj.bias, 10)
    x = x + passt.freq_new_pos_embed + passt.time_new_pos_embed[..., :3]
    prefix = torch.cat([passt.cls_token + passt.new_pos_embed[:, :1], passt.dist_token + passt.new_pos_embed[:, 1:]], 1)
    x = torch.cat([prefix, x.flatten(2).transpose(1, 2)], 1)
    with torch.no_grad():
        for block in passt.blocks:
            x = block(x)
        torch.testing.assert_close(passt.forward_features(mel), passt.norm(x))


@torch.inference_mode()
def test_clips_of_all_lengths_in_one_batch_are_tagged_as_alone(passt):
    clips = [noise(n, n, 0.2) for n in (7, 6_000, 20_000, 30_501, 70_000)]
    answers = passt.predict(*padded(clips))
    for answer, clip in zip(answers, clips, strict=True):
        torch.testing.assert_close(answer, passt.predict(clip[None])[0], atol=1e-6, rtol=0)


def test_what_is_behind_a_long_clip_in_its_last_chunk_reads_as_silence(passt):
    mel = passt.front_end(noise(40_000)[None])  # 125 frames
    silence = passt.front_end(torch.zeros(1, 40_000)).mean()
    rest = F.pad(mel[:, :, 96:], (0, 192 - mel.shape[2]), value=float(silence))
    with torch.no_grad():
        pieces = [passt.forward_spectrogram(piece).sigmoid() for piece in (mel[:, :, :96], rest)]
        expected = (96 * pieces[0] + 29 * pieces[1]) / 125  # by own frames: a filled-up chunk is no whole one
        torch.testing.assert_close(passt.forward_spectrogram(mel).sigmoid(), expected)


def spy_on_positions(model):
    """What is added to every patch (R,f,t,D), forward by forward, less the frequency's part of the first row."""
    added = []
    placed = model._add_positions

    def spy(patches, columns=None):
        out = placed(patches, columns)
        added.append((out - patches - model.freq_new_pos_embed.permute(0, 2, 3, 1))[:, 0].detach())
        return out

    model._add_positions = spy
    return added


def test_short_clips_in_training_have_positions_from_a_random_one_on(passt):
    added, mel = spy_on_positions(passt), passt.front_end(noise(12_000)[None])  # 3 columns of 9
    grid = passt.time_new_pos_embed[0, :, 0].T.detach()
    starts = []
    passt.train().generator = torch.Generator()
    with torch.no_grad():
        for seed in range(60):
            passt.generator.manual_seed(seed)
            passt.forward_spectrogram(mel.expand(2, -1, -1))
            first = int((grid[:, None] - added[-1][0, :1]).abs().sum((1, 2)).argmin())
            torch.testing.assert_close(added[-1], grid[first : first + 3].expand(2, -1, -1), atol=1e-6, rtol=0)
            starts.append(first)
        assert set(starts) == set(range(7))  # all places where three columns fit
        passt.generator.manual_seed(59)
        passt.forward_spectrogram(mel)
        torch.testing.assert_close(added[-1][0], grid[starts[-1] : starts[-1] + 3], atol=1e-6, rtol=0)
        passt.eval().forward_spectrogram(mel)
        torch.testing.assert_close(added[-1][0], grid[:3], atol=1e-6, rtol=0)


def test_where_positions_start_depends_on_the_draw_and_the_clips_own_columns_alone(passt):
    added = spy_on_positions(passt)
    clips = [noise(n, n) for n in (12_000, 20_000, 31_000, 70_000)]  # 3, 5 and 9 columns; three chunks of 9
    passt.train().generator = torch.Generator()
    columns = (3, 5, 9)
    with torch.no_grad():
        for seed in range(5):
            passt.generator.manual_seed(seed)
            passt(*padded(clips))
            together = added[-1]
            for row, clip in enumerate(clips[:3]):
                passt.generator.manual_seed(seed)
                passt(clip[None])
                n = columns[row]
                torch.testing.assert_close(together[row, :n], added[-1][0, :n], atol=1e-6, rtol=0)
            grid = passt.time_new_pos_embed[0, :, 0].T
            torch.testing.assert_close(together[3:], grid.expand(3, -1, -1), atol=1e-6, rtol=0)


def test_a_random_position_leaves_the_columns_that_patch_out_draws_as_they_are(passt, monkeypatch):
    """The processes of a run share the draws of a step, whatever the length of their own clips."""
    passt.time_patch_out, kept = 2, []
    original = models.vit.draw_patch_out
    monkeypatch.setattr(models.vit, "draw_patch_out", lambda *args: kept.append(original(*args)) or kept[-1])
    passt.train().generator = torch.Generator()
    with torch.no_grad():
        for frames in (56, 56, 96):
            passt.generator.manual_seed(3)
            passt.forward_spectrogram(torch.zeros(1, 128, frames))
    expected = torch.Generator().manual_seed(3)
    torch.rand(1, generator=expected)
    state = expected.get_state()
    for found, n_columns in zip(kept, (5, 5, 9), strict=True):
        expected.set_state(state)
        columns = sorted(torch.randperm(n_columns, generator=expected)[: n_columns - 2].tolist())
        assert found[: n_columns - 2].tolist() == columns


def test_structured_patch_out_leaves_whole_rows_and_columns_out_in_training_alone(passt):
    passt.time_patch_out, passt.freq_patch_out = 4, 5
    mel = passt.front_end(noise(30_000)[None])
    seen = []
    passt.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    handle = passt.pos_drop.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        passt.forward_spectrogram(mel)
        passt.train().forward_spectrogram(mel)
    handle.remove()
    assert seen == [2 + 12 * 8, 2 + 7 * 4]


def test_positions_of_another_length_are_cropped_or_stretched_with_a_notice(passt, caplog):
    for frames, columns in ((56, 5), (136, 13)):
        other = create_model("passt_pico", num_classes=4, **SMALL | {"target_length": frames})
        fitted = other.adapt_weights(passt.state_dict())["time_new_pos_embed"]
        expected = passt.time_new_pos_embed[..., :columns]
        if columns > 9:
            expected = F.interpolate(passt.time_new_pos_embed, (1, 13), mode="bilinear", align_corners=False)
        torch.testing.assert_close(fitted, expected)
    assert "time_new_pos_embed is cropped from 9 to 5" in caplog.text
    assert "time_new_pos_embed is interpolated from 9 to 13" in caplog.text


@pytest.mark.parametrize("stride", [10, 12, 14, 16, 20])
def test_other_strides_have_other_grids(stride):
    model = create_model("passt_pico", depth=1, patch_stride=stride, num_classes=2)
    tokens = model.forward_features(torch.zeros(1, 128, 998))
    assert tokens.shape[1] == 2 + ((128 - 16) // stride + 1) * ((998 - 16) // stride + 1)


def test_it_learns_is_saved_and_fine_tuned_for_other_classes(passt, tmp_path, caplog):
    passt.train()
    passt(noise(20_000)[None]).square().sum().backward()
    without = [name for name, p in passt.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["head_dist.weight", "head_dist.bias"]  # computes nothing, and waits for no gradient
    assert not any(p.requires_grad for p in passt.head_dist.parameters())
    save_checkpoint(tmp_path / "passt.pt", passt)
    wave = noise(15_000)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "passt.pt")(wave), passt.eval()(wave))
        other = load_model(tmp_path / "passt.pt", num_classes=9)
        assert other(wave).shape == (1, 9)
    assert "the last layer is initialised anew" in caplog.text


def test_deit_gives_its_weights_and_its_positions_apart(tmp_path, caplog):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10)
    torch.save(deit.state_dict(), tmp_path / "deit.pt")
    passt = create_model("passt_s", num_classes=3, embed_dim=192, num_heads=3)
    start = [passt.head[1].weight.clone(), passt.head_dist.weight.clone()]
    load_weights(passt, tmp_path / "deit.pt", pre_training=True)
    given = deit.state_dict()
    grid = given["pos_embed"][:, 2:].transpose(1, 2).unflatten(2, (14, 14))
    grid = F.interpolate(grid, (12, 99), mode="bicubic", align_corners=False)
    torch.testing.assert_close(passt.time_new_pos_embed, grid.mean(2, keepdim=True))
    torch.testing.assert_close(passt.freq_new_pos_embed, grid.mean(3, keepdim=True))
    assert torch.equal(passt.new_pos_embed, given["pos_embed"][:, :2])
    torch.testing.assert_close(passt.patch_embed.proj.weight[:, 0], given["patch_embed.proj.weight"].sum(1))
    assert torch.equal(passt.head[1].weight, start[0])
    assert torch.equal(passt.head_dist.weight, start[1])
    assert "last layers (head.0" in caplog.text
