"""One tagger or several whose probabilities are averaged: a teacher, or a better tagger than each of them.

Letters: B batch, S samples, F mel bands, T frames, C classes, E embedding width.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger, Encoded
from models.frontends import FrontEnd
from models.headed import HeadedTagger
from models.loading import weights_hash

# From a front-end and a batch of any type to spectrograms (B,F,T), and the frames of each clip (B,) or None.
Spectrogram = Callable[[FrontEnd, Any], tuple[Tensor, Tensor | None]]


class Ensemble(nn.Module):
    """Averages the probabilities of its members, each with its own front-end and sample rate.

    Members are frozen and stay in evaluation mode.

    Args:
        members: at least one tagger; all have the same classes in the same order.

    Raises:
        UserError: there are no members, or their labels differ.
    """

    outputs = "probabilities"

    def __init__(self, members: Sequence[AudioTagger]) -> None:
        super().__init__()
        if not members:
            raise UserError("an ensemble needs at least one member")
        first = members[0]
        for member in members[1:]:
            if member.labels != first.labels:
                where = next(
                    (i for i, pair in enumerate(zip_longest(first.labels, member.labels)) if len(set(pair)) > 1), 0
                )
                raise UserError(
                    f"members of an ensemble need the same labels: {first.name!r} has {len(first.labels)}, "
                    f"{member.name!r} has {len(member.labels)}, and they part at class {where}"
                )
        self.members = nn.ModuleList(members)
        self.eval().requires_grad_(False)
        self.labels, self.num_classes = list(first.labels), first.num_classes

    def train(self, mode: bool = True) -> "Ensemble":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def taggers(self) -> list[AudioTagger]:
        """Its members."""
        return [cast(AudioTagger, member) for member in self.members]

    @property
    def name(self) -> str:
        """The members' names, with those of their heads, joined by `_`."""
        return "_".join(member.full_name for member in self.taggers)

    @property
    def sample_rates(self) -> list[int]:
        """Ascending sample rates in hertz that its members take."""
        return sorted({member.sample_rate for member in self.taggers})

    @property
    def activations(self) -> set[str]:
        """What turns the members' logits into probabilities: "sigmoid", "softmax", or both."""
        return {member.activation for member in self.taggers}

    def check_classes(self) -> None:
        """See that there are classes.

        Raises:
            UserError: a model that only embeds.
        """
        if not self.labels:
            raise UserError(
                f"{self.name} embeds and has no classes: take its embeddings (targets: embeddings, objective: cosine)"
            )

    @property
    def single(self) -> AudioTagger:
        """The one member, where what is wanted cannot be averaged.

        Raises:
            UserError: there are several.
        """
        if len(self.members) > 1:
            raise UserError(f"{len(self.members)} models are given, but embeddings are taken from one: name it")
        return self.taggers[0]

    def describe(self) -> list[dict[str, Any]]:
        """Return what decides its output, as plain values: model, arguments, weights and head of each member."""
        return [_describe(member) for member in self.taggers]

    def fingerprint(self) -> str:
        """Return the SHA-256 of its description."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @torch.no_grad()  # not inference mode, whose tensors a loss could not be computed from
    def probabilities(self, batch: Any, spectrogram: Spectrogram) -> Tensor:
        """Return the mean of the members' probabilities (B,C), float32.

        Args:
            batch: what `spectrogram` takes.
            spectrogram: the input of each member, through its own front-end: `distill.replay.Replay.spectrogram` masks
                the same seconds and hertz for all of them.
        """
        found = []
        for member in self.taggers:
            output = member.forward_spectrogram(*spectrogram(member.front_end, batch))
            found.append(member.probabilities(output).float())
        return sum(found[1:], found[0]) / len(found)

    @torch.no_grad()
    def embeddings(self, batch: Any, spectrogram: Spectrogram) -> Tensor:
        """Return the embeddings of the clips (B,E), float32; arguments as in `probabilities`.

        Raises:
            UserError: there are several members, whose embeddings have nothing in common.
        """
        return self.single.embed_clips(*spectrogram(self.single.front_end, batch)).float()

    @torch.no_grad()
    def encode(self, batch: Any, spectrogram: Spectrogram, layers: Sequence[int] = ()) -> Encoded:
        """Return what the one member computes, with the outputs of some of its layers; see `AudioTagger.encode`.

        Raises:
            UserError: there are several members, or no such layer.
        """
        return self.single.encode(*spectrogram(self.single.front_end, batch), layers=layers)

    def forward(self, waveforms: Mapping[int, Tensor], lengths: Mapping[int, Tensor] | None = None) -> Tensor:
        """The same as `predict`."""
        return self.predict(waveforms, lengths)

    def predict(self, waveforms: Any, lengths: Any = None) -> Tensor:
        """Probabilities of the same clips, given at every sample rate of the members.

        Args:
            waveforms: sample rate in hertz -> what `AudioTagger.predict` takes; where all members have one rate, the
                clips alone will do.
            lengths: sample rate in hertz -> (B,) samples of each clip, None where all belong to it; likewise.

        Returns:
            (B,C).

        Raises:
            UserError: a sample rate is missing, or see `AudioTagger.predict`.
        """
        if not isinstance(waveforms, Mapping) and len(self.sample_rates) == 1:
            (rate,) = self.sample_rates
            waveforms, lengths = {rate: waveforms}, None if lengths is None else {rate: lengths}
        if not all(isinstance(given, Mapping | None) for given in (waveforms, lengths)):
            raise UserError(
                f"members of this ensemble take {self.sample_rates} Hz: give a dictionary from sample rate to "
                "waveform (and from sample rate to lengths)"
            )
        for what, given in (("waveforms", waveforms), ("lengths", lengths)):
            missing = [rate for rate in self.sample_rates if given is not None and rate not in given]
            if missing:
                raise UserError(f"the ensemble needs {what} at {self.sample_rates} Hz; {missing} are not given")
        votes = []
        for member in self.taggers:
            rate = member.sample_rate
            votes.append(member.predict(waveforms[rate], None if lengths is None else lengths[rate]))
        return torch.stack(votes).mean(0)

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: widths and meaning of members' embeddings differ.

        Raises:
            UserError: always.
        """
        raise UserError("an ensemble has no embedding: embed with one of its members, `ensemble.members[0].embed(...)`")


def _describe(member: AudioTagger) -> dict[str, Any]:
    if not isinstance(member, HeadedTagger):
        return {"model": member.name, "arguments": member.arguments, "sha256": weights_hash(member)}
    head = {"name": member.head.facts.get("name"), "sha256": weights_hash(member.head)}
    return _describe(member.model) | {"head": head | {"labels": member.labels, "activation": member.activation}}
