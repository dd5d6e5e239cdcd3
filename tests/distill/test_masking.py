"""Masks of self-supervised objectives: exact shares, the same for a clip in any batch."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from distill.objectives.masking import average_tokens, check_student, crop, cut_patches, draw_mask, draw_random
from distill.random_streams import Stream
from models import create_model
from tests.batches import make_batch


def split(mask, row):
    """The visible and the masked tokens of a clip, as sets."""
    visible = mask.visible[row] if mask.is_visible is None else mask.visible[row][mask.is_visible[row]]
    return set(visible.tolist()), set(mask.masked[row][mask.is_target[row]].tolist())


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.7, 0.75, 0.99])
@pytest.mark.parametrize("n_rows", [1, 4, 5])
def test_the_share_of_masked_tokens_is_exact_for_clips_of_every_length(n_rows, ratio):
    columns = torch.arange(1, 20)
    batch = make_batch(item=torch.arange(19))
    mask = draw_mask(3, batch, ratio, (n_rows, 19), columns)
    for row, n_columns in enumerate(columns.tolist()):
        visible, masked = split(mask, row)
        own = {f * 19 + t for f, t in itertools.product(range(n_rows), range(n_columns))}
        assert visible | masked == own
        assert not visible & masked
        n = len(own)
        expected = min(max(math.floor((1 - ratio) * n + 0.5), 1), max(n - 1, 1))
        assert len(visible) == expected
        assert sorted(mask.visible[row].tolist()) == mask.visible[row].tolist()


def test_a_clip_has_the_same_mask_in_any_batch_and_another_one_in_each_epoch():
    alone = draw_mask(3, make_batch(item=torch.tensor([7])), 0.7, (4, 6), None)
    others = make_batch(item=torch.tensor([1, 7, 2]), epoch=torch.tensor([1, 1, 2]))
    beside = draw_mask(3, others, 0.7, (4, 31), torch.tensor([31, 6, 9]))

    def places(mask, row, width):
        return [{(x // width, x % width) for x in part} for part in split(mask, row)]

    assert places(alone, 0, 6) == places(beside, 1, 31)
    later = draw_mask(3, make_batch(item=torch.tensor([7]), epoch=torch.tensor([2])), 0.7, (4, 6), None)
    other_seed = draw_mask(4, make_batch(item=torch.tensor([7])), 0.7, (4, 6), None)
    assert split(alone, 0) != split(later, 0)
    assert split(alone, 0) != split(other_seed, 0)


def test_every_token_is_masked_equally_often():
    batch = make_batch(item=torch.arange(4000))
    mask = draw_mask(1, batch, 0.75, (4, 10), None)
    share = np.bincount(mask.masked.flatten().numpy(), minlength=40) / 4000
    assert np.abs(share - 0.75).max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    together = torch.zeros(4000, 40).scatter(1, mask.masked, 1.0)
    correlation = np.corrcoef(together.T.numpy()) - np.eye(40)
    assert np.abs(correlation + (1 - np.eye(40)) / 39).max() < 0.1  # a fixed number of 40 is masked


def test_random_numbers_are_uniform_and_differ_by_seed_stream_epoch_and_item():
    batch = make_batch(item=torch.arange(200), epoch=torch.arange(200) % 3)
    numbers = draw_random(5, batch, Stream.CROP, 50)
    assert numbers.min() >= 0
    assert len(numbers.unique()) == numbers.numel()
    bits = (numbers[..., None] >> torch.arange(63)) & 1
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 100
    other = draw_random(5, batch, Stream.TOKEN_MASK, 50)
    assert not (numbers == other).any()


def test_long_clips_are_cropped_at_any_frame_and_short_ones_are_not():
    mel = torch.arange(30.0).expand(2000, 2, 30)
    batch = make_batch(item=torch.arange(2000), mel=mel, n_frames=None)
    found = crop(0, batch, 10)
    starts = found.mel[:, 0, 0].long()
    assert torch.equal(found.mel, starts[:, None, None] + torch.arange(10.0).expand(2000, 2, 10))
    assert set(starts.tolist()) == set(range(21))
    assert found.n_frames is None
    lengths = torch.full((2000,), 7)
    lengths[0] = 30
    padded = crop(0, replace(batch, n_frames=lengths), 10)
    assert padded.n_frames.tolist() == [10] + [7] * 1999
    assert torch.equal(padded.mel[1:], mel[1:, :, :10])
    assert crop(0, batch, 30) is batch


def test_patches_are_in_the_order_of_the_tokens():
    student = create_model("audiotransformer_pico", num_classes=0)
    mel = torch.randn(2, 64, 60)
    patches = cut_patches(student, mel, (4, 3))
    for row, column in itertools.product(range(4), range(3)):
        expected = mel[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert torch.equal(patches[:, row * 3 + column], expected.flatten(1))
    embedded = patches @ student.patch_embed.proj.weight.flatten(1).T + student.patch_embed.proj.bias
    assert torch.allclose(embedded, student.patch_embed(mel).flatten(1, 2), atol=1e-5)


def test_each_clip_counts_the_same_however_many_tokens_it_has():
    values = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [5.0, 5.0, 5.0]])
    is_target = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert float(average_tokens(values, is_target)) == pytest.approx((2 + 4 + 0) / 3)


def test_one_patch_cannot_be_masked():
    with pytest.raises(UserError, match=r"single patches, so that nothing can be masked; give longer clips"):
        draw_mask(0, make_batch(item=torch.arange(2)), 0.7, (1, 1), None)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet10_small", {}, "has no tokens to mask; give a vision transformer"),
        ("audiotransformer_pico", {"patch_stride": 8}, r"overlap .* set patch_stride to patch_size"),
    ],
)
def test_students_that_cannot_be_masked_are_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        check_student(create_model(name, num_classes=0, **arguments))
