"""Token merging beside a slow reference, and in the networks that take it."""

import math

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from models import create_model, load_model, save_checkpoint
from models.layers import Attention
from models.token_merging import TokenGroups, merging_schedule, split_setting
from models.vit import SpectrogramTransformer

ATOL = 1e-5


def merged_slowly(
    x: list[Tensor], keys: Tensor, size: list[int], r: int, n_protected: int
) -> tuple[list[Tensor], list[int], list[int]]:
    """Merge the tokens of one clip, token by token.

    Args:
        x: N vectors.
        keys: (H,N,d).
        size: of each token.
        r: how many to merge away.
        n_protected: first tokens that are left alone.

    Returns:
        The tokens that are left, their sizes, and for each of the N tokens the number of the one it is part of.
    """
    n = len(x)
    metric = keys.mean(0)
    edges = []
    for i in range(0, n, 2):
        partners = [j for j in range(1, n, 2) if j >= n_protected]
        if i < n_protected or not partners:
            continue
        likeness = {j: float(metric[i] @ metric[j] / metric[i].norm() / metric[j].norm()) for j in partners}
        nearest = max(partners, key=lambda j, likeness=likeness: likeness[j])
        edges.append((likeness[nearest], i, nearest))
    edges.sort(reverse=True)
    joins = {i: j for _, i, j in edges[: min(r, (n - n_protected) // 2)]}
    evens = [i for i in range(0, n, 2) if i >= n_protected and i not in joins]
    left = [*range(n_protected), *evens, *(j for j in range(1, n, 2) if j >= n_protected)]
    members = {i: [i, *(a for a, b in joins.items() if b == i)] for i in left}
    sizes = [sum(size[m] for m in members[i]) for i in left]
    tokens = [sum(size[m] * x[m] for m in members[i]) / s for i, s in zip(left, sizes, strict=True)]
    place = [0] * n
    for number, i in enumerate(left):
        for m in members[i]:
            place[m] = number
    return tokens, sizes, place


@pytest.mark.parametrize("n_protected", [0, 1, 2])
@pytest.mark.parametrize("r", [1, 3, 8, 100])
@pytest.mark.parametrize("n", [3, 4, 11, 12, 25])
def test_three_blocks_merge_the_tokens_that_the_slow_reference_merges(n, r, n_protected):
    generator = torch.Generator().manual_seed(n + 100 * r + n_protected)
    x, groups = torch.randn(2, n, 5, generator=generator), TokenGroups(None, n_protected)
    expected = [(list(clip), [1] * n, list(range(n))) for clip in x]
    for _ in range(3):
        keys = torch.randn(2, 3, x.shape[1], 4, generator=generator)
        for clip, (tokens, sizes, place) in enumerate(expected):
            tokens, sizes, step = merged_slowly(tokens, keys[clip], sizes, r, n_protected)
            expected[clip] = tokens, sizes, [step[number] for number in place]
        x = groups.merge(x, keys, r)
        torch.testing.assert_close(x, torch.stack([torch.stack(tokens) for tokens, _, _ in expected]))
        if groups.size is not None and groups.place is not None:
            assert groups.size.tolist() == [sizes for _, sizes, _ in expected]
            assert groups.place.tolist() == [place for _, _, place in expected]


@pytest.mark.parametrize("n_protected", [0, 1, 2])
@pytest.mark.parametrize("r", [2, 5, 50])
def test_a_clip_among_longer_ones_merges_as_it_does_alone(n_protected, r):
    generator = torch.Generator().manual_seed(r)
    own = torch.zeros(4, 24, dtype=torch.bool)
    for clip, n_own in enumerate((24, 4, 11, 18)):  # anywhere behind the protected tokens, as padded columns of a grid
        others = n_protected + torch.randperm(24 - n_protected, generator=generator)[: n_own - n_protected]
        own[clip, torch.cat([torch.arange(n_protected), others])] = True
    x = torch.randn(4, 24, 6, generator=generator)
    together, alone = TokenGroups(own, n_protected), [TokenGroups(None, n_protected) for _ in x]
    clips = [x[clip][own[clip]][None] for clip in range(4)]
    counted = own
    for _ in range(3):
        keys = torch.randn(4, 2, x.shape[1], 4, generator=generator)
        for clip in range(4):
            clips[clip] = alone[clip].merge(clips[clip], keys[clip][:, counted[clip]][None], r)
        x = together.merge(x, keys, r)
        assert together.size is not None
        counted = together.size > 0
        for clip in range(4):
            torch.testing.assert_close(x[clip][counted[clip]], clips[clip][0])
    spread = together.spread(x)
    for clip in range(4):
        torch.testing.assert_close(spread[clip][own[clip]], alone[clip].spread(clips[clip])[0])


def test_attention_to_a_merged_token_is_attention_to_each_of_those_it_stands_for():
    torch.manual_seed(0)
    attention, x = Attention(8, 2), torch.randn(1, 4, 8)
    groups = TokenGroups()
    groups.size = torch.tensor([[1.0, 3.0, 2.0, 1.0]])
    found = attention(x, groups.bias)[0]
    each = attention(x[:, [0, 1, 1, 1, 2, 2, 3]])[0]
    torch.testing.assert_close(found, each[:, [0, 1, 4, 6]])


def test_a_mean_over_spread_tokens_is_the_mean_by_size():
    torch.manual_seed(0)
    x, groups = torch.randn(2, 20, 5), TokenGroups()
    for _ in range(2):
        x = groups.merge(x, torch.randn(2, 1, x.shape[1], 4), 5)
    assert groups.size is not None
    assert groups.size.sum(1).tolist() == [20.0, 20.0]
    by_size = (x * groups.size[..., None]).sum(1) / groups.size.sum(1)[:, None]
    torch.testing.assert_close(groups.spread(x).mean(1), by_size)


def test_gradients_reach_every_token_by_its_share():
    keys = torch.randn(1, 2, 9, 4, dtype=torch.float64)

    def merge(x: Tensor) -> Tensor:
        groups = TokenGroups(None, 1)
        return groups.merge(groups.merge(x, keys, 3), keys[:, :, :6], 2)

    assert torch.autograd.gradcheck(merge, (torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize(
    ("setting", "schedule"),
    [
        (None, (0,) * 12),
        (0, (0,) * 12),
        (7, (7,) * 12),
        ([8, 0], (8,) * 12),
        ([8, -1], (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        ([8, 1], (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], tuple(range(1, 13))),
    ],
)
def test_schedules(setting, schedule):
    assert merging_schedule(setting, 12) == schedule


@pytest.mark.parametrize(
    "setting", [-1, 1.5, "8", [8, 2], [8, -1, 0], [1] * 11, [True], {"r": 8}, math.nan, [8, math.inf]]
)
def test_other_schedules_are_refused_with_what_is_expected(setting):
    with pytest.raises(UserError, match=r"token_merging is .*expected .*whole number.*inflect.*12 whole numbers"):
        merging_schedule(setting, 12)


# small ones of every kind, with clips of 0.5 s and 2 s
NETWORKS = {
    "audiotransformer_pico": {},
    "ast_pico": {"target_length": 128, "depth": 4},
    "passt_pico": {"depth": 4, "target_length": 128},
}
every_network = pytest.mark.parametrize("name", [*NETWORKS])


def small(name: str, **arguments: object) -> SpectrogramTransformer:
    torch.manual_seed(3)
    model = create_model(name, num_classes=5, **{**NETWORKS[name], **arguments})
    for parameter in model.parameters():  # away from the start, where all sounds are answered alike
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, SpectrogramTransformer)
    return model.eval()


def sounds(model: SpectrogramTransformer, seconds: float = 2.0, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    n_samples = round(seconds * model.sample_rate)
    pitch = torch.rand(n, 1, generator=generator) * 0.3 * torch.linspace(0.5, 1.5, n_samples)
    return 0.3 * torch.sin(pitch * torch.arange(n_samples)) + 0.02 * torch.randn(n, n_samples, generator=generator)


@every_network
@torch.inference_mode()
def test_no_merging_is_bit_for_bit_the_network_without(name):
    plain, off = small(name), small(name, token_merging=0)
    x = sounds(plain, 1.2)
    mel = plain.front_end(x)
    by_hand = plain.patch_embed(plain._split_chunks(mel, None)[0])
    by_hand = plain._add_positions(by_hand).flatten(1, 2)
    prefix = plain._prefix_tokens()
    if prefix is not None:
        by_hand = torch.cat([prefix.expand(len(x), -1, -1), by_hand], 1)
    for block in plain.blocks:
        by_hand = block(by_hand)
    assert torch.equal(plain.forward_features(mel), plain.norm(by_hand))
    assert torch.equal(plain(x), off(x))
    on = small(name, token_merging=4)
    assert not torch.allclose(plain(x), on(x), atol=1e-4)
    on.merge_tokens(0)
    assert torch.equal(plain(x), on(x))


@every_network
@torch.inference_mode()
def test_where_every_token_is_the_same_merging_changes_nothing(name):
    model = small(name)
    x = torch.randn(2, 1, model.embed_dim).expand(-1, 21, -1)
    expected = model._run_blocks(x, None)[0]
    model.merge_tokens(6)
    torch.testing.assert_close(model._run_blocks(x, None)[0], expected, atol=ATOL, rtol=0)


@every_network
@torch.inference_mode()
def test_a_clip_is_tagged_and_embedded_alike_alone_and_among_others(name):
    model = small(name, token_merging=5)
    x, rate = sounds(model, 2.0, 4), model.sample_rate
    lengths = torch.tensor([2 * rate, rate // 2, round(1.31 * rate), round(1.7 * rate)])
    together = model.predict(x, lengths)
    clips, frames = model.embed(x, lengths)
    for clip, length in enumerate(lengths.tolist()):
        alone = x[clip : clip + 1, :length]
        torch.testing.assert_close(together[clip], model.predict(alone)[0], atol=ATOL, rtol=0)
        one, own = model.embed(alone)
        torch.testing.assert_close(clips[clip], one[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(frames[clip, : model.n_steps(length)], own[0], atol=1e-4, rtol=1e-4)
        assert not frames[clip, model.n_steps(length) :].any()


@every_network
@pytest.mark.parametrize("merging", [0, 5, 40, [6, -1], *({"r": r, "proportional": False} for r in (5, [6, -1]))])
@torch.inference_mode()
def test_chunks_of_long_clips_merge_alike_alone_among_others_and_in_graphs(name, merging):
    model = small(name, token_merging=merging, target_length=100)
    x, rate = sounds(model, 3.3, 5), model.sample_rate
    lengths = torch.tensor([1, round(0.2 * rate), round(0.93 * rate), round(2.01 * rate), round(3.3 * rate)])
    together = model.predict(x, lengths)
    for clip, length in enumerate(lengths.tolist()):
        alone = x[clip : clip + 1, :length]
        torch.testing.assert_close(together[clip], model.predict(alone)[0], atol=ATOL, rtol=0)
        traced = model.forward_export(model.front_end(alone))[0]
        torch.testing.assert_close(together[clip], traced, atol=ATOL, rtol=0)


def through_blocks_slowly(model: SpectrogramTransformer, x: Tensor, n_protected: int) -> Tensor:
    """The blocks of a network for the tokens (N,D) of one clip, attention written out, tokens merged one by one."""
    sizes, place = [1] * len(x), list(range(len(x)))
    for block, r in zip(model.blocks, model.merged_tokens, strict=True):
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(1, (3, attention.num_heads, -1))  # (N,3,H,d)
        query, key, value = qkv.permute(1, 2, 0, 3)  # each (H,N,d)
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
        if model.proportional_attention:
            scores = scores + torch.tensor(sizes).log()
        x = x + attention.proj((scores.softmax(2) @ value).transpose(0, 1).flatten(1))
        tokens, sizes, step = merged_slowly(list(x), key, sizes, r, n_protected)
        x, place = torch.stack(tokens), [step[number] for number in place]
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)[place]


@every_network
@pytest.mark.parametrize("proportional", [True, False])
@torch.inference_mode()
def test_the_slow_reference_gives_the_same_tokens_with_proportional_attention_and_without(name, proportional):
    model = small(name, token_merging={"r": 6, "proportional": proportional})
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(n, model.embed_dim, generator=generator) for n in (40, 23, 31)]
    expected = [through_blocks_slowly(model, clip, model.n_prefix) for clip in clips]
    for clip, tokens in zip(clips, expected, strict=True):
        found = model._run_blocks(clip[None], None)[0][0]
        torch.testing.assert_close(found, tokens, atol=1e-4, rtol=1e-4)
    own = torch.arange(40) < torch.tensor([[len(clip)] for clip in clips])
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=3.0)
    together = model._run_blocks(padded, own)[0]
    for row, tokens in enumerate(expected):
        torch.testing.assert_close(together[row][own[row]], tokens, atol=1e-4, rtol=1e-4)
    model.merge_tokens({"r": 6, "proportional": not proportional})
    other = model._run_blocks(clips[0][None], None)[0][0]
    assert (other - expected[0]).abs().max() > 0.01


@every_network
@torch.inference_mode()
def test_without_proportional_attention_no_bias_is_left_and_a_mask_only_where_clips_differ(name, monkeypatch):
    masks = []
    original = nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    model = small(name, token_merging={"r": 5, "proportional": False})
    x = sounds(model, 1.2)
    merged = model(x)
    assert masks == [None] * len(model.blocks)
    model(x, torch.tensor([x.shape[1], x.shape[1] // 2, x.shape[1]]))
    if not model.fixed_length:
        assert all(mask.dtype == torch.bool for mask in masks[len(model.blocks) :])
    model.merge_tokens(5)
    masks.clear()
    assert not torch.allclose(model(x), merged, atol=1e-4)
    assert masks[0] is None
    assert all(mask.is_floating_point() for mask in masks[1:])


def test_settings_with_and_without_proportional_attention():
    assert split_setting(None) == (None, True)
    assert split_setting([8, -1]) == ([8, -1], True)
    assert split_setting({"r": 8}) == (8, True)
    assert split_setting({"r": [8, -1], "proportional": False}) == ([8, -1], False)
    assert split_setting({"r": 8, "proportional": "false"}) == (8, False)  # as a command line has it
    with pytest.raises(UserError, match=r"did you mean 'proportional'.*expected r, or \{r: 8, proportional: false\}"):
        split_setting({"r": 8, "proportionl": False})
    with pytest.raises(UserError, match="expected r, or"):
        split_setting({"proportional": False})
    with pytest.raises(UserError, match=r"token_merging\.proportional is 3; expected true or false"):
        create_model("audiotransformer_pico", token_merging={"r": 8, "proportional": 3})
    with pytest.raises(UserError, match="token_merging is -1; expected"):
        create_model("audiotransformer_pico", token_merging={"r": -1})


def test_attention_that_is_not_proportional_is_kept_with_the_weights(tmp_path):
    setting = {"r": 6, "proportional": False}
    model = small("passt_pico")
    model.merge_tokens(setting)
    save_checkpoint(tmp_path / "a.pt", model)
    loaded = load_model(tmp_path / "a.pt")
    assert loaded.arguments["token_merging"] == setting
    x = sounds(model)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
        model.merge_tokens(6)
        assert not torch.allclose(loaded(x), model(x), atol=1e-4)
        assert torch.equal(load_model(tmp_path / "a.pt", token_merging=6)(x), model(x))


@every_network
def test_training_merges_too_unless_it_is_switched_off(name):
    x = sounds(small(name))
    plain, both, judged = small(name), small(name, token_merging=6), small(name, token_merging=6)
    judged.merges_in_training = False
    answers = [model.train()(x) for model in (plain, both, judged)]
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)
    torch.testing.assert_close(answers[2], answers[0])
    answers[1].square().sum().backward()
    left = [key for key, p in both.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not left
    torch.testing.assert_close(judged.eval()(x), both.eval()(x))


def test_the_setting_is_kept_with_the_weights_and_can_be_changed_when_they_are_loaded(tmp_path):
    model = small("ast_pico", token_merging=[6, -1])
    save_checkpoint(tmp_path / "a.pt", model)
    loaded = load_model(tmp_path / "a.pt")
    x = sounds(model)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
        other = load_model(tmp_path / "a.pt", token_merging=2)
        model.merge_tokens(2)
        assert torch.equal(other(x), model(x))
    save_checkpoint(tmp_path / "b.pt", model)
    assert load_model(tmp_path / "b.pt").arguments["token_merging"] == 2
    with pytest.raises(UserError, match="token_merging is -2"):
        load_model(tmp_path / "a.pt", token_merging=-2)


@every_network
def test_mixed_precision_merges_much_the_same(name):
    model = small(name, token_merging=3)
    x = sounds(model, n=8)
    with torch.inference_mode():
        exact = model.predict(x)
        with torch.autocast("cpu", torch.bfloat16):
            halved = model.predict(x)
        model.merge_tokens(0)
        with torch.autocast("cpu", torch.bfloat16):
            unmerged = model.predict(x)
        error = (unmerged - model.predict(x)).abs().max()  # of the precision alone
    assert (halved - exact).abs().max() < 5 * error + 0.02


@pytest.mark.parametrize("name", ["audiotransformer_pico", "ast_pico"])
def test_torch_compile_follows_it_in_one_graph(name):
    model = small(name, token_merging=5)
    mel = model.front_end(sounds(model, 1.2))
    with torch.no_grad():
        compiled = torch.compile(model.forward_spectrogram, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(mel), model.forward_spectrogram(mel))
