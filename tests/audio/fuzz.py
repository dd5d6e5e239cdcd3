"""Sounds that are damaged at random, and what may become of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from hypothesis import strategies as st

from tests.audio.sound_bytes import encoded, noisy, written

_HERTZ = (300, 400)  # of two seconds
MIN_LOSS = 0.11  # seconds; less may be missing without a warning, since encoders pad


@dataclass(frozen=True)
class Container:
    """A kind of file.

    Attributes:
        make: its bytes.
        checked: its checksums cover every sample, so that no change may go unnoticed.
        n_blind: bytes of its header whose change may go unnoticed: what samples mean is there only once.
        has_lengths: without checksums; a change of samples is unnoticed, a loss is not.
    """

    make: Callable[[], bytes]
    checked: bool = False
    n_blind: int = 0
    has_lengths: bool = True

    @property
    def data(self) -> bytes:
        """Its bytes, made once."""
        return _make(self)


@cache
def _make(container: Container) -> bytes:
    return container.make()


def _written(format: str, subtype: str | None = None, rate: int = 16000) -> Callable[[], bytes]:
    return lambda: written(format, subtype, sound=noisy(_HERTZ, rate), rate=rate)


CONTAINERS = {
    "16.wav": Container(_written("WAV"), n_blind=44),
    "float.wav": Container(_written("WAV", "FLOAT"), n_blind=80),
    "24.wav": Container(_written("WAVEX", "PCM_24"), n_blind=80),
    "x.w64": Container(_written("W64"), n_blind=128),
    "x.rf64": Container(_written("RF64"), n_blind=104),
    "x.aiff": Container(_written("AIFF"), n_blind=54),
    "x.au": Container(_written("AU", "PCM_16"), n_blind=24),
    "x.caf": Container(_written("CAF", "PCM_16"), n_blind=4096),
    "x.flac": Container(_written("FLAC"), checked=True),
    "24.flac": Container(_written("FLAC", "PCM_24", 44100), checked=True),
    "x.ogg": Container(_written("OGG", "VORBIS"), checked=True),
    "x.opus": Container(_written("OGG", "OPUS"), checked=True),
    "x.oga": Container(partial(encoded, "ogg", "flac", _HERTZ), checked=True),
    "x.tta": Container(partial(encoded, "tta", "tta", _HERTZ), checked=True, n_blind=22),
    "x.wv": Container(partial(encoded, "wv", "wavpack", _HERTZ), checked=True, n_blind=48),
    "x.mka": Container(partial(encoded, "matroska", "flac", _HERTZ), n_blind=1024),
    "x.mp3": Container(_written("MP3"), has_lengths=False),
    "x.m4a": Container(partial(encoded, "ipod", "aac", _HERTZ), has_lengths=False),
    "alac.m4a": Container(partial(encoded, "ipod", "alac", _HERTZ), has_lengths=False),
    "x.webm": Container(partial(encoded, "webm", "libopus", _HERTZ, 48000), has_lengths=False),
}


@dataclass(frozen=True)
class Change:
    """A change of some bytes.

    Attributes:
        kind: "flip" a bit, "cut" the rest off, "zero", "delete" or "insert" some bytes.
        place: of 2^32 parts of the file, or of its first 256 bytes.
        in_head: in these.
        amount: the bit, or the number of bytes.
    """

    kind: str
    place: int
    in_head: bool
    amount: int

    def find(self, data: bytes) -> int:
        """Return the first byte that is changed."""
        return (self.place * min(len(data), 256 if self.in_head else len(data))) >> 32

    def apply(self, data: bytes) -> bytes:
        """Return the changed bytes."""
        at = self.find(data)
        if self.kind == "flip":
            return data[:at] + bytes([data[at] ^ 1 << self.amount % 8]) + data[at + 1 :]
        if self.kind == "cut":
            return data[:at]
        n_new = 0 if self.kind == "delete" else self.amount
        n_old = 0 if self.kind == "insert" else self.amount
        new = bytes(n_new) if self.kind == "zero" else np.random.default_rng(self.place).bytes(n_new)
        return data[:at] + new + data[at + n_old :]


CHANGES = st.builds(
    Change,
    st.sampled_from(("flip", "flip", "cut", "zero", "delete", "insert")),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.integers(1, 64),
)


@dataclass(frozen=True)
class Result:
    """What became of a file: samples, or the reason why there are none."""

    samples: np.ndarray | None
    rate: int
    warnings: dict[str, str]
    reason: str = ""


def find_silent_damage(container: Container, change: Change, whole: Result, result: Result) -> str | None:
    """Return what went unnoticed, though the format has what is needed to notice it."""
    if result.samples is None or result.warnings or whole.samples is None:
        return None
    is_equal = result.rate == whole.rate and np.array_equal(result.samples, whole.samples)
    if is_equal or change.find(container.data) < container.n_blind or not container.has_lengths:
        return None
    lost = len(whole.samples) / whole.rate - len(result.samples) / result.rate
    if lost > MIN_LOSS:
        return f"{lost:.2f} s are missing"
    return "samples are wrong" if container.checked else None
