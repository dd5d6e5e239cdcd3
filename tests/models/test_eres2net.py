import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from models import create_model
from models.eres2net import ERes2NetMaps, Fusion, Res2Block, pool_statistics
from tests.models.sounds import noise


def with_lively_norms(network):
    """A network in evaluation whose batch norms do something that a test would see."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.1, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    return network.eval()


def test_names_and_shapes_are_the_published_ones(shared):
    published = json.loads((shared / "fixtures" / "state_dicts" / "ssondo_eres2net.json").read_text())
    model = create_model("eres2net", num_classes=3840)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == published["n_parameters"]
    assert model.embed_dim == 1024


def test_the_wide_one_embeds_in_as_many_numbers_as_the_published_table_says():
    assert create_model("eres2net_base", num_classes=0).embed_dim == 10240


def test_the_weights_of_a_fusion_sum_to_two():
    torch.manual_seed(0)
    fusion = with_lively_norms(Fusion(8))
    x, y = torch.randn(2, 2, 8, 3, 5).unbind(0)
    first, norm, _, second, other_norm = fusion.local_att

    def normed(norm, value):
        return (value - norm.running_mean) / (1 + norm.eps) ** 0.5 * norm.weight + norm.bias

    output = fusion(x, y)
    for b, f, t in ((0, 0, 0), (1, 2, 4), (1, 1, 3)):
        both = torch.cat([x[b, :, f, t], y[b, :, f, t]])
        hidden = normed(norm, first.weight[:, :, 0, 0] @ both + first.bias)
        hidden = hidden * hidden.sigmoid()
        share = 1 + normed(other_norm, second.weight[:, :, 0, 0] @ hidden + second.bias).tanh()
        reference = share * x[b, :, f, t] + (2 - share) * y[b, :, f, t]
        torch.testing.assert_close(output[b, :, f, t], reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fusion(x, x), 2 * x)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize(("n_in", "stride"), [(32, 1), (8, 2)])
def test_the_second_half_of_a_block_gets_the_first(n_in, stride, fuses):
    torch.manual_seed(0)
    block = with_lively_norms(Res2Block(n_in, 16, stride, fuses))
    x = torch.randn(2, n_in, 6, 7)
    whole = block.bn1(F.conv2d(x, block.conv1.weight, stride=stride)).clamp(0, 20)
    first = block.bns[0](F.conv2d(whole[:, :8], block.convs[0].weight, padding=1)).clamp(0, 20)
    heard = block.fuse_models[0](first, whole[:, 8:]) if fuses else first + whole[:, 8:]
    second = block.bns[1](F.conv2d(heard, block.convs[1].weight, padding=1)).clamp(0, 20)
    both = block.bn3(F.conv2d(torch.cat([first, second], 1), block.conv3.weight))
    beside = x if n_in == 32 else block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), (both + beside).clamp(0, 20), atol=1e-5, rtol=1e-5)


def test_every_stage_is_fused_with_those_below():
    torch.manual_seed(0)
    maps = with_lively_norms(ERes2NetMaps(4, [1, 1, 1, 1, 1]))
    mel = torch.randn(1, 16, 40)
    one = maps.layer1(maps.bn1(maps.conv1(mel[:, None])).relu())
    two = maps.layer2(one)
    three = maps.layer3(two)
    four = maps.layer4(three)
    five = maps.layer5(four)
    fused = maps.fuse_mode12(two, maps.layer1_downsample(one))
    fused = maps.fuse_mode123(three, maps.layer2_downsample(fused))
    fused = maps.fuse_mode1234(four, maps.layer3_downsample(fused))
    fused = maps.fuse_mode12345(five, maps.layer4_downsample(fused))
    torch.testing.assert_close(maps(mel), fused)
    assert fused.shape == (1, maps.channels, 1, 3) == (1, 16, 1, -(-40 // maps.stride))


def test_pooling_is_the_mean_and_the_deviation_of_every_channel_and_band():
    maps = torch.randn(2, 3, 4, 5) + 3
    mean, deviation = pool_statistics(maps)
    for b in range(2):
        for i, (d, f) in enumerate((d, f) for d in range(3) for f in range(4)):
            row = maps[b, d, f].tolist()
            middle = sum(row) / 5
            assert mean[b, i].item() == pytest.approx(middle, abs=1e-5)
            spread = sum((value - middle) ** 2 for value in row) / 4
            assert deviation[b, i].item() == pytest.approx((spread + 1e-8) ** 0.5, abs=1e-5)
    torch.testing.assert_close(pool_statistics(maps[..., :1])[1], torch.full((2, 12), 1e-4))


@torch.inference_mode()
def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone():
    torch.manual_seed(0)
    model = create_model("eres2net", num_classes=4, m_channels=8, num_blocks=[1, 1, 1, 1], n_mels=40)
    with_lively_norms(model)
    clips = [noise(n, seed=n) for n in (16000, 1, 9000)]
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.7)
    embedded, frames = model.embed(batch, lengths)
    for i, clip in enumerate(clips):
        alone, alone_frames = model.embed(clip[None])
        assert alone_frames.shape[1] == model.n_steps(len(clip)) >= 2
        torch.testing.assert_close(embedded[i], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(frames[i, : alone_frames.shape[1]].mean(0), alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.classification_head(embedded), model(batch, lengths), atol=1e-5, rtol=1e-4)


def test_settings_that_cannot_be_are_named():
    with pytest.raises(UserError, match=r"'eres2net' cannot be built.*four or five numbers"):
        create_model("eres2net", num_blocks=[1, 1])
