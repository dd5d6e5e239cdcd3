"""Loading a teacher: one tagger, or several, whose probabilities are averaged or whose embeddings are side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.errors import UserError
from models import Ensemble, load_tagger


def load_teacher(
    models: str | Sequence[str],
    weights: str | Sequence[str | None] | None = None,
    arguments: Mapping[str, Any] | None = None,
    heads: str | Sequence[str | None] | None = None,
    *,
    same_labels: bool = True,
) -> Ensemble:
    """Load the models of a teacher; draws nothing from the global random state.

    Args:
        models: names, checkpoints or runs' folders, see `models.load_model`.
        weights: for each model, in order; None for a checkpoint, or published weights.
        arguments: for all models, in place of those of their checkpoints.
        heads: for each model, in order, see `models.heads.load_tagger`; None for its own classes.
        same_labels: see `Ensemble`.

    Raises:
        UserError: a model or head cannot be loaded; the number of weights or heads is not that of models; the labels
            of the models differ.
    """
    names = [models] if isinstance(models, str) else list(models)
    files: Sequence[str | None] = [weights] if isinstance(weights, str) else weights or [None] * len(names)
    if len(files) != len(names):
        raise UserError(
            f"found {len(files)} weights for {len(names)} models; give one file a model, in order, null for none"
        )
    head_names: Sequence[str | None] = [heads] if isinstance(heads, str) else heads or [None] * len(names)
    if len(head_names) != len(names):
        raise UserError(
            f"number of heads: {len(head_names)}, of models: {len(names)}; give a list with a head for each model, in "
            "order, null for the model's own classes"
        )
    with torch.random.fork_rng(devices=[]):
        members = [
            load_tagger(name, weights=file, head=head, **arguments or {})
            for name, file, head in zip(names, files, head_names, strict=True)
        ]
    return Ensemble(members, same_labels=same_labels)
