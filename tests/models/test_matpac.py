"""MATPAC, MATPAC++ and M2D: the published network, its files, embeddings of any clip in any batch."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
import torchaudio
from torch import nn

from common.errors import UserError
from models import create_model, get_model_entry, load_model, load_weights, save_checkpoint
from models.matpac import compute_positions
from models.matpac_checkpoints import list_sorted_labels
from models.matpac_mel import MatpacMel
from tests.models.sounds import noise, padded
from tests.models.test_encode import encode_slowly

LENGTHS = ("2s", "5s", "6.08s", "10s", "13s")
SMALL = {"target_length": 96, "depth": 2}  # 5 x 6 patches
HOP, WINDOW = 160, 400


def make_by_recipe(name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the reference file, as its description says."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.05 * values


@pytest.fixture(scope="module")
def reference(shared):
    """The published network with the weights of the recipe, and what published code gives for five clips."""
    if not (shared / "fixtures/matpac_recipe_io.npz").is_file():
        pytest.skip("needs the reference outputs of MATPAC, matpac_recipe_io.npz")
    recipe = json.loads((shared / "fixtures/state_dicts/matpac.json").read_text())["recipe"]
    model = create_model("matpac", num_classes=0)
    state = {name.removeprefix("student_encoder."): make_by_recipe(name, shape) for name, shape in recipe.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {name.split(".")[0] for name in missing} == {"head"}
    assert not unexpected
    return model.eval(), dict(np.load(shared / "fixtures/matpac_recipe_io.npz"))


@pytest.fixture
def matpac():
    torch.manual_seed(0)
    model = create_model("matpac_pico", num_classes=3, **SMALL).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def sound(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32) / 32768)


@pytest.mark.long
@torch.inference_mode()
def test_embeddings_and_layers_are_the_published_ones_at_five_lengths(reference):
    model, published = reference
    for name in LENGTHS:
        clip = sound(published[f"wav/{name}"])
        mel = model.front_end(clip[None])
        np.testing.assert_allclose(mel[0, :, :3], published[f"mel_first/{name}"], atol=1e-4)
        assert float(mel.mean()) == pytest.approx(float(published[f"mel_mean/{name}"]), abs=1e-4)
        encoded = model.encode(mel, layers=range(12))
        np.testing.assert_allclose(model.pool(encoded)[0], published[f"emb/{name}"], atol=1e-4)
        assert model.n_steps(len(clip)) == model.frames(encoded).shape[1]
        if f"layers/{name}" in published:
            pooled = model.pool_layers(encoded)
            for layer in range(12):
                np.testing.assert_allclose(pooled[layer][0], published[f"layers/{name}"][layer], atol=1e-4)
            assert torch.equal(pooled[11], model.pool(encoded))  # after the final norm


@pytest.mark.parametrize("names", [("2s", "6.08s"), pytest.param(LENGTHS, marks=pytest.mark.long)], ids=["two", "all"])
@torch.inference_mode()
def test_embeddings_and_layers_are_the_published_ones_in_one_padded_batch(reference, names):
    model, published = reference
    mel, n_frames = model.front_end.spectrogram(*padded([sound(published[f"wav/{name}"]) for name in names]))
    encoded = model.encode(mel, n_frames, layers=(0, 5, -1))
    embeddings, pooled = model.pool(encoded), model.pool_layers(encoded)
    for row, name in enumerate(names):
        np.testing.assert_allclose(embeddings[row], published[f"emb/{name}"], atol=1e-4)
        if f"layers/{name}" in published:
            for layer in (0, 5, -1):
                np.testing.assert_allclose(pooled[layer][row], published[f"layers/{name}"][layer], atol=1e-4)


def test_names_and_shapes_are_those_of_the_published_encoder(shared, reference):
    published, model = json.loads((shared / "fixtures/state_dicts/matpac.json").read_text())["recipe"], reference[0]
    own = {name: list(value.shape) for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert own == {name.removeprefix("student_encoder."): shape for name, shape in published.items()}
    assert model.embed_dim == 5 * 768
    for name in ("matpac", "matpac_plus"):
        assert get_model_entry(name).weights.startswith("https://github.com/aurianworld/matpac/releases/download/")
    assert get_model_entry("m2d").weights is None  # an archive
    assert create_model("m2d", num_classes=0, embed_dim=64, num_heads=1).front_end.description | {"mean": 0} == (
        MatpacMel(mean=0, std=4.2, center=True).description
    )


def test_the_front_end_is_torchaudios_in_slaneys_scale():
    clips = torch.stack([noise(16000, 1, 0.001), noise(16000, 2)])
    for front_end in (MatpacMel(), MatpacMel(mean=-7.1, std=4.2, center=True)):
        transform = torchaudio.transforms.MelSpectrogram(
            *(16000, 400, 400, 160, 50.0, 8000.0), n_mels=80, center=front_end.center, norm="slaney", mel_scale="slaney"
        )
        power = transform(clips)
        expected = ((power + torch.finfo(torch.float32).eps).log() - front_end.mean) / front_end.std
        torch.testing.assert_close(front_end(clips), expected, atol=1e-4, rtol=0)
        assert front_end.n_frames(16000) == expected.shape[2] == (101 if front_end.center else 98)
        silence = front_end(torch.zeros(1, 16000))
        assert front_end.power_db_to_value(-200.0) == pytest.approx(silence.mean().item(), abs=1e-5)


def test_positions_are_sines_and_cosines_of_the_column_then_of_the_row():
    table = compute_positions(16, 3, 5)
    assert table.shape == (1, 1 + 15, 16)
    assert not table[0, 0].any()
    for row in range(3):
        for column in range(5):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (index / 4) for index in range(4)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert table[0, 1 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def embed_slowly(model, clip: torch.Tensor) -> torch.Tensor:
    """Columns of one clip (T',E), chunk by chunk, patch by patch."""
    mel = model.front_end(clip[None])
    columns = []
    for start in range(0, mel.shape[2], model.target_length):
        chunk = mel[:, :, start : start + model.target_length]
        chunk = nn.functional.pad(chunk, (0, -chunk.shape[2] % 16))
        n_rows, n_columns = 5, chunk.shape[2] // 16
        patches = [
            chunk[0, 16 * row : 16 * row + 16, 16 * i : 16 * i + 16] for row in range(5) for i in range(n_columns)
        ]
        tokens = torch.stack([(model.patch_embed.proj.weight[:, 0] * patch).sum((1, 2)) for patch in patches])
        tokens = tokens + model.patch_embed.proj.bias
        places = [1 + row * 6 + column for row in range(n_rows) for column in range(n_columns)]
        x = torch.cat([model.cls_token[0], tokens + model.pos_embed[0, places]])[None]
        for block in model.blocks:
            x = block(x)
        grid = model.norm(x)[0, 1:].unflatten(0, (n_rows, n_columns))
        columns += [torch.cat([grid[row, column] for row in range(n_rows)]) for column in range(n_columns)]
    return torch.stack(columns)


SAMPLES = (1, 2000, WINDOW + 15 * HOP, WINDOW + 16 * HOP, WINDOW + 95 * HOP, WINDOW + 96 * HOP, 40_000)


@torch.inference_mode()
def test_clips_of_any_length_in_one_batch_are_embedded_as_alone_and_as_a_slow_reference(matpac):
    clips = [noise(n, n, 0.2) for n in SAMPLES]
    together, steps = matpac.embed(*padded(clips))
    tagged = matpac.predict(*padded(clips))
    assert together.shape == (len(clips), 5 * 64)
    for row, clip in enumerate(clips):
        columns = embed_slowly(matpac, clip)
        n_columns = matpac.n_steps(len(clip))
        assert len(columns) == n_columns == -(-matpac.front_end.n_frames(len(clip)) // 16)
        torch.testing.assert_close(steps[row, :n_columns], columns, atol=2e-5, rtol=1e-4)
        assert not steps[row, n_columns:].any()
        torch.testing.assert_close(together[row], columns.mean(0), atol=2e-5, rtol=1e-4)
        alone, alone_steps = matpac.embed(clip[None])
        torch.testing.assert_close(alone[0], columns.mean(0), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(alone_steps[0], columns, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(tagged[row], matpac.head(columns.mean(0)[None])[0].sigmoid(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["rows", "mean"])
@torch.inference_mode()
def test_chosen_tokens_have_their_positions_and_are_pooled_row_by_row(pooling):
    torch.manual_seed(0)
    model = create_model("matpac_pico", num_classes=3, pooling=pooling, **SMALL).eval()
    mel = torch.randn(2, 80, 150, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[0, 3, 7, 29], [1, 2, 8, 13], [0, 4, 5, 6]])  # row 1 reaches columns behind the second clip
    encoded = model.encode(mel, torch.tensor([150, 40]), keep=lambda f, t, valid: places, layers=[0, -1])
    rows, columns, _ = model._split_chunks(mel, torch.tensor([150, 40]))
    assert encoded.clip_of_row.tolist() == [0, 0, 1]
    assert columns.tolist() == [6, 4, 3]
    totals, counts = torch.zeros(2, 5, 64), torch.zeros(2, 5, 1)
    for row, clip in enumerate([0, 0, 1]):
        own = places[row][places[row] % 6 < columns[row]]
        first, _, tokens = encode_slowly(model, rows[row : row + 1], own)
        tokens = tokens[0, 1:]
        kept = places[row] % 6 < columns[row]
        torch.testing.assert_close(encoded.tokens[row][kept], tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.layers[0][row, 1:][kept], first[0, 1:], atol=1e-5, rtol=1e-4)
        for place, token in zip(own.tolist(), tokens, strict=True):
            totals[clip, place // 6] += token
            counts[clip, place // 6] += 1
    expected = (totals / counts.clamp(min=1)).flatten(1) if pooling == "rows" else totals.sum(1) / counts.sum(1)
    torch.testing.assert_close(model.pool(encoded), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.pool_layers(encoded)[-1], expected, atol=1e-5, rtol=1e-4)
    all_tokens = torch.arange(30).expand(1, -1)
    whole = model.encode(mel[:1, :, :96], keep=lambda f, t, valid: all_tokens)
    torch.testing.assert_close(model.pool(whole), model.embed_clips(mel[:1, :, :96]), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_exports_compute_chunks_and_padding_from_shapes(matpac):
    for n_frames in (1, 15, 16, 96, 97, 112, 250):
        mel = torch.randn(2, 80, n_frames)
        expected = matpac.forward_spectrogram(mel).sigmoid()
        torch.testing.assert_close(matpac.forward_export(mel), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(matpac.embed_export(mel), matpac.embed_clips(mel), atol=1e-5, rtol=1e-4)
        layers = zip(matpac.embed_layers_export(mel, [0, -1]), matpac.embed_layers(mel, layers=[0, -1]), strict=True)
        for found, wanted in layers:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_it_learns_from_single_clips_too_and_is_saved(matpac, tmp_path):
    matpac.train()
    matpac(noise(9_000)[None]).square().sum().backward()
    without = [name for name, p in matpac.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert "pos_embed" not in dict(matpac.named_parameters())
    matpac(noise(18_000).reshape(2, -1))
    assert matpac.head[0].running_mean.any()
    save_checkpoint(tmp_path / "matpac.pt", matpac)
    again = load_model(tmp_path / "matpac.pt")
    with torch.no_grad():
        assert torch.equal(again(noise(9_000)[None]), matpac.eval()(noise(9_000)[None]))


def publish(model, path, **more) -> None:
    """Write a model as MATPAC's published file."""
    own = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    torch.save({key if key in own else f"student_encoder.{key}": value for key, value in state.items()} | more, path)


def test_a_published_encoder_is_read_strictly_and_only_embeds(matpac, tmp_path, caplog):
    matpac.target_length = 608
    model = create_model("matpac_pico", num_classes=0)
    front_end = {
        "log_mel.MelSpectrogram.spectrogram.window": torch.hann_window(400),
        "log_mel.MelSpectrogram.mel_scale.fb": model.front_end.mel_weights,
    }
    publish(model, tmp_path / "matpac.pt", **front_end)
    loaded = load_model("matpac_pico", weights=tmp_path / "matpac.pt")
    assert loaded.num_classes == 0
    clip = noise(30_000)[None]
    assert torch.equal(loaded.embed(clip)[0], model.eval().embed(clip)[0])
    assert not caplog.records

    tuned = load_model("matpac_pico", weights=tmp_path / "matpac.pt", num_classes=7)
    assert tuned.predict(clip).shape == (1, 7)
    assert "its last layer has 0 classes, the model has 7: the last layer is initialised anew" in caplog.text
    student = create_model("matpac_pico", num_classes=4)
    load_weights(student, tmp_path / "matpac.pt", pre_training=True)
    assert torch.equal(student.cls_token, model.cls_token)

    content = torch.load(tmp_path / "matpac.pt")
    del content["student_encoder.norm.bias"]
    torch.save(content | {"probe.weight": torch.zeros(2, 2)}, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"(?s)1 tensors are missing: norm\.bias.*1 tensors are unexpected: probe"):
        load_model("matpac_pico", weights=tmp_path / "cut.pt")


def test_what_a_file_holds_of_training_is_dropped_with_a_notice(tmp_path, caplog):
    model = create_model("matpac_pico", num_classes=0)
    names = ("decoder.mask_token", "mcl_heads.layers.0.weight", "cls_student_head.mlp.0.weight", "cls_head_loss.center")
    more = {name: torch.zeros(2) for name in names} | {"_ema": {"norm.bias": torch.zeros(2)}, "_cls_head_ema": {}}
    publish(model, tmp_path / "training.pt", **more)
    torch.save({"model": torch.load(tmp_path / "training.pt"), "args": None}, tmp_path / "training.pt")
    loaded = load_model("matpac_pico", weights=tmp_path / "training.pt")
    assert torch.equal(loaded.norm.bias, model.norm.bias)
    assert "6 entries of its training are dropped" in caplog.text


def test_statistics_of_m2d_are_read_and_its_teacher_is_dropped(tmp_path, caplog):
    model = create_model("matpac_pico", num_classes=0, mean=-7.1, std=4.2, center=True).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "m2d.pth")
    clip = noise(20_000)[None]
    loaded = load_model("matpac_pico", weights=tmp_path / "m2d.pth")
    assert loaded.arguments["center"] is True
    assert torch.equal(loaded.embed(clip)[1], model.embed(clip)[1])
    training = {"decoder_pred.bias": torch.zeros(3), "mask_token": torch.zeros(3), "target_norm.bias": torch.zeros(3)}
    torch.save({"model": state | training | {"norm_stats": torch.tensor([-6.5, 4.0])}}, tmp_path / "m2d.pth")
    front_end = load_model("matpac_pico", weights=tmp_path / "m2d.pth").front_end
    assert (front_end.mean, front_end.std, front_end.center) == (-6.5, 4.0, True)
    assert "3 entries of its training are dropped" in caplog.text


def test_the_classifier_of_audioset_reads_longer_chunks_and_the_mean_over_rows(tmp_path):
    model = create_model("matpac_pico", num_classes=527, pooling="mean", target_length=992).eval()
    nn.init.normal_(model.head[0].running_mean)
    head = {f"head.{key}": value for key, value in model.head[1].state_dict().items()}
    head |= {f"head_norm.running_{key}": getattr(model.head[0], f"running_{key}") for key in ("mean", "var")}
    publish(model, tmp_path / "classifier.pt", **head)
    loaded = load_model("matpac_pico", weights=tmp_path / "classifier.pt")
    assert (loaded.target_length, loaded.embed_dim, loaded.activation) == (992, 64, "sigmoid")
    assert loaded.labels == list_sorted_labels()
    assert loaded.head[0].num_batches_tracked > 0  # its statistics are not replaced in training
    clip = noise(170_000)[None]
    assert torch.equal(loaded.predict(clip), model.predict(clip))


def test_positions_of_another_length_are_computed_where_they_are_the_table(matpac, tmp_path, caplog):
    publish(create_model("matpac_pico", num_classes=0, **SMALL), tmp_path / "short.pt")
    longer = load_model("matpac_pico", weights=tmp_path / "short.pt", target_length=160, depth=2)
    assert torch.equal(longer.pos_embed, compute_positions(64, 5, 10))
    assert "pos_embed is computed for 10 in place of 6 patch columns" in caplog.text
    other = torch.load(tmp_path / "short.pt") | {"pos_embed": torch.randn(1, 31, 64)}
    torch.save(other, tmp_path / "learned.pt")
    with pytest.raises(UserError, match=r"pos_embed is \(1, 31, 64\), expected \(1, 51, 64\)"):
        load_model("matpac_pico", weights=tmp_path / "learned.pt", target_length=160, depth=2)


def test_files_of_other_systems_are_reported_in_one_sentence(matpac, tmp_path):
    torch.save(create_model("audiotransformer_pico").state_dict(), tmp_path / "ced.pt")
    with pytest.raises(UserError, match=r"holds the weights of CED, not of 'matpac_pico'") as caught:
        load_model("matpac_pico", weights=tmp_path / "ced.pt")
    assert "\n" not in str(caught.value)
    publish(create_model("matpac_pico", num_classes=0), tmp_path / "matpac.pt")
    for name in ("audiotransformer_pico", "passt_pico", "ast_pico", "mn01_as", "resnet10_small"):
        with pytest.raises(UserError, match=rf"holds the weights of MATPAC or M2D, .*, not of '{name}'") as caught:
            load_model(name, weights=tmp_path / "matpac.pt")
        assert "\n" not in str(caught.value)
    tuned = {f"module.ar.runtime.backbone.{key}": value for key, value in matpac.state_dict().items()}
    torch.save(tuned | {"module.head.norm.running_mean": torch.zeros(3)}, tmp_path / "evar.pth")
    with pytest.raises(UserError, match=r"M2D fine-tuned in EVAR .*which is not read: give an M2D encoder"):
        load_model("m2d", weights=tmp_path / "evar.pth")
    publish(matpac, tmp_path / "other.pt", **{"log_mel.MelSpectrogram.spectrogram.window": torch.hann_window(800)})
    with pytest.raises(UserError, match="not MATPAC's for 16 kHz; expected n_fft 400"):
        load_model("matpac_pico", weights=tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm_stats", torch.zeros(3), "not those of MATPAC or M2D"),
        ("norm_stats", torch.tensor(1.0), "not those of MATPAC or M2D"),
        ("norm_stats", torch.tensor([-7.0, 0.0]), "std is 0"),
        ("pos_embed", torch.zeros(1), "not those of MATPAC or M2D"),
        ("pos_embed", torch.zeros(1, 1, 64), "target_length is 0"),
        ("head.weight", torch.tensor(1.0), "not those of MATPAC or M2D"),
        ("norm.weight", "text", "holds values that are no tensors"),
    ],
)
def test_damaged_files_are_reported(name, value, message, tmp_path):
    state = create_model("matpac_pico", num_classes=0, depth=1).state_dict()
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    torch.save(kept | {"head.bias": torch.zeros(1)} | {name: value}, tmp_path / "m2d.pth")
    with pytest.raises(UserError, match=message):
        load_model("matpac_pico", weights=tmp_path / "m2d.pth", depth=1)


def test_settings_that_contradict_each_other_are_listed():
    with pytest.raises(UserError, match=r"(?s)side by side.*freq_patch_out.*eval_avg must be mean.*multiple of 4"):
        create_model("matpac_pico", embed_dim=66, target_length=100, freq_patch_out=1, eval_avg="max")
    with pytest.raises(UserError, match="pooling"):
        create_model("matpac_pico", pooling="max")
    with pytest.raises(UserError, match="80 bands and at least 1 frame, not 64"):
        create_model("matpac_pico").encode(torch.zeros(1, 64, 100))
