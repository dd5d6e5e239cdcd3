"""Long clips in chunks: each counts by its own frames; a clip a hair longer than a chunk gets what was published."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import create_model
from models.base import Encoded
from models.chunks import drop_remainder, join, join_logits
from models.onnx import export_onnx
from models.vit import SpectrogramTransformer
from tests.models.sounds import noise, padded

logging.getLogger("torch.__trace").propagate = False  # of interest to no reader of a failure

PATCH = 16
cropping = pytest.mark.parametrize("name", ["passt_pico", "ast_pico"])  # published code crops long clips


def network(name: str, **arguments: object) -> SpectrogramTransformer:
    """A small network whose probabilities differ much from sound to sound."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, depth=2, **arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, SpectrogramTransformer)
    return model


def published(model: SpectrogramTransformer, mel: Tensor) -> Tensor:
    """Probabilities as published code gives them: PaSST drops columns without a position, AST frames without one."""
    if model.name.startswith("ast"):
        mel = F.pad(mel[:, :, : model.target_length], (0, max(model.target_length - mel.shape[2], 0)), value=model.fill)
    x = F.conv2d(mel[:, None], model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.patch_stride)
    if model.name.startswith("ast"):
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([torch.cat([model.cls_token, model.dist_token], 1), x], 1) + model.pos_embed
        head = model.mlp_head
    else:
        time = model.time_new_pos_embed
        x = x[:, :, :, : time.shape[3]]
        x = (x + time[..., : x.shape[3]] + model.freq_new_pos_embed).flatten(2).transpose(1, 2)
        tokens = [model.cls_token + model.new_pos_embed[:, :1], model.dist_token + model.new_pos_embed[:, 1:]]
        x = torch.cat([*tokens, x], 1)
        head = model.head
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    return head((x[:, 0] + x[:, 1]) / 2).sigmoid()


@pytest.mark.parametrize(
    ("name", "seconds", "n_frames"),
    [
        ("passt_pico", 9.0, 900),
        ("passt_pico", 10.0, 1000),
        ("passt_pico", 10.001, 1001),
        ("passt_pico", 10.005, 1001),
        ("passt_pico", 10.09, 1009),
        ("passt_pico", 10.15, 1015),
        ("ast_pico", 10.005, 999),
        ("ast_pico", 10.26, 1024),
        ("ast_pico", 10.27, 1025),
        ("ast_pico", 10.41, 1039),
    ],
)
@torch.inference_mode()
def test_clips_up_to_a_patch_longer_than_a_chunk_get_the_published_probabilities(name, seconds, n_frames):
    model = network(name)
    wave = noise(round(seconds * model.sample_rate))[None]
    mel = model.front_end(wave)
    assert mel.shape[2] == n_frames
    torch.testing.assert_close(model.predict(wave), published(model, mel), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.forward_export(mel), published(model, mel), atol=1e-6, rtol=1e-5)


@cropping
@torch.inference_mode()
def test_longer_clips_are_as_far_from_the_published_probabilities_as_the_tail_weighs(name):
    model = network(name)
    for n_more in (16, 30, 100):
        mel = model.front_end(noise(12 * model.sample_rate)[None])[:, :, : model.target_length + n_more]
        found, crop = model.forward_spectrogram(mel).sigmoid(), published(model, mel)
        tail = F.pad(mel[:, :, model.target_length :], (0, model.target_length - n_more), value=model.fill)
        share = n_more / mel.shape[2]
        torch.testing.assert_close(found, (1 - share) * crop + share * published(model, tail), atol=1e-6, rtol=1e-5)
        assert 0 < (found - crop).abs().max() < share


@cropping
@torch.inference_mode()
def test_one_frame_more_changes_probabilities_and_embeddings_by_the_share_of_a_patch_or_the_tail_at_most(name):
    model = network(name, target_length=100)
    mel = torch.randn(1, 128, 340, generator=torch.Generator().manual_seed(1))
    changes = []
    for border in (100, 200, 300):
        before = None
        for n_frames in range(border - 2, border + 24):
            found = model.forward_spectrogram(mel[:, :, :n_frames]).sigmoid()
            clip = model.embed_spectrogram(mel[:, :, :n_frames])[0]
            if before is not None:
                tail = max(PATCH, n_frames - border)
                assert (found - before[0]).abs().max() < tail / n_frames
                assert (clip - before[1]).norm() < 2 * clip.norm() * tail / n_frames
                changes.append(float((found - before[0]).abs().max()))
            before = found, clip
    assert max(changes) > 0.01  # the network tells the pieces apart


