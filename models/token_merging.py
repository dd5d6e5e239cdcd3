"""Token merging (ToMe): in every block the most alike tokens become one, between attention and MLP.

Method: Bolya et al., "Token merging: Your ViT but faster", ICLR 2023. Tokens at even places (A) and at odd ones (B) are
matched by the cosine of their keys, averaged over heads; the r of A that are nearest to one of B join it. A token that
stands for s others counts s times: in the mean that joins it with more, and, by log s on its scores, in attention
(proportional attention). The latter can be switched off: then attention needs no bias, and where a batch has no padding
runs the fused kernels that take none.

Letters: B batch, N tokens, D width, H heads, d width of a head.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError, did_you_mean

Schedule = int | Sequence[float] | None
MergingSetting = Schedule | Mapping[str, Any]


def split_setting(setting: MergingSetting) -> tuple[Schedule, bool]:
    """Split a setting of token merging into how much and how.

    Args:
        setting: what `merging_schedule` takes, or {"r": that, "proportional": whether a token that stands for s others
            counts s times in attention}; by default it does.

    Returns:
        The schedule as it was given, and whether attention is proportional.

    Raises:
        UserError: it has other keys, or `proportional` is neither true nor false.
    """
    if not isinstance(setting, Mapping):
        return setting, True
    keys = ("r", "proportional")
    unknown = [str(key) for key in setting if key not in keys]
    if unknown or "r" not in setting:
        hint = did_you_mean(unknown[0], keys) if unknown else ""
        raise UserError(
            f"token_merging is {dict(setting)!r}{hint}; wanted r, or {{r: 8, proportional: false}} for attention in "
            "which every token counts the same"
        )
    proportional = setting.get("proportional", True)
    if isinstance(proportional, str):  # as command lines have it
        proportional = {"true": True, "false": False}.get(proportional.lower(), proportional)
    if not isinstance(proportional, bool):
        raise UserError(f"token_merging.proportional is {proportional!r}; wanted true or false")
    return setting["r"], proportional


def merging_schedule(setting: Schedule, depth: int) -> tuple[int, ...]:
    """How many tokens each block merges away.

    Args:
        setting: None or 0 for none; r, the same in all blocks; [r, inflect], on average r, falling to 0 in the last
            block for inflect -1, rising from 0 for 1, even for 0; or one number for each block.
        depth: number of blocks.

    Raises:
        UserError: it is none of these.
    """
    given = [setting] if isinstance(setting, (int, float)) else list(setting or [0])
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in given)
    whole = [int(x) for x in given] if numbers else []
    if numbers and whole == given and min(whole) >= 0 and len(given) in (1, depth):
        return tuple(whole * depth if len(whole) == 1 else whole)
    if numbers and len(given) == 2 and given[0] == whole[0] >= 0 and -1 <= given[1] <= 1:
        first = int(given[0] * (1 - given[1]))
        step = (2 * whole[0] - 2 * first) / max(depth - 1, 1)
        return tuple(int(first + step * index) for index in range(depth))
    raise UserError(
        f"token_merging is {setting!r}; wanted the tokens to merge in each block as one whole number, as [r, inflect] "
        f"with inflect from -1 to 1, or as {depth} whole numbers, one for each block"
    )


class TokenGroups:
    """The tokens of a batch on their way through the blocks, and what each of them stands for.

    A clip's groups depend on its own tokens alone: padding is sorted behind them and counts for nothing. On CUDA what
    joins one token is added in any order, so that the last bits may differ from run to run.

    Args:
        own: (B,N) tokens that count, None where all do.
        n_protected: first tokens that neither join nor are joined, at most 2 (class and distillation token).
        proportional: whether a token that stands for s others counts s times in attention.

    Attributes:
        size: (B,N') how many of the first tokens each one stands for, 0 for padding; None before the first merging.
        place: (B,N) which token each of the first tokens is part of now; None before the first merging.
    """

    def __init__(self, own: Tensor | None = None, n_protected: int = 0, proportional: bool = True) -> None:
        self.own, self.n_protected, self.proportional = own, n_protected, proportional
        self.size: Tensor | None = None
        self.place: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """What attention adds to its scores, or which keys take part, (B,1,1,N'); None where all count the same."""
        if self.size is not None and self.proportional:
            return self.size.log()[:, None, None]
        if self.own is None:
            return None
        return (self.own if self.size is None else self.size > 0)[:, None, None]

    def merge(self, x: Tensor, keys: Tensor, amount: int) -> Tensor:
        """Merge the most alike tokens.

        Args:
            x: tokens (B,N',D) after attention.
            keys: of that attention, (B,H,N',d).
            amount: r, how many tokens to merge away; of each clip at most half of those that are not protected.

        Returns:
            (B,N'-r,D) with the r of the longest clip: protected tokens first, padding behind a clip's own; `x` itself
            where nothing is merged.
        """
        n_tokens = x.shape[1]
        most = min(amount, (n_tokens - self.n_protected) // 2)
        if most <= 0:
            return x
        n_left = n_tokens - most
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            metric = reduce(torch.add, keys.float().unbind(1))  # (B,N',d); cosines need no mean, and this is fastest
            if self.own is not None and self.size is None:  # the tokens of each clip in front, as if it were alone
                order = (~self.own).int().argsort(dim=1, stable=True)
                self.size, self.place = self.own.gather(1, order).float(), order.argsort(1)
                metric, x = take_tokens(metric, order), take_tokens(x, order)
            source, joins, place = self._matched(metric, most)
            size = x.new_ones(x.shape[:2], dtype=torch.float32) if self.size is None else self.size
            left, joining = source[:, :n_left], source[:, n_left:]  # (B,N'-r), (B,r)
            target = place.gather(1, joining)
            weight = size.gather(1, joining) * joins.gather(1, joining)  # 0 for padding that joins nothing
            self.size = size.gather(1, left).scatter_add(1, target, weight)
            share = weight / self.size.gather(1, target).clamp(min=1)
            self.place = place if self.place is None else place.gather(1, self.place)
        # The mean by size, without touching tokens that stay what they are: y + (x - y) * share of x.
        kept = take_tokens(x, left)
        change = (take_tokens(x, joining) - take_tokens(kept, target)) * share[..., None].to(x.dtype)
        kept.flatten(0, 1).index_add_(0, _flat(target, n_left), change.flatten(0, 1))
        return kept

    def spread(self, x: Tensor) -> Tensor:
        """Give each of the first tokens what the one it is part of has: (B,N',D) -> (B,N,D).

        A mean over them is the mean over groups by their size.
        """
        return x if self.place is None else take_tokens(x, self.place)

    def _matched(self, metric: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Match A and B.

        Args:
            metric: (B,N',d), of any length: angles decide.
            most: how many tokens the longest clip merges away.

        Returns:
            The tokens in the order of their new places, those that join others behind; which of the tokens join others;
            and the new place of each; all (B,N').
        """
        n_tokens, n_protected, device = metric.shape[1], self.n_protected, metric.device
        a, b = metric[:, ::2], metric.narrow(1, 1, n_tokens - 1)[:, ::2]
        n_a, n_b = a.shape[1], b.shape[1]
        scores = a @ F.normalize(b, dim=-1).transpose(1, 2)  # (B,A,B)
        own = None if self.own is None or self.size is None else self.size > 0
        r: Tensor | int = most
        if own is not None:
            scores = scores.masked_fill(~own[:, None, 1::2], -math.inf)
            r = ((own.sum(1, keepdim=True) - n_protected) // 2).clamp(0, most)  # (B,1)
        if n_protected > 1:
            scores = scores.masked_fill(torch.arange(n_b, device=device) < 1, -math.inf)
        best, partner = scores.max(2)  # (B,A)
        best = best / a.norm(dim=-1).clamp(min=1e-12)
        if n_protected > 0:
            best = best.masked_fill(torch.arange(n_a, device=device) < 1, -math.inf)
        if own is not None:
            best = best.masked_fill(~own[:, ::2], -math.inf)
        joins = best.argsort(dim=1, descending=True, stable=True).argsort(1) < r  # (B,A)

        # What is left of A, then of B, each in its order; the two protected ones before them.
        n_kept = n_a - r if own is None else own[:, ::2].sum(1, keepdim=True) - r
        place_a = (~joins).long().cumsum(1) - 1
        place_b = (torch.arange(n_b, device=device) + n_kept).expand(metric.shape[0], -1)
        if n_protected > 1:
            place_a = place_a + (torch.arange(n_a, device=device) > 0).long()
            place_b = place_b.masked_fill(torch.arange(n_b, device=device) < 1, 1)
        place_a = torch.where(joins, place_b.gather(1, partner), place_a)
        place = _zipped(place_a, place_b)
        joins = _zipped(joins.long(), torch.zeros_like(place_b))
        last = place + 2 * n_tokens * joins
        if own is not None:  # padding has no size, wherever it lies
            last, place = last + n_tokens * (~own).long(), place.clamp(max=n_tokens - most - 1)
        return last.argsort(dim=1, stable=True), joins, place


def _zipped(a: Tensor, b: Tensor) -> Tensor:
    """Take turns: (B,A), (B,B) -> (B,A+B), A as long as B or longer by one."""
    n_a, n_b = a.shape[1], b.shape[1]
    return torch.stack([a, F.pad(b, (0, n_a - n_b))], 2).flatten(1)[:, : n_a + n_b]


def _flat(place: Tensor, n_tokens: int) -> Tensor:
    """Places in clips of `n_tokens`, (B,M), as places in all of them one after the other, (BM,)."""
    return (place + torch.arange(place.shape[0], device=place.device)[:, None] * n_tokens).flatten()


def take_tokens(x: Tensor, place: Tensor) -> Tensor:
    """Take tokens by their places: (B,N,D), (B,M) -> (B,M,D). Flat, which is many times faster than `gather`."""
    return x.flatten(0, 1).index_select(0, _flat(place, x.shape[1])).unflatten(0, place.shape)
