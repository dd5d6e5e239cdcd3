"""Token merging (ToMe): every block merges the most similar tokens, between attention and MLP.

Method: Bolya et al., "Token merging: Your ViT but faster", ICLR 2023. Tokens at even positions (A) are matched with
those at odd positions (B) by the cosine similarity of their keys, averaged over heads; the r tokens of A with the most
similar partner are merged into it. A token of size s (that represents s tokens) has weight s in the mean and, by log s
added to its scores, in attention (proportional attention). Without proportional attention no bias is needed, so that
batches without padding run the fused kernels that take none.

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
    """Split a token merging setting into the schedule and the kind of attention.

    Args:
        setting: a schedule, see `merging_schedule`, or {"r": schedule, "proportional": bool, by default true}.

    Returns:
        The schedule, and whether attention is proportional.

    Raises:
        UserError: other keys, or `proportional` is neither true nor false.
    """
    if not isinstance(setting, Mapping):
        return setting, True
    keys = ("r", "proportional")
    unknown = [str(key) for key in setting if key not in keys]
    if unknown or "r" not in setting:
        hint = did_you_mean(unknown[0], keys) if unknown else ""
        raise UserError(
            f"token_merging is {dict(setting)!r}{hint}; expected r, or {{r: 8, proportional: false}} for attention in "
            "which all tokens have the same weight"
        )
    proportional = setting.get("proportional", True)
    if isinstance(proportional, str):  # from a command line
        proportional = {"true": True, "false": False}.get(proportional.lower(), proportional)
    if not isinstance(proportional, bool):
        raise UserError(f"token_merging.proportional is {proportional!r}; expected true or false")
    return setting["r"], proportional


def merging_schedule(setting: Schedule, depth: int) -> tuple[int, ...]:
    """Compute the number of tokens that each block merges.

    Args:
        setting: None or 0 for none; r, the same in all blocks; [r, inflect], on average r, falling to 0 in the last
            block for inflect -1, rising from 0 for 1, constant for 0; or one number for each block.
        depth: number of blocks.

    Raises:
        UserError: an invalid setting.
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
        f"token_merging is {setting!r}; expected the tokens to merge in each block: one whole number, [r, inflect] "
        f"with inflect from -1 to 1, or {depth} whole numbers"
    )