def by_hand(model: SpectrogramTransformer, mel: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (C,) and embedding (D,) of one clip (1,F,T), chunk by chunk."""
    size, n_frames = model.target_length, mel.shape[2]
    pieces = [mel[:, :, start : start + size] for start in range(0, n_frames, size)]
    if len(pieces) > 1 and pieces[-1].shape[2] < PATCH:
        pieces.pop()
    if len(pieces) > 1:
        pieces = [F.pad(piece, (0, size - piece.shape[2]), value=model.fill) for piece in pieces]
    weights = [min(size, n_frames - number * size) for number in range(len(pieces))]
    probabilities = sum(w * model.forward_spectrogram(p).sigmoid() for w, p in zip(weights, pieces, strict=True))
    embeddings = sum(w * model.embed_spectrogram(p)[0] for w, p in zip(weights, pieces, strict=True))
    return (probabilities / sum(weights))[0], (embeddings / sum(weights))[0]


@cropping
@torch.inference_mode()
def test_every_chunk_counts_by_its_own_frames_alone_in_a_batch_and_in_shapes(name):
    model = network(name, target_length=100)
    hop = model.front_end.hop_size
    least = next(n for n in range(1, 10**6, hop) if model.front_end.n_frames(n) == 20)
    clips = [noise(least + hop * more, more, 0.2) for more in (0, 80, 85, 95, 96, 130, 185, 200, 290)]  # 20 frames on
    frames = [model.front_end.n_frames(len(clip)) for clip in clips]
    assert frames == [20, 100, 105, 115, 116, 150, 205, 220, 310]
    batch, lengths = padded(clips)
    together, (vectors, columns) = model.predict(batch, lengths), model.embed(batch, lengths)
    for row, clip in enumerate(clips):
        mel = model.front_end(clip[None])
        probabilities, embedding = by_hand(model, mel)
        for found in (model.predict(clip[None])[0], model.forward_export(mel)[0], together[row]):
            torch.testing.assert_close(found, probabilities, atol=1e-5, rtol=1e-5)
        alone, steps = model.embed(clip[None])
        for vector in (alone[0], model.embed_export(mel)[0], vectors[row]):
            torch.testing.assert_close(vector, embedding, atol=1e-4, rtol=1e-4)
        assert steps.shape[1] == model.n_steps(len(clip))
        torch.testing.assert_close(columns[row, : steps.shape[1]], steps[0], atol=1e-4, rtol=1e-4)
        assert not columns[row, steps.shape[1] :].any()


@cropping
def test_an_export_weighs_chunks_as_pytorch_does(name, tmp_path):
    model = network(name, target_length=100)
    assert export_onnx(model, {"fp32": tmp_path / "x.onnx"})["fp32"] < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for n_clips, n_frames in ((2, 5), (1, 16), (2, 99), (1, 100), (2, 101), (1, 115), (2, 116), (1, 207), (2, 290)):
        mel = torch.randn(n_clips, 128, n_frames, generator=generator)
        silence = model.front_end.power_db_to_value(-100.0)
        given = mel if model.fixed_length else F.pad(mel, (0, max(PATCH - n_frames, 0)), value=silence)
        with torch.inference_mode():
            expected = model.forward_spectrogram(given).sigmoid().numpy()
        np.testing.assert_allclose(session.run(None, {"feats": mel.numpy()})[0], expected, atol=1e-5)


@torch.inference_mode()
def test_ced_stays_as_published_one_frame_makes_a_chunk_that_counts_as_much_as_any():
    model = network("audiotransformer_pico", target_length=100, pooling="logit")
    mel = torch.randn(1, 64, 101, generator=torch.Generator().manual_seed(1)) * 20 - 40
    last = F.pad(model._normalise(mel[:, :, 100:], None), (0, 99))
    first = model.forward_spectrogram(mel[:, :, :100]).sigmoid()
    rest = model.classify_rows(model._encode_rows(last, None, Encoded(1))).sigmoid()
    torch.testing.assert_close(model.forward_spectrogram(mel).sigmoid(), (first + rest) / 2)
    torch.testing.assert_close(model.forward_export(mel), (first + rest) / 2)


def test_remainders_that_fill_no_patch_are_left_out_of_numbers_and_tensors():
    counts = [1, 15, 99, 100, 101, 115, 116, 199, 200, 215, 216]
    expected = [1, 15, 99, 100, 100, 100, 116, 199, 200, 200, 216]
    assert [drop_remainder(n, 100, 16) for n in counts] == expected
    assert drop_remainder(torch.tensor(counts), 100, 16).tolist() == expected


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_logits_of_weighed_chunks_are_those_of_their_probabilities(activation):
    generator = torch.Generator().manual_seed(0)
    rows, clip = torch.randn(5, 3, generator=generator) * 4, torch.tensor([0, 0, 1, 1, 1])
    weights = torch.tensor([100, 20, 100, 100, 16])
    probabilities = rows.softmax(-1) if activation == "softmax" else rows.sigmoid()
    expected = torch.stack(
        [
            (100 * probabilities[0] + 20 * probabilities[1]) / 120,
            (100 * probabilities[2] + 100 * probabilities[3] + 16 * probabilities[4]) / 216,
        ]
    )
    torch.testing.assert_close(join(probabilities, clip, 2, "mean", weights), expected)
    logits = join_logits(rows, clip, 2, "mean", activation, weights)
    torch.testing.assert_close(logits.softmax(-1) if activation == "softmax" else logits.sigmoid(), expected)
    assert torch.equal(join(rows, clip, 2, "max", weights), join(rows, clip, 2, "max"))
