"""What vision transformers compute inside: chosen tokens, layers, and what is made of them, beside slow references."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from models import create_model
from models.base import Encoded
from models.headed import Head, HeadedTagger
from models.vit import SpectrogramTransformer

CHUNK = 100
KINDS = {
    "mean": ("audiotransformer_pico", {}),
    "logit": ("audiotransformer_pico", {"pooling": "logit"}),
    "dm": ("audiotransformer_pico", {"pooling": "dm"}),
    "token": ("audiotransformer_pico", {"pooling": "token"}),
    "dasheng": ("dasheng_pico", {}),
    "ast": ("ast_pico", {}),
    "passt": ("passt_pico", {}),
}
every_network = pytest.mark.parametrize("kind", KINDS)


def network(kind: str, **arguments: object) -> SpectrogramTransformer:
    """A small network for chunks of 100 frames, whose outputs differ much from input to input."""
    torch.manual_seed(0)
    name, more = KINDS[kind]
    settings = {"depth": 3, "target_length": CHUNK} | more | arguments
    model = create_model(name, num_classes=4, **settings).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, SpectrogramTransformer)
    return model


def spectrograms(model: SpectrogramTransformer, n_clips: int, n_frames: int) -> Tensor:
    """Noise (B,F,T), on the scale of a normalised spectrogram."""
    generator = torch.Generator().manual_seed(n_frames)
    return torch.randn(n_clips, model.front_end.n_mels, n_frames, generator=generator)


def keep_a_third(n_rows: int, n_columns: int, valid: Tensor | None, seed: int = 0) -> Tensor:
    """Other tokens of every row, padding among them."""
    generator, n_tokens = torch.Generator().manual_seed(seed), n_rows * n_columns
    n = 5 if valid is None else len(valid)
    chosen = [torch.randperm(n_tokens, generator=generator)[: n_tokens // 3].sort().values for _ in range(n)]
    return torch.stack(chosen)


def encode_slowly(model: SpectrogramTransformer, mel: Tensor, places: Tensor) -> list[Tensor]:
    """Chosen tokens of one row (1,F,T) after each block (1,P+N',D), and at last after the norm."""
    tokens = model._add_positions(model.patch_embed(mel), None).flatten(1, 2)[0]
    x = torch.stack([tokens[place] for place in places.tolist()])[None]
    prefix = model._prefix_tokens()
    x = x if prefix is None else torch.cat([prefix, x], 1)
    outputs = []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return [*outputs, model.norm(x)]


@every_network
@torch.no_grad()
def test_chosen_tokens_are_those_of_the_network_run_on_them_alone(kind):
    model = network(kind)
    mel = spectrograms(model, 3, CHUNK)
    n_frames = torch.tensor([CHUNK, 50, 20])
    encoded = model.encode(mel, n_frames, keep=lambda f, t, valid: keep_a_third(f, t, valid)[:3], layers=[0, -1])
    rows, columns, _ = model._split_chunks(mel, n_frames)
    n_columns = encoded.grid[1]
    assert encoded.tokens.shape[:2] == encoded.kept.shape == (3, encoded.grid[0] * n_columns // 3)
    assert (encoded.valid is None) == (columns is None) == (kind == "ast")
    for row in range(3):
        places = encoded.kept[row]
        valid = torch.ones_like(places, dtype=torch.bool) if columns is None else places % n_columns < columns[row]
        assert encoded.valid is None or torch.equal(encoded.valid[row], valid)
        first, _, last, normalised = encode_slowly(model, rows[row : row + 1], places[valid])
        prefix, tokens = normalised[:, : model.n_prefix], normalised[0, model.n_prefix :]
        torch.testing.assert_close(encoded.tokens[row][valid], tokens, atol=1e-5, rtol=1e-4)
        if model.n_prefix:
            torch.testing.assert_close(encoded.prefix[row : row + 1], prefix, atol=1e-5, rtol=1e-4)
        in_layers = torch.cat([torch.ones(model.n_prefix, dtype=torch.bool), valid])
        torch.testing.assert_close(encoded.layers[0][row][in_layers], first[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.layers[-1][row][in_layers], last[0], atol=1e-5, rtol=1e-4)

        alone = Encoded(1, normalised[:, model.n_prefix :], kept=places[valid][None], grid=encoded.grid)
        alone.prefix = prefix if model.n_prefix else None
        if kind == "ast":
            alone.n_steps = encoded.n_steps[row : row + 1]
        torch.testing.assert_close(model.classify(encoded)[row], model.classify(alone)[0], atol=1e-5, rtol=1e-4)
        pooled = prefix[0].mean(0) if kind in ("ast", "passt") else tokens.mean(0)
        torch.testing.assert_close(model.pool(encoded)[row], pooled, atol=1e-5, rtol=1e-4)


@every_network
@torch.no_grad()
def test_chosen_tokens_of_chunks_are_those_of_each_chunk_and_joined_as_chunks_are(kind):
    model = network(kind)
    mel, n_frames = spectrograms(model, 2, 250), torch.tensor([250, 60])
    seen = []

    def keep(n_rows: int, n_columns: int, valid: Tensor | None) -> Tensor:
        seen.append((n_rows, n_columns, valid))
        return keep_a_third(n_rows, n_columns, valid)[:4]

    encoded = model.encode(mel, n_frames, keep=keep)
    rows, columns, _ = model._split_chunks(mel, n_frames)
    assert encoded.clip_of_row.tolist() == [0, 0, 0, 1]
    ((n_rows, n_columns, valid),) = seen
    assert (n_rows, n_columns) == encoded.grid
    assert valid is None if columns is None else valid.sum(1).tolist() == columns.tolist()
    totals, counts = torch.zeros(2, model.embed_dim), torch.zeros(2, 1)
    for row, clip in enumerate(encoded.clip_of_row.tolist()):
        places = encoded.kept[row]
        used = torch.ones_like(places, dtype=torch.bool) if columns is None else places % n_columns < columns[row]
        tokens = encode_slowly(model, rows[row : row + 1], places[used])[-1][0, model.n_prefix :]
        torch.testing.assert_close(encoded.tokens[row][used], tokens, atol=1e-5, rtol=1e-4)
        own = places[used] % n_columns < encoded.n_steps[row]  # what fills a chunk up is not the clip's own
        totals[clip] += tokens[own].sum(0)
        counts[clip] += own.sum()
    if model.pool_rows(encoded) is None:
        torch.testing.assert_close(model.pool(encoded), totals / counts, atol=1e-5, rtol=1e-4)
    assert model.classify(encoded).shape == (2, 4)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dm"}))  # which reads each chosen token as a column
@torch.no_grad()
def test_choosing_every_token_changes_nothing(kind):
    model = network(kind)
    for n_frames, lengths in ((CHUNK, None), (CHUNK, torch.tensor([CHUNK, 40])), (230, torch.tensor([230, 40]))):
        mel = spectrograms(model, 2, n_frames)
        rows = len(model._split_chunks(mel, lengths)[0])
        chosen = model.encode(mel, lengths, keep=lambda f, t, _, rows=rows: torch.arange(f * t).expand(rows, -1))
        whole = model.encode(mel, lengths)
        torch.testing.assert_close(model.classify(chosen), model.classify(whole), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.pool(chosen), model.pool(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mean", "token", "ast", "passt"])
@torch.no_grad()
def test_chosen_tokens_are_merged_as_if_there_were_no_others(kind):
    model = network(kind, token_merging=3)
    mel, n_frames = spectrograms(model, 3, CHUNK), torch.tensor([CHUNK, 70, 45])
    encoded = model.encode(mel, n_frames, keep=lambda f, t, valid: keep_a_third(f, t, valid)[:3], layers=[1])
    rows, columns, _ = model._split_chunks(mel, n_frames)
    placed = model._add_positions(model.patch_embed(rows)).flatten(1, 2)
    for row in range(3):
        places = encoded.kept[row]
        valid = torch.ones_like(places, dtype=torch.bool) if columns is None else encoded.valid[row]
        x = placed[row, places[valid]][None]
        x = torch.cat([model._prefix_tokens(), x], 1) if model.n_prefix else x
        alone, layers = model._run_blocks(x, None, [1])
        torch.testing.assert_close(encoded.tokens[row][valid], alone[0, model.n_prefix :], atol=1e-5, rtol=1e-4)
        inside = torch.cat([torch.ones(model.n_prefix, dtype=torch.bool), valid])
        torch.testing.assert_close(encoded.layers[1][row][inside], layers[1][0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_cost_falls_with_the_share_of_tokens_that_are_chosen():
    model = network("mean", target_length=1008)
    mel = spectrograms(model, 1, 1008)

    def flops(share: float) -> int:
        with FlopCounterMode(display=False) as counter:
            model.encode(mel, keep=lambda f, t, _: torch.arange(round(f * t * share))[None])
        return counter.get_total_flops()

    patches = flops(0.004)  # of one token: nearly all is the projection of patches
    assert flops(0.25) - patches < 0.25 * (flops(1.0) - patches)


def test_gradients_reach_what_was_chosen_and_nothing_else():
    model = network("mean").train()
    encoded = model.encode(spectrograms(model, 2, CHUNK), keep=lambda f, t, _: torch.tensor([[0, 2], [2, t]]))
    model.pool(encoded).square().sum().backward()
    reached = model.time_pos_embed.grad[0].abs().sum((0, 1)) > 0
    assert reached.tolist() == [True, False, True, False, False, False]
    assert (model.freq_pos_embed.grad[0].abs().sum((0, 2)) > 0).tolist() == [True, True, False, False]
    assert all(block.attn.qkv.weight.grad.abs().max() > 0 for block in model.blocks)


def patch_out_by_index(model: SpectrogramTransformer, mel: Tensor, n_frames: Tensor | None, seed: int) -> Tensor:
    """The grid (R,f',t',D) after the final norm, rows and columns left out one axis after the other."""
    model.generator = torch.Generator().manual_seed(seed)
    rows, columns, _ = model._split_chunks(mel, n_frames)
    x = model._add_positions(model.patch_embed(rows), columns)
    valid = None if columns is None else torch.arange(x.shape[2]) < columns[:, None]
    kept = torch.randperm(x.shape[2], generator=model.generator)[: x.shape[2] - 2].sort().values
    if valid is not None:
        kept[0] = 0
        valid = valid[:, kept]
    x = x[:, :, kept]
    if model.freq_patch_out:
        x = x[:, torch.randperm(x.shape[1], generator=model.generator)[: x.shape[1] - 1].sort().values]
    grid = x.shape[1:3]
    x = x.flatten(1, 2)
    mask = None
    if model.n_prefix:
        x = torch.cat([model._prefix_tokens().expand(len(x), -1, -1), x], 1)
    if valid is not None:
        mask = valid[:, None].expand(-1, grid[0], -1).flatten(1)
        mask = torch.cat([torch.ones(len(x), model.n_prefix, dtype=torch.bool), mask], 1)[:, None, None]
    for block in model.blocks:
        x = block(x, mask)
    return model.norm(x)[:, model.n_prefix :].unflatten(1, grid)


@every_network
def test_patch_out_draws_and_computes_what_indexing_the_grid_does(kind):
    one_row = kind == "dasheng"  # of which none can be dropped
    model = network(kind, time_patch_out=2, freq_patch_out=0 if one_row else 1, init_values=0.5).train()
    for n_total, n_frames in ((CHUNK, None), (CHUNK, torch.tensor([CHUNK, 60])), (180, torch.tensor([180, 60]))):
        mel = spectrograms(model, 2, n_total)
        expected = patch_out_by_index(model, mel, n_frames, seed=n_total)
        model.generator.manual_seed(n_total)
        encoded = model.encode(mel, n_frames)
        assert torch.equal(encoded.tokens, expected)
        assert encoded.grid == tuple(expected.shape[1:3])
        assert encoded.kept is None


@pytest.mark.parametrize("kind", ["mean", "ast", "passt"])
def test_under_patch_out_the_time_steps_are_the_columns_of_the_clip_that_are_left(kind):
    model = network(kind, time_patch_out=3).train()
    for n_total, n_frames in ((CHUNK, torch.tensor([CHUNK, 40])), (180, torch.tensor([180, 40]))):
        mel = spectrograms(model, 2, n_total)
        model.generator = torch.Generator().manual_seed(5)
        encoded = model.encode(mel, n_frames)
        columns = encoded.tokens.mean(1)
        clips = [0, 1] if encoded.clip_of_row is None else encoded.clip_of_row.tolist()
        frames = model.frames(encoded)
        for clip in range(2):
            own = [columns[row, : encoded.n_steps[row]] for row in range(len(clips)) if clips[row] == clip]
            steps = torch.cat(own)
            assert torch.equal(frames[clip, : len(steps)], steps)
            assert not frames[clip, len(steps) :].any()
        model.generator.manual_seed(5)
        all_columns = model.eval().encode(mel, n_frames).n_steps
        model.train()
        assert (encoded.n_steps <= all_columns).all()
        assert encoded.n_steps.sum() < all_columns.sum()


@every_network
@torch.no_grad()
def test_layers_are_what_the_blocks_gave(kind):
    model = network(kind)
    given: list[Tensor] = []
    for block in model.blocks:
        original = block.feed_forward
        block.feed_forward = lambda x, original=original: given.append(original(x)) or given[-1]
    mel, n_frames = spectrograms(model, 2, CHUNK), torch.tensor([CHUNK, 40])
    encoded = model.encode(mel, n_frames, layers=[2, 0, -1, -3])
    assert list(encoded.layers) == [0, -3, 2, -1]
    for layer, output in encoded.layers.items():
        assert torch.equal(output, given[layer])
    assert len(given) == 3
    assert not model.encode(mel, n_frames).layers


@every_network
@torch.no_grad()
def test_pooled_layers_are_means_of_what_each_block_gave_for_the_clip_alone(kind):
    model = network(kind)
    mel, n_frames = spectrograms(model, 2, CHUNK), torch.tensor([CHUNK, 40])
    encoded = model.encode(mel, n_frames, layers=[1, 0, -2, -1, 2])
    pooled = model.pool_layers(encoded)
    assert list(pooled) == list(encoded.layers)
    assert torch.equal(pooled[-1], model.pool(encoded))
    assert torch.equal(pooled[2], pooled[-1])
    assert torch.equal(pooled[-2], pooled[1])
    given: list[Tensor] = []
    for block in model.blocks:
        original = block.feed_forward
        block.feed_forward = lambda x, original=original: given.append(original(x)) or given[-1]
    for clip in range(2):
        given.clear()
        model.encode(mel[clip : clip + 1, :, : n_frames[clip]])
        for layer in (0, 1):
            tokens = given[layer][0].double()
            own = tokens[: model.n_prefix] if kind in ("ast", "passt") else tokens[model.n_prefix :]
            torch.testing.assert_close(pooled[layer][clip].double(), own.mean(0), atol=1e-5, rtol=1e-4)


@every_network
@torch.no_grad()
def test_pooled_layers_of_long_clips_are_embeddings_of_the_network_cut_there(kind):
    model = network(kind)
    mel, n_frames = spectrograms(model, 2, 230), torch.tensor([230, 130])
    for lengths, keep in ((None, None), (n_frames, None), (n_frames, keep_a_third)):
        if keep and kind in ("ast", "passt"):
            continue
        pooled = model.pool_layers(model.encode(mel, lengths, keep=keep, layers=range(3)))
        if keep is None:
            together = model.embed_layers(mel, lengths, layers=range(3))
            assert all(torch.equal(pooled[layer], together[layer]) for layer in range(3))
        blocks, merged, norm = model.blocks, model.merged_tokens, model.norm
        for layer in (0, 1):
            model.blocks, model.merged_tokens = blocks[: layer + 1], merged[: layer + 1]
            model.norm = nn.Identity()
            torch.testing.assert_close(pooled[layer], model.pool(model.encode(mel, lengths, keep=keep)))
        model.blocks, model.merged_tokens, model.norm = blocks, merged, norm


@pytest.mark.parametrize("kind", ["mean", "passt"])
@torch.no_grad()
def test_layers_under_merging_have_a_place_for_every_token(kind):
    model = network(kind, token_merging=4)
    mel = spectrograms(model, 2, CHUNK)
    layers = model.encode(mel, layers=range(3)).layers
    norm = model.norm
    for layer in (2, 1, 0):
        model.blocks, model.merged_tokens, model.norm = model.blocks[: layer + 1], (4,) * (layer + 1), nn.Identity()
        cut = model.encode(mel)
        found = layers[layer]
        assert torch.equal(found[:, model.n_prefix :], cut.tokens.flatten(1, 2))
        assert len(found[0].unique(dim=0)) == found.shape[1] - 4 * (layer + 1)
    model.norm = norm


def test_what_cannot_be_encoded_is_refused_with_what_there_is():
    model = network("mean")
    mel = spectrograms(model, 2, CHUNK)
    with pytest.raises(UserError, match="has no layer 3: it has 3, 0 to 2; -1 is the last"):
        model.encode(mel, layers=[0, 3])
    with pytest.raises(UserError, match="no layer -4"):
        model.encode(mel, layers=[-4])
    with pytest.raises(UserError, match="no time steps"):
        model.frames(model.encode(mel, keep=lambda f, t, _: torch.zeros(2, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"places of shape \(1, 1\); expected \(R,N'\) for 2 rows"):
        model.encode(mel, keep=lambda f, t, _: torch.zeros(1, 1, dtype=torch.long))


@every_network
@torch.no_grad()
def test_tags_and_embeddings_of_one_pass_are_those_of_each_alone(kind):
    model = network(kind, token_merging=2)
    for n_total, n_frames in ((CHUNK, None), (CHUNK, torch.tensor([CHUNK, 40])), (210, torch.tensor([210, 40]))):
        mel = spectrograms(model, 2, n_total)
        tags, clips = model.tag_and_embed(mel, n_frames)
        assert torch.equal(tags, model.forward_spectrogram(mel, n_frames))
        assert torch.equal(clips, model.embed_spectrogram(mel, n_frames)[0])
        assert torch.equal(clips, model.embed_clips(mel, n_frames))


@every_network
@torch.no_grad()
def test_tagging_and_embedding_clips_is_one_graph_and_computes_no_time_steps(kind, monkeypatch):
    model = network(kind)
    monkeypatch.setattr(model, "frames", lambda encoded: pytest.fail("frames were computed"))
    torch._dynamo.reset()

    def both(mel: Tensor, n_frames: Tensor | None) -> tuple[Tensor, Tensor]:
        encoded = model.encode(mel, n_frames)
        return model.classify(encoded), model.pool(encoded)

    compiled = torch.compile(both, fullgraph=True, backend="eager")  # refuses what waits for a value
    for n_frames in (None, torch.tensor([CHUNK, 40])):
        mel = spectrograms(model, 2, CHUNK)
        for found, expected in zip(compiled(mel, n_frames), model.tag_and_embed(mel, n_frames), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_head_passes_chosen_tokens_and_layers_through():
    model = network("mean")
    headed = HeadedTagger(model, Head(model.embed_dim, 3)).eval()
    mel = spectrograms(model, 2, CHUNK)
    found = headed.encode(mel, keep=lambda f, t, _: keep_a_third(f, t, None)[:2], layers=[1])
    expected = model.encode(mel, keep=lambda f, t, _: keep_a_third(f, t, None)[:2], layers=[1])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.layers[1], expected.layers[1])
    assert headed.n_layers == model.n_layers == 3
    assert torch.equal(headed.pool_layers(found)[1], model.pool_layers(expected)[1])
    assert torch.equal(headed.classify(found), headed.head(model.pool(expected)))
    tags, clips = headed.tag_and_embed(mel)
    assert torch.equal(tags, headed.forward_spectrogram(mel))
    assert torch.equal(clips, headed.embed_spectrogram(mel)[0])


def test_one_call_of_the_front_end_gives_spectrograms_and_the_frames_of_each_clip():
    front_end = network("passt").front_end
    waveform, lengths = torch.randn(2, 32000) * 0.1, torch.tensor([32000, 9000])
    mel, n_frames = front_end.spectrogram(waveform, lengths)
    assert torch.equal(mel, front_end(waveform, lengths))
    assert n_frames.tolist() == [front_end.n_frames(32000), front_end.n_frames(9000)]
    assert front_end.spectrogram(waveform)[1] is None
