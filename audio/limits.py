"""Limits of what a sound file may demand: they refuse damaged or hostile files, not sound."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from common.errors import UserError, did_you_mean


@dataclass(frozen=True)
class SoundLimits:
    """Limits of sound files; a file beyond one is refused with a sentence that names it.

    The length of a sound that is tagged has no limit, since it is decoded block by block. Commands raise limits with
    `--limits '{clip_mb: 4096, stall_seconds: 300}'`.

    Attributes:
        lowest_rate: in Hz. Resampling multiplies the samples of lower rates by hundreds.
        highest_rate: in Hz; ultrasound is recorded at up to some MHz.
        channels: of one file.
        clip_mb: 10^6 bytes of one packed clip (16-bit samples at the rate of the pack), which are held in memory:
            8.7 hours at 16 kHz.
        decoder_mb: 10^6 bytes of address space of a process that decodes. One block of a sound takes some MB, its
            decoder and the index of its container some hundred.
        stall_seconds: for which a file may yield no sound before its decoder is stopped. Large files, which may be
            searched first, get a second more for every 2 MB before their first sound.
    """

    lowest_rate: float = 100
    highest_rate: float = 4_000_000
    channels: float = 1024
    clip_mb: float = 1000
    decoder_mb: float = 2000
    stall_seconds: float = 60

    def __post_init__(self) -> None:
        for name in LIMITS:
            if not getattr(self, name) > 0:
                raise UserError(f"limits: {name} is {getattr(self, name)}; expected a number above 0")

    @property
    def clip_samples(self) -> float:
        """Samples of all channels of one packed clip."""
        return self.clip_mb * 1e6 / 2

    @classmethod
    def from_mapping(cls, given: Mapping[str, float]) -> "SoundLimits":
        """Return the default limits with those of a mapping in their place.

        Raises:
            UserError: an unknown name, or a value that is not above 0.
        """
        for name in given:
            if name not in LIMITS:
                hint = did_you_mean(name, LIMITS)
                raise UserError(f"limits: there is none named {name!r}{hint}; they are {', '.join(LIMITS)}")
        return cls(**given)


LIMITS = tuple(field.name for field in fields(SoundLimits))
DEFAULT_LIMITS = SoundLimits()
