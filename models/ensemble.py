"""Several taggers that vote with their probabilities.

Letters: B batch, S samples, C classes.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.base import AudioTagger


class Ensemble(nn.Module):
    """Averages the probabilities of its members, each with its own front-end and sample rate.

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
        self.name = "_".join(member.name for member in members)
        self.labels = list(first.labels)
        self.num_classes = first.num_classes

    @property
    def sample_rates(self) -> list[int]:
        """Ascending sample rates in hertz that its members take."""
        return sorted({member.sample_rate for member in self.taggers})

    @property
    def taggers(self) -> list[AudioTagger]:
        """Its members."""
        return [cast(AudioTagger, member) for member in self.members]

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
