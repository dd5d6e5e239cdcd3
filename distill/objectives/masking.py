"""Random masks of self-supervised objectives: which tokens of a clip the student gets, and which it predicts.

All numbers are functions of (seed, epoch, item) alone, computed on the device of the batch: neither the number of
processes nor the batch that a clip is in changes its mask. The host waits for the device only where clips have several
lengths, whose numbers of tokens are sizes of tensors.

Letters: B clips, F mel bands, T frames, f and t rows and columns of the patch grid, N = f t tokens, K visible and M
masked ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from distill.batch import Batch
from distill.random_streams import Stream, derive_seed
from models.base import AudioTagger, Encoded
from models.vit import SpectrogramTransformer

_GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as int64
_PADDING = torch.iinfo(torch.int64).max  # sorts behind all random numbers


@dataclass(frozen=True)
class TokenMask:
    """A random partition of each clip's tokens; indices are ascending, frequency-major, into the f t patches.

    Shorter clips have padding in some places.

    Attributes:
        visible: (B,K).
        masked: (B,M).
        is_target: (B,M), which of `masked` are tokens to predict; at least one of a clip with two tokens or more.
        is_visible: (B,K), which of `visible` are tokens of the clip; None for all.
    """

    visible: Tensor
    masked: Tensor
    is_target: Tensor
    is_visible: Tensor | None


def draw_random(seed: int, batch: Batch, stream: Stream, size: int) -> Tensor:
    """Return random numbers of each item of a batch, int64 from 0 to 2^63 - 1, (B, size).

    A counter-based generator: each number is a hash (the finaliser of SplitMix64, Steele et al., "Fast splittable
    pseudorandom number generators", OOPSLA 2014) of seed, stream, epoch, item and its position.
    """
    state = _hash(batch.epoch * _GOLDEN + derive_seed(seed, stream))
    state = _hash(state + batch.item * _GOLDEN)
    positions = torch.arange(1, size + 1, device=state.device)
    return _hash(state[:, None] + positions * _GOLDEN) & _PADDING


def _hash(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687  # `>>` copies the sign, a hash shifts in zeros
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def mask_clips(seed: int, student: SpectrogramTransformer, batch: Batch, ratio: float) -> tuple[Batch, TokenMask]:
    """Crop the clips of a batch to the student's window, and draw the tokens that are masked.

    A column counts as a clip's if all of its frames are; its first one always does. Frames behind the last column are
    cut off, and what a network fills up to its window is padding: a clip has the same mask alone and in any batch.

    Returns:
        The batch, of whole columns, and the partition of its tokens.

    Raises:
        UserError: as `draw_mask`.
    """
    fix_norms(student)
    batch = crop(seed, batch, student.target_length)
    width = get_patch_shape(student)[0][1]  # patches lie side by side
    columns = None
    if batch.n_frames is not None or student.fixed_length:
        lengths = _get_lengths(batch)
        columns = (lengths // width).clamp(min=1)
        if batch.n_frames is not None:
            batch = replace(batch, n_frames=torch.minimum(lengths, columns * width))
    batch = replace(batch, mel=batch.mel[:, :, : max(batch.mel.shape[2] // width, 1) * width])
    return batch, draw_mask(seed, batch, ratio, student.grid(batch.mel.shape[2]), columns)


def encode_tokens(student: SpectrogramTransformer, batch: Batch, places: Tensor, layers: Sequence[int] = ()) -> Encoded:
    """Encode the tokens of some places alone: (B,K) indices into the f t patches."""
    return student.encode(batch.mel, batch.n_frames, keep=lambda f, t, valid: places, layers=layers)


def draw_mask(seed: int, batch: Batch, ratio: float, grid: tuple[int, int], n_columns: Tensor | None) -> TokenMask:
    """Draw the tokens that are masked: a share `ratio` of each clip's, rounded, at least one and not all.

    Args:
        seed: of the run.
        batch: `epoch` and `item` are used.
        ratio: share of the tokens that is masked.
        grid: f and t.
        n_columns: (B,) columns of each clip, None for t.

    Raises:
        UserError: a grid of one token, of which nothing can be masked.
    """
    n_rows, width = grid
    n_tokens = n_rows * width
    if n_tokens < 2:
        raise UserError(
            "the clips of a batch are single patches, so that nothing can be masked; give longer clips, or a smaller "
            "patch_size or hop_size in model_args"
        )
    # Column by column: the numbers of a clip's columns do not depend on how many the longest clip of the batch has.
    noise = draw_random(seed, batch, Stream.TOKEN_MASK, n_tokens).unflatten(1, (width, n_rows))
    noise = noise.transpose(1, 2).flatten(1)
    if n_columns is None:
        order, n_visible = noise.argsort(1), int(_count_visible(torch.tensor(n_tokens), ratio))
        is_target = torch.ones(len(order), n_tokens - n_visible, dtype=torch.bool, device=order.device)
        visible, masked = order[:, :n_visible].sort(1).values, order[:, n_visible:].sort(1).values
        return TokenMask(visible, masked, is_target, None)
    is_padding = torch.arange(n_tokens, device=noise.device) % width >= n_columns[:, None]
    order = noise.masked_fill(is_padding, _PADDING).argsort(dim=1, stable=True)
    n_valid = n_rows * n_columns
    n_visible_each = _count_visible(n_valid, ratio)
    visible, is_visible = _take(order, torch.zeros_like(n_visible_each), n_visible_each)
    # A clip of one token has nothing to predict; it gives that token again, since none may consist of padding alone.
    masked, is_target = _take(order, n_visible_each.minimum(n_valid - 1), (n_valid - n_visible_each).clamp(min=1))
    return TokenMask(visible, masked, is_target & (n_valid > 1)[:, None], is_visible)


def _count_visible(n: Tensor, ratio: float) -> Tensor:
    """Return the numbers of visible tokens of clips of `n` (...)."""
    return ((1 - ratio) * n.double() + 0.5).floor().long().minimum(n - 1).clamp(min=1)


def _take(order: Tensor, start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Take `count` (B,) entries of each row of `order` (B,N) from `start` (B,) on, filled up from the row's end.

    Returns:
        Ascending indices (B, largest count), and which of them are counted.
    """
    place = torch.arange(int(count.max()), device=order.device)
    is_taken = place < count[:, None]
    # The end of a row is padding, of which a shorter clip has enough.
    index = torch.where(is_taken, start[:, None] + place, order.shape[1] - 1 - (place - count[:, None]).clamp(min=0))
    taken = order.gather(1, index)
    ascending = taken.argsort(1)
    return taken.gather(1, ascending), is_taken.gather(1, ascending)


def check_student(student: AudioTagger) -> SpectrogramTransformer:
    """Return the student as a transformer whose patches can be masked.

    Raises:
        UserError: it has no tokens, or its patches overlap.
    """
    if not isinstance(student, SpectrogramTransformer):
        raise UserError(
            f"{student.name} has no tokens to mask; give a vision transformer, such as audiotransformer_tiny"
        )
    size, stride = get_patch_shape(student)
    if stride != size:
        raise UserError(
            f"the patches of {student.name} overlap (patch_stride {stride}, patch_size {size}), so that masked ones "
            "would be visible in part; set patch_stride to patch_size in model_args"
        )
    return student


def fix_norms(student: AudioTagger, *, check: bool = False) -> None:
    """Put batch norms into evaluation mode: statistics of a batch would depend on what is masked.

    Args:
        student: its input's batch norm, for example.
        check: whether the norms must have statistics.

    Raises:
        UserError: one has none.
    """
    head = student.last_layer.split(".")[0] + "."
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            if name.startswith(head):  # of classes, which are not trained
                continue
            if check and module.num_batches_tracked is not None and not module.num_batches_tracked:
                raise UserError(
                    f"{student.name}: {name} has no statistics, and batches of masked clips must not change them; set "
                    "init_from_data: true"
                )


def get_patch_shape(student: SpectrogramTransformer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return size and stride of the patches, each in bands and frames."""
    projection = student.patch_embed.proj
    return (projection.kernel_size[0], projection.kernel_size[1]), (projection.stride[0], projection.stride[1])


def crop(seed: int, batch: Batch, n_frames: int) -> Batch:
    """Crop spectrograms longer than `n_frames` to so many, from a random frame on, as MATPAC does."""
    longest = batch.mel.shape[2]
    if longest <= n_frames:
        return batch
    lengths = _get_lengths(batch)
    span = (lengths - n_frames).clamp(min=0) + 1
    start = draw_random(seed, batch, Stream.CROP, 1)[:, 0] % span
    index = start[:, None] + torch.arange(n_frames, device=start.device)  # (B,T')
    mel = batch.mel.gather(2, index[:, None].expand(-1, batch.mel.shape[1], -1))
    # Shorter clips keep their length; without any, there is no padding left.
    return replace(batch, mel=mel, n_frames=None if batch.n_frames is None else lengths.clamp(max=n_frames))


def _get_lengths(batch: Batch) -> Tensor:
    """Return the frames of each clip (B,), on the device of the spectrograms."""
    if batch.n_frames is None:
        return torch.full((len(batch),), batch.mel.shape[2], device=batch.mel.device)
    return batch.n_frames.to(batch.mel.device)


def cut_patches(student: SpectrogramTransformer, mel: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut spectrograms into the patches that the student has as tokens: (B,F,T) -> (B, f t, values of a patch)."""
    size, stride = get_patch_shape(student)
    n_frames = (grid[1] - 1) * stride[1] + size[1]
    mel = F.pad(mel, (0, max(0, n_frames - mel.shape[2])))[:, :, :n_frames]
    patches = mel.unfold(1, size[0], stride[0]).unfold(2, size[1], stride[1])  # (B,f,t,bands,frames)
    return patches.flatten(3).flatten(1, 2)


def average_tokens(values: Tensor, is_target: Tensor) -> Tensor:
    """Average over each clip's targets, then over clips: (B,M), (B,M) -> scalar; a clip without targets counts as 0."""
    return ((values * is_target).sum(1) / is_target.sum(1).clamp(min=1)).mean()
