"""A teacher: one tagger or several that vote, asked and never changed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from distill.batch import Batch
from models import AudioTagger, Ensemble, load_tagger
from models.frontends import FrontEnd
from models.headed import HeadedTagger
from models.loading import weights_hash

# What a front-end makes of a batch: the spectrograms (B, F, T), and the frames of each clip (B,) or None.
Hearing = Callable[[FrontEnd, Batch], tuple[Tensor, Tensor | None]]


class Teacher:
    """Taggers that answer together, in evaluation mode and without gradients.

    Not a module: it is no part of what is trained, averaged, saved or shared between processes.

    Args:
        members: one tagger or more, with the same labels. They are frozen.

    Raises:
        UserError: there are no members, or their labels differ.
    """

    def __init__(self, members: Sequence[AudioTagger]) -> None:
        Ensemble(members)  # checks that they agree on their classes
        self.members = [member.eval().requires_grad_(False) for member in members]
        self.labels = self.members[0].labels

    @property
    def name(self) -> str:
        """The members' names, with those of their heads, joined by `_`."""
        return "_".join(member.full_name for member in self.members)

    @property
    def sample_rates(self) -> list[int]:
        """Ascending rates in hertz at which a batch must hold waveforms."""
        return sorted({member.sample_rate for member in self.members})

    @property
    def activations(self) -> set[str]:
        """What turns the members' logits into probabilities: "sigmoid", "softmax", or both."""
        return {member.activation for member in self.members}

    def check_classes(self) -> None:
        """See that there are classes to ask for.

        Raises:
            UserError: a model that only embeds.
        """
        if not self.labels:
            raise UserError(
                f"{self.name} embeds and has no classes: ask it for embeddings (targets: embeddings, objective: cosine)"
            )

    def to(self, device: torch.device) -> "Teacher":
        """Move the members to a device; return the teacher."""
        for member in self.members:
            member.to(device)
        return self

    def describe(self) -> list[dict[str, Any]]:
        """Return what decides its answers, as plain values: model, arguments, weights and head of each member."""
        return [_describe(member) for member in self.members]

    def fingerprint(self) -> str:
        """Return the SHA-256 of its description."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @torch.no_grad()  # not inference mode, whose tensors a loss could not be computed from
    def probabilities(self, batch: Batch, hear: Hearing) -> Tensor:
        """Return the mean of the members' probabilities (B, C), float32.

        Args:
            batch: on the members' device, with waveforms at their rates.
            hear: what each member hears of it, through its own front-end: `distill.replay.Replay.spectrogram` masks
                the same seconds and hertz for all of them.
        """
        answers = []
        for member in self.members:
            answers.append(member.probabilities(member.forward_spectrogram(*hear(member.front_end, batch))).float())
        return sum(answers[1:], answers[0]) / len(answers)

    @torch.no_grad()
    def embeddings(self, batch: Batch, hear: Hearing) -> Tensor:
        """Return the embeddings of the clips (B, E), float32; arguments as in `probabilities`.

        Raises:
            UserError: there are several members, whose embeddings have nothing in common.
        """
        self.embed_dim  # noqa: B018 - tells that several cannot be asked
        member = self.members[0]
        return member.embed_spectrogram(*hear(member.front_end, batch))[0].float()

    @property
    def embed_dim(self) -> int:
        """E of the one member.

        Raises:
            UserError: there are several.
        """
        if len(self.members) > 1:
            raise UserError(f"{len(self.members)} models are given, but embeddings are taken from one: name it")
        return self.members[0].embed_dim


def _describe(member: AudioTagger) -> dict[str, Any]:
    if not isinstance(member, HeadedTagger):
        return {"model": member.name, "arguments": member.arguments, "sha256": weights_hash(member)}
    head = {"name": member.head.facts.get("name"), "sha256": weights_hash(member.head)}
    return _describe(member.model) | {"head": head | {"labels": member.labels, "activation": member.activation}}


def load_teacher(
    models: str | Sequence[str],
    weights: str | Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    heads: str | Sequence[str | None] | None = None,
) -> Teacher:
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
    return Teacher(members)
