"""A teacher: one tagger or several whose probabilities are averaged, by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.errors import UserError
from models import Ensemble, load_tagger


def load_teacher(
    models: str | Sequence[str],
    weights: str | Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    heads: str | Sequence[str | None] | None = None,
) -> Ensemble:
    """Load the member or members of a teacher; draws nothing from the global random state.

    Args:
        models: names, checkpoints or runs' folders, see `models.load_model`.
        weights: for each of them, in order, where they do not bring their own.
        arguments: for all of them, in place of those of their checkpoints.
        heads: for each of them, in order, see `models.heads.load_tagger`; None for one that tags by itself.

    Raises:
        UserError: a model or head that cannot be had; another number of weights or heads than models; labels that
            differ.
    """
    names = [models] if isinstance(models, str) else list(models)
    given: Sequence[str | None] = [weights] if isinstance(weights, str) else weights or [None] * len(names)
    if len(given) != len(names):
        raise UserError(f"{len(names)} models and {len(given)} weights are given; give one file a model, in order")
    on_top: Sequence[str | None] = [heads] if isinstance(heads, str) else heads or [None] * len(names)
    if len(on_top) != len(names):
        found = "one head is" if len(on_top) == 1 else f"{len(on_top)} heads are"
        raise UserError(
            f"{len(names)} model{'s' * (len(names) > 1)} and {found} given; give a list with a head for each model, in "
            "order, null for one that tags by itself"
        )
    with torch.random.fork_rng(devices=[]):
        members = [
            load_tagger(name, weights=own, head=head, **arguments or {})
            for name, own, head in zip(names, given, on_top, strict=True)
        ]
    return Ensemble(members)
