import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import create_model
from models.dymn import ContextGenerator, DynamicConv, DynamicReLU
from tests.models.sounds import noise


@pytest.mark.parametrize("temperature", [1.0, 30.0])
@pytest.mark.parametrize(("kernel", "stride", "groups", "n_out"), [(1, 1, 1, 6), (3, 1, 8, 8), (5, 2, 8, 8)])
def test_each_clip_is_filtered_with_its_own_mixture_of_kernels(kernel, stride, groups, n_out, temperature):
    torch.manual_seed(1)
    conv = DynamicConv(8, n_out, 5, kernel, stride, groups, temperature)
    maps, context = torch.randn(3, 8, 9, 11), 9 * torch.randn(3, 5)
    output = conv(maps, context)
    own = conv.weight.view(4, n_out, 8 // groups, kernel, kernel)
    for i in range(3):
        logits = conv.residuals[0](context[i]) / temperature
        share = [logits[k].exp() / logits.exp().sum() for k in range(4)]
        mixed = sum(share[k] * own[k] for k in range(4))
        reference = F.conv2d(maps[i : i + 1], mixed, stride=stride, padding=kernel // 2, groups=groups)
        torch.testing.assert_close(output[i : i + 1], reference, atol=1e-5, rtol=1e-5)


def test_a_graph_filters_as_the_network_does(monkeypatch):
    torch.manual_seed(1)
    conv = DynamicConv(8, 8, 5, 5, 2, 8)
    maps, context = torch.randn(3, 8, 9, 11), torch.randn(3, 5)
    output = conv(maps, context)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(conv(maps, context), output, atol=1e-5, rtol=1e-5)


def test_kernels_start_each_for_itself_and_scaled_by_what_they_give():
    kernels = DynamicConv(64, 200, 8).weight.view(4, 200, 64)
    for kernel in kernels:
        assert kernel.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert not torch.equal(kernels[0], kernels[1])


def test_dynamic_relu_is_the_larger_of_two_lines_of_the_clip():
    torch.manual_seed(1)
    act = DynamicReLU(3, 5)
    maps, context = torch.randn(2, 3, 4, 6), torch.randn(2, 5)
    output = act(maps, context)
    for b in range(2):
        theta = (2 * act.coef_net[0](context[b]).sigmoid() - 1).tolist()
        for d in range(3):
            a0, a1, b0, b1 = theta[4 * d : 4 * d + 4]
            x = maps[b, d]
            reference = torch.maximum((1 + a0) * x + b0 / 2, a1 * x + b1 / 2)
            torch.testing.assert_close(output[b, d], reference, atol=1e-6, rtol=1e-6)
    nn.init.zeros_(act.coef_net[0].weight)
    nn.init.zeros_(act.coef_net[0].bias)
    torch.testing.assert_close(act(maps, context), maps.relu())


@pytest.mark.parametrize("stride", [1, 2])
def test_the_context_is_what_bands_and_columns_say(stride):
    torch.manual_seed(1)
    generator = ContextGenerator(4, 6, 5, stride).eval()
    generator.joint_norm.running_mean.normal_()
    maps = torch.randn(2, 4, 7, 10)
    vector, bands, columns = generator(maps)
    joint, norm = generator.joint_conv.weight[:, :, 0, 0], generator.joint_norm
    for b in range(2):
        lines = [maps[b, :, f].mean(1) for f in range(7)] + [maps[b, :, :, t].mean(1) for t in range(10)]
        lines = [F.hardswish((joint @ line - norm.running_mean) / (1 + 1e-3) ** 0.5) for line in lines]
        torch.testing.assert_close(vector[b], sum(lines) / 17, atol=1e-5, rtol=1e-5)
        for conv, own, output in ((generator.conv_f, lines[:7], bands[b]), (generator.conv_t, lines[7:], columns[b])):
            if stride == 2:
                around = [torch.zeros(6), *own, torch.zeros(6)]
                own = [sum(around[i : i + 3]) / 3 for i in range(0, len(own), 2)]
            reference = torch.stack([conv.weight[:, :, 0, 0] @ line + conv.bias for line in own], 1)
            torch.testing.assert_close(output.flatten(1), reference, atol=1e-5, rtol=1e-5)


def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone():
    torch.manual_seed(0)
    model = create_model("dymn04_as", num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():  # statistics with which embeddings are of the size that they have in use
        model.train()(noise(4 * 16000).reshape(4, -1) * torch.tensor([0.01, 0.1, 1.0, 4.0])[:, None])
    model.eval()
    clips = [noise(n, seed=n, level=level) for n, level in ((16000, 0.1), (9000, 0.001), (12000, 0.4))]
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.7)
    with torch.inference_mode():
        embedded, _ = model.embed(batch, lengths)
        mel, n_frames = model.front_end(batch, lengths), model.front_end.n_frames(lengths)
        output, at_once = model.tag_and_embed(mel, n_frames)
        assert torch.pdist(embedded).max() > embedded[0].norm() > 0.1  # clips differ by more than rounding
        for i, clip in enumerate(clips):
            torch.testing.assert_close(embedded[i], model.embed(clip[None])[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(at_once, embedded, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output, model(batch, lengths), atol=1e-5, rtol=1e-4)
