"""Ensembles: the mean probabilities of one or several taggers, or their embeddings side by side.

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

# Computes the input of a member: (front-end, batch) -> spectrograms (B,F,T), frames of each clip (B,) or None.
ComputeSpectrogram = Callable[[FrontEnd, Any], tuple[Tensor, Tensor | None]]


class Ensemble(nn.Module):
    """Averages the probabilities of its members, each with its own front-end and sample rate.

    Members are frozen and stay in evaluation mode.

    Args:
        members: at least one tagger; all with the same classes in the same order.
        same_labels: false for members of any classes, which give embeddings alone; the ensemble then has no labels,
            unless there is one member.

    Raises:
        UserError: no members, or different labels.
    """

    outputs = "probabilities"

    def __init__(self, members: Sequence[AudioTagger], *, same_labels: bool = True) -> None:
        super().__init__()
        if not members:
            raise UserError("an ensemble needs at least one member")
        first = members[0]
        for member in members[1:] if same_labels else ():
            if member.labels != first.labels:
                where = next(
                    (i for i, pair in enumerate(zip_longest(first.labels, member.labels)) if len(set(pair)) > 1), 0
                )
                raise UserError(
                    f"members of an ensemble need the same labels: {first.name!r} has {len(first.labels)}, "
                    f"{member.name!r} has {len(member.labels)}, and they differ from class {where} on"
                )
        self.members = nn.ModuleList(members)
        self.eval().requires_grad_(False)
        self.labels = list(first.labels) if same_labels or len(members) == 1 else []
        self.num_classes = len(self.labels)

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
        """Sample rates of the members in hertz, ascending."""
        return sorted({member.sample_rate for member in self.taggers})

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Widths of the members' embeddings."""
        return tuple(member.embed_dim for member in self.taggers)

    @property
    def activations(self) -> set[str]:
        """Activations of the members: "sigmoid", "softmax", or both."""
        return {member.activation for member in self.taggers}

    def check_classes(self) -> None:
        """Check that there are classes.

        Raises:
            UserError: a model that only embeds.
        """
        if not self.labels:
            raise UserError(
                f"{self.name} only embeds and has no classes: use its embeddings (targets: embeddings, "
                "objective: cosine)"
            )

    @property
    def single(self) -> AudioTagger:
        """The only member, for stores of embeddings and for layers, which cannot be averaged.

        Raises:
            UserError: there are several.
        """
        if len(self.members) > 1:
            raise UserError(
                f"{len(self.members)} models are given, but stored embeddings, and layers, are those of a single one: "
                "give one (of several teachers, each has a store of its own: embeddingspath: [A, B])"
            )
        return self.taggers[0]

    def describe(self) -> list[dict[str, Any]]:
        """Return everything that determines the output, as plain values: model, arguments, weights and head of each."""
        return [_describe(member) for member in self.taggers]

    def fingerprint(self) -> str:
        """Return the SHA-256 of its description."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @torch.no_grad()  # not inference mode, whose tensors a loss could not be computed from
    def probabilities(self, batch: Any, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return the mean of the members' probabilities (B,C), float32.

        Args:
            batch: argument of `spectrogram`.
            spectrogram: computes the input of each member with its own front-end: `distill.replay.Replay.spectrogram`
                masks the same seconds and hertz for all of them.
        """
        votes = []
        for member in self.taggers:
            output = member.forward_spectrogram(*spectrogram(member.front_end, batch))
            votes.append(member.probabilities(output).float())
        return sum(votes[1:], votes[0]) / len(votes)

    @torch.no_grad()
    def embeddings(self, batch: Any, spectrogram: ComputeSpectrogram) -> Tensor:
        """Return the members' embeddings of the clips side by side, float32 (B, sum of `embed_dims`).

        Arguments as in `probabilities`.
        """
        each = [member.embed_clips(*spectrogram(member.front_end, batch)).float() for member in self.taggers]
        return torch.cat(each, dim=1)

    @torch.no_grad()
    def encode(self, batch: Any, spectrogram: ComputeSpectrogram, layers: Sequence[int] = ()) -> Encoded:
        """Encode a batch with the only member and return some of its layers as well; see `AudioTagger.encode`.

        Raises:
            UserError: several members, an unknown layer, or clips of several lengths where the member does not mask
                padding.
        """
        return self.single.encode(*spectrogram(self.single.front_end, batch), layers=layers)

    def forward(self, waveforms: Mapping[int, Tensor], lengths: Mapping[int, Tensor] | None = None) -> Tensor:
        """Call `predict`."""
        return self.predict(waveforms, lengths)

    def predict(self, waveforms: Any, lengths: Any = None) -> Tensor:
        """Return probabilities of clips that are given at every sample rate of the members.

        Args:
            waveforms: sample rate in hertz -> waveforms as in `AudioTagger.predict`; the waveforms alone where all
                members have the same rate.
            lengths: sample rate in hertz -> (B,) samples of each clip, None for all; likewise.

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
                raise UserError(f"the ensemble needs {what} at {self.sample_rates} Hz; {missing} are missing")
        votes = []
        for member in self.taggers:
            rate = member.sample_rate
            votes.append(member.predict(waveforms[rate], None if lengths is None else lengths[rate]))
        return torch.stack(votes).mean(0)

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error: embeddings of different members cannot be averaged.

        Raises:
            UserError: always.
        """
        raise UserError("an ensemble has no embedding: embed with one of its members, `ensemble.members[0].embed(...)`")


def _describe(member: AudioTagger) -> dict[str, Any]:
    if not isinstance(member, HeadedTagger):
        return {"model": member.name, "arguments": member.arguments, "sha256": weights_hash(member)}
    head = {"name": member.head.facts.get("name"), "sha256": weights_hash(member.head)}
    return _describe(member.model) | {"head": head | {"labels": member.labels, "activation": member.activation}}