class TokenGroups:
    """The groups of merged tokens of a batch on its way through the blocks.

    The groups of a clip depend on its valid tokens only: padding is sorted behind them and ignored. On CUDA the tokens
    of a group are added in any order, so the last bits may differ between runs.

    Args:
        valid: (B,N) tokens that are not padding, None for all.
        n_protected: number of first tokens that are not merged, at most 2 (class and distillation token).
        proportional: whether attention is proportional to the size of tokens.

    Attributes:
        size: (B,N') number of original tokens in each token, 0 for padding; None before the first merging.
        place: (B,N) index of the token that contains each original token; None before the first merging.
    """

    def __init__(self, valid: Tensor | None = None, n_protected: int = 0, proportional: bool = True) -> None:
        self.valid, self.n_protected, self.proportional = valid, n_protected, proportional
        self.size: Tensor | None = None
        self.place: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """Bias or bool mask of attention scores, (B,1,1,N'); None where all tokens have the same weight."""
        if self.size is not None and self.proportional:
            return self.size.log()[:, None, None]
        if self.valid is None:
            return None
        return (self.valid if self.size is None else self.size > 0)[:, None, None]

    def merge(self, x: Tensor, keys: Tensor, amount: int) -> Tensor:
        """Merge the most similar tokens.

        Args:
            x: tokens (B,N',D) after attention.
            keys: of that attention, (B,H,N',d).
            amount: r, number of tokens to merge; at most half of the unprotected tokens of each clip.

        Returns:
            (B,N'-r,D) with the r of the longest clip: protected tokens first, padding after a clip's tokens; `x` itself
            where nothing is merged.
        """
        n_tokens = x.shape[1]
        most = min(amount, (n_tokens - self.n_protected) // 2)
        if most <= 0:
            return x
        n_remaining = n_tokens - most
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            # (B,N',d); the sum over heads has the same cosines as the mean, and `reduce` is faster than `sum(1)`
            metric = reduce(torch.add, keys.float().unbind(1))
            if self.valid is not None and self.size is None:  # padding last, for the positions of the clip alone
                order = (~self.valid).int().argsort(dim=1, stable=True)
                self.size, self.place = self.valid.gather(1, order).float(), order.argsort(1)
                metric, x = take_tokens(metric, order), take_tokens(x, order)
            source, is_merged, place = self._match_tokens(metric, most)
            size = x.new_ones(x.shape[:2], dtype=torch.float32) if self.size is None else self.size
            remaining, merged = source[:, :n_remaining], source[:, n_remaining:]  # (B,N'-r), (B,r)
            target = place.gather(1, merged)
            weight = size.gather(1, merged) * is_merged.gather(1, merged)  # 0 for padding, which is not merged
            self.size = size.gather(1, remaining).scatter_add(1, target, weight)
            share = weight / self.size.gather(1, target).clamp(min=1)
            self.place = place if self.place is None else place.gather(1, self.place)
        # The mean weighted by size, y + (x - y) * share of x: tokens without merged ones keep their exact values.
        kept = take_tokens(x, remaining)
        change = (take_tokens(x, merged) - take_tokens(kept, target)) * share[..., None].to(x.dtype)
        kept.flatten(0, 1).index_add_(0, _flatten_places(target, n_remaining), change.flatten(0, 1))
        return kept

    def spread(self, x: Tensor) -> Tensor:
        """Copy merged tokens to the positions of all original tokens: (B,N',D) -> (B,N,D).

        The mean of the result is the mean of the groups weighted by size.
        """
        return x if self.place is None else take_tokens(x, self.place)

    def _match_tokens(self, metric: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Match the tokens of A and B by cosine similarity.

        Args:
            metric: (B,N',d), not normalised.
            most: number of tokens that the longest clip merges.

        Returns:
            The tokens in the order of their new positions, merged ones last; which tokens are merged into others; and
            the new position of each; all (B,N').
        """
        n_tokens, n_protected, device = metric.shape[1], self.n_protected, metric.device
        a, b = metric[:, ::2], metric.narrow(1, 1, n_tokens - 1)[:, ::2]
        n_a, n_b = a.shape[1], b.shape[1]
        scores = a @ F.normalize(b, dim=-1).transpose(1, 2)  # (B,A,B)
        valid = None if self.valid is None or self.size is None else self.size > 0
        r: Tensor | int = most
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, 1::2], -math.inf)
            r = ((valid.sum(1, keepdim=True) - n_protected) // 2).clamp(0, most)  # (B,1)
        if n_protected > 1:
            scores = scores.masked_fill(torch.arange(n_b, device=device) < 1, -math.inf)
        best, partner = scores.max(2)  # (B,A)
        best = best / a.norm(dim=-1).clamp(min=1e-12)
        if n_protected > 0:
            best = best.masked_fill(torch.arange(n_a, device=device) < 1, -math.inf)
        if valid is not None:
            best = best.masked_fill(~valid[:, ::2], -math.inf)
        is_merged = best.argsort(dim=1, descending=True, stable=True).argsort(1) < r  # (B,A)

        # New order: protected tokens, the remaining ones of A, then those of B.
        n_kept = n_a - r if valid is None else valid[:, ::2].sum(1, keepdim=True) - r
        place_a = (~is_merged).long().cumsum(1) - 1
        place_b = (torch.arange(n_b, device=device) + n_kept).expand(metric.shape[0], -1)
        if n_protected > 1:
            place_a = place_a + (torch.arange(n_a, device=device) > 0).long()
            place_b = place_b.masked_fill(torch.arange(n_b, device=device) < 1, 1)
        place_a = torch.where(is_merged, place_b.gather(1, partner), place_a)
        place = _interleave(place_a, place_b)
        is_merged = _interleave(is_merged.long(), torch.zeros_like(place_b))
        sort_key = place + 2 * n_tokens * is_merged
        if valid is not None:  # padding has size 0, so its position does not matter
            sort_key, place = sort_key + n_tokens * (~valid).long(), place.clamp(max=n_tokens - most - 1)
        return sort_key.argsort(dim=1, stable=True), is_merged, place


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """Interleave columns: (B,A), (B,B) -> (B,A+B), where A is B or B + 1."""
    n_a, n_b = a.shape[1], b.shape[1]
    return torch.stack([a, F.pad(b, (0, n_a - n_b))], 2).flatten(1)[:, : n_a + n_b]


def _flatten_places(place: Tensor, n_tokens: int) -> Tensor:
    """Convert indices into each clip of `n_tokens` (B,M) to indices into the flattened batch (BM,)."""
    return (place + torch.arange(place.shape[0], device=place.device)[:, None] * n_tokens).flatten()


def take_tokens(x: Tensor, place: Tensor) -> Tensor:
    """Select tokens by index: (B,N,D), (B,M) -> (B,M,D)."""
    # On the flattened batch, which is many times faster than `gather`.
    return x.flatten(0, 1).index_select(0, _flatten_places(place, x.shape[1])).unflatten(0, place.shape)
