"""What must not change a prediction, and what must, for every registered model.

Batch mates, padding, order, engine and precision do not; every part of a long sound does. Models of published size are
built with one narrow block: their code is that of the wide ones.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import create_model, list_models
from models.onnx import export_onnx
from tagging.onnx_engine import OnnxEngine
from tests.models.sounds import noise, padded
from tests.models.test_registry import OF_PUBLISHED_SIZE, WIDE

QUICK = {"audiotransformer_pico", "passt_pico", "mn01_as", "dymn04_as", "resnet10_small"}


def list_cases(quick: set[str]) -> list:
    """All models but the twins of others; those that are not quick among the long tests."""
    names = [name for name in list_models() if name not in WIDE]
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.long) for name in names]


ATOL = 2e-5  # of probabilities: other sizes of batches are summed in another order
BF16_ATOL = 0.06  # of probabilities; 8 bits of mantissa through some ten layers with random weights
BF16_ATOL_DEEP = 0.25  # through a hundred
N_CLASSES = 5
LONG_SECONDS = 35.0  # three chunks of most models, and a remainder
PIECE_SECONDS = 0.3
POSITIONS = (0.0, 4.9, 9.9, 10.1, 19.8, 20.3, 29.9, 30.2, 34.6)  # at both sides of the ends of chunks, too


@cache
def build(name: str):
    """A model whose predictions differ from clip to clip, and its clips, of noise in bands of other levels."""
    published_size = name.startswith(OF_PUBLISHED_SIZE) and not name.endswith("_pico")
    narrow = {"embed_dim": 64, "num_heads": 1, "depth": 1} if published_size else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, num_classes=N_CLASSES, **narrow).eval()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=2 / last.in_features**0.5)
        settle(model)
    return model


def settle(model) -> None:
    """Set the statistics of batch normalisation from noise: with those of new weights sound fades out on its way."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        model(torch.stack(make_clips(model, 1, 1, 1, 1)))
    model.eval()


def make_clips(model, *seconds: float) -> list[Tensor]:
    clips = []
    for number, length in enumerate(seconds):
        clip = noise(round(length * model.sample_rate), number, 0.05 * (number + 1))
        clips.append(clip if number % 2 else torch.cumsum(clip, 0).sub(clip.mean()).clamp(-1, 1) * 0.3 + clip * 0.1)
    return clips


@pytest.mark.parametrize("name", list_cases(QUICK))
@torch.inference_mode()
def test_batch_mates_and_their_order_change_nothing(name: str) -> None:
    model = build(name)
    batch = torch.stack(make_clips(model, 2, 2, 2, 2))
    together = model.predict(batch)
    assert (together[0] - together[1]).abs().max() > 10 * ATOL  # else nothing is shown
    torch.testing.assert_close(torch.cat([model.predict(clip[None]) for clip in batch]), together, atol=ATOL, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.predict(batch[order]), together[order], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", list_cases(QUICK))
@torch.inference_mode()
def test_padding_changes_nothing(name: str) -> None:
    model = build(name)
    clips = make_clips(model, 1.3, 2.5, 0.4)
    alone = torch.cat([model.predict(clip[None]) for clip in clips])
    torch.testing.assert_close(model.predict(*padded(clips)), alone, atol=ATOL, rtol=0)
    vectors = torch.cat([model.embed(clip[None])[0] for clip in clips])
    found = model.embed(*padded(clips))[0]
    torch.testing.assert_close(found, vectors, atol=1e-3 * float(vectors.abs().max()), rtol=0)


@pytest.mark.parametrize("name", list_cases(QUICK))
@torch.inference_mode()
def test_every_part_of_a_long_clip_counts(name: str) -> None:
    model = build(name)
    (clip,) = make_clips(model, LONG_SECONDS)
    n_piece = round(PIECE_SECONDS * model.sample_rate)
    whole = model.predict(clip[None])
    torch.testing.assert_close(
        model.predict(clip[None]), whole, atol=0, rtol=0
    )  # so that any difference is the piece's
    unchanged = []
    for seconds in POSITIONS:
        start = round(seconds * model.sample_rate)
        other = clip.clone()
        other[start : start + n_piece] = noise(n_piece, 99, 0.3)
        difference = float((model.predict(other[None]) - whole).abs().max())
        if difference < 1e-6:
            unchanged.append((seconds, difference))
    assert unchanged == []


@pytest.mark.parametrize("name", list_cases(QUICK))
@torch.inference_mode()
def test_half_the_precision_changes_little(name: str) -> None:
    model = build(name)
    batch = torch.stack(make_clips(model, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(batch).float()
    bound = BF16_ATOL_DEEP if "eres2net" in name else BF16_ATOL
    assert (found - model.predict(batch)).abs().max() < bound


EXPORTED = [
    pytest.param(name, marks=pytest.mark.long)
    for name in list_models()
    if name not in WIDE and not re.search(r"^(ast|passt)_[^p]", name)
]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_predicts_what_the_model_does(name: str, tmp_path) -> None:
    model = build(name)
    export_onnx(model, {"fp32": tmp_path / "model.onnx"}, waveform=True)
    engine = OnnxEngine(tmp_path / "model.onnx")
    clips = make_clips(model, 1.3, 2.5)
    with torch.inference_mode():
        expected = np.concatenate([model.predict(clip[None]).numpy() for clip in clips])
    np.testing.assert_allclose(engine.predict([clip.numpy() for clip in clips]), expected, atol=2e-4)
