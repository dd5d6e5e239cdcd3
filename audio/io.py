"""Sound files to mono waveforms: decode, mix down, resample.

S samples. Waveforms are float32 with full scale at 1.0.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr

from audio.channels import Downmixer
from audio.decoders import LARGEST_SAMPLE, FileDecoder
from audio.errors import AudioReadError
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError

__all__ = [
    "AUDIO_EXTENSIONS",
    "FOREIGN_EXTENSIONS",
    "LARGEST_SAMPLE",
    "LOSSES",
    "WARNINGS",
    "AudioBlocks",
    "AudioReadError",
    "Decoded",
    "decode",
    "find_audio_files",
    "from_int16",
    "read_audio",
    "resample",
    "to_int16",
]

# Searched in folders; lower case, with the dot. A file that is given itself is read under any name.
AUDIO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "mp2", "mpga", "aiff", "aif", "aifc"),
        *("au", "snd", "caf", "w64", "rf64", "bw64", "sph", "nist", "voc", "avr", "8svx", "svx"),
        *("m4a", "m4b", "mp4", "aac", "wma", "webm", "mka", "mkv", "wv", "ape", "3gp", "3g2", "amr", "awb", "ac3"),
        *("eac3", "tta", "tak", "spx", "mov", "avi", "flv", "asf", "mts", "m2ts", "mpg", "mpeg", "ogv", "ogx"),
        *("mpc", "dsf", "ra", "rm", "shn", "qoa", "m4v", "wmv", "f4v", "vob"),
    )
)
# Sound that is not decoded; names in published stores have these extensions, too.
FOREIGN_EXTENSIONS = frozenset((".mid", ".midi", ".m4p", ".aax", ".aa"))

# Kinds of warnings that mean missing sound.
LOSSES = frozenset(("truncated", "damaged"))
WARNINGS = ("truncated", "damaged", "repaired", "joined", "rescaled", "out_of_phase", "short", "inconsistent")
SHORT_SECONDS = 0.1  # of a whole sound, below which tags say little
_MAX_RESAMPLED = 1 << 22  # samples of all channels that one step of resampling may yield


@dataclass(frozen=True)
class Decoded:
    """A decoded file.

    Attributes:
        waveform: float32 (S,) when mixed down, else (S, channels); full scale is 1.0.
        sample_rate: of `waveform`, in Hz.
        source_rate: of the file, in Hz.
        warnings: see `AudioBlocks`.
    """

    waveform: np.ndarray
    sample_rate: int
    source_rate: int
    warnings: dict[str, str] = field(default_factory=dict)


class AudioBlocks:
    """A sound file, decoded block by block in memory that does not depend on the file's length.

    Iterating, once, yields float32 blocks (S,), or (S, channels) without mixing down; full scale is 1.0. Where the
    file's rate or channels change, all blocks get the target rate, or that of the beginning, and its channels.

    libsndfile decodes WAV, FLAC and the other formats that it reads completely; FFmpeg decodes everything else, and the
    rest of a file in which libsndfile fails.

    Args:
        path: a sound file of any kind.
        sample_rate: target rate in Hz; the file's own when None.
        mix_down: average the channels (see `audio.channels.Downmixer` for those of opposite polarity).
        limits: of rates and channels.

    Attributes:
        sample_rate: of the blocks, in Hz, set with the first block.
        source_rate: of the file, in Hz, likewise.
        warnings: kind → a sentence without its subject; complete at the end. Kinds: "truncated" (it ends early),
            "damaged" (something in it cannot be decoded), "repaired" (its header is wrong, no sound is lost), "joined"
            (its rate or channels change), "rescaled" (integers stored as floating-point values), "out_of_phase"
            (channels of opposite polarity), "short" (less than `SHORT_SECONDS`), "inconsistent" (numbers in its header
            contradict each other).

    Raises:
        AudioReadError: while iterating: missing, unreadable, empty, or with samples that are not finite.
    """

    def __init__(
        self,
        path: str | Path,
        sample_rate: int | None = None,
        *,
        mix_down: bool = True,
        limits: SoundLimits = DEFAULT_LIMITS,
    ) -> None:
        self.path, self.limits = Path(path), limits
        self.target_rate = sample_rate
        self.mix_down = mix_down
        self.sample_rate = self.source_rate = 0
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        decoder = FileDecoder(self.path, self.limits)
        yield from self._convert(decoder)
        self.warnings = decoder.warnings | self.warnings

    def _convert(self, blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """Mix down and resample; each stretch of one rate and number of channels has its own resampler."""
        n_given = 0
        n_opposite = n_mixed = 0.0  # seconds
        shapes: dict[tuple[int, int], None] = {}
        converter: Converter | None = None
        for block, rate, is_last in _mark_ends(blocks):
            shape = rate, block.shape[1]
            if converter is None:
                if not shapes:
                    self.source_rate, self.sample_rate = rate, self.target_rate or rate
                shapes[shape] = None
                converter = Converter(*shape, self.sample_rate, None if self.mix_down else next(iter(shapes))[1])
            for piece in converter.push_steps(block, is_last):
                n_given += len(piece)
                yield piece
            if is_last:
                if converter.mixer is not None:
                    n_opposite += converter.mixer.n_opposite / rate
                    n_mixed += converter.mixer.n_samples / rate
                converter = None
        if not shapes:
            raise AudioReadError(self.path, "has no samples", kind="empty")
        if n_given == 0:  # a few samples, resampled to none
            yield np.zeros(1 if self.mix_down else (1, next(iter(shapes))[1]), np.float32)
        if n_given < SHORT_SECONDS * self.sample_rate:
            self.warnings["short"] = f"is shorter than {SHORT_SECONDS:g} s ({n_given / self.sample_rate:.3f} s)"
        if len(shapes) > 1:
            self.warnings["joined"] = describe_joined(list(shapes), self.sample_rate)
        if n_opposite:
            self.warnings["out_of_phase"] = describe_opposite(n_opposite, n_mixed)


def _mark_ends(blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield with each block whether it is the last one of its rate and number of channels."""
    held: tuple[np.ndarray, int] | None = None
    for block, rate in blocks:
        if held is not None:
            yield *held, (held[1], held[0].shape[1]) != (rate, block.shape[1])
        held = block, rate
    if held is not None:
        yield *held, True


class Converter:
    """Mixes down, or changes the number of channels, and resamples blocks of one rate and number of channels.

    Args:
        rate: of the blocks, in Hz.
        n_channels: of the blocks.
        target_rate: in Hz.
        n_target: number of channels; None: mix down.
    """

    def __init__(self, rate: int, n_channels: int, target_rate: int, n_target: int | None) -> None:
        self.rate, self.n_channels, self.n_target = rate, n_channels, n_target
        self.mixer = Downmixer(rate) if n_target is None else None
        self.stream = None
        # samples of a block at once: resampling a low rate yields hundreds of times as many
        self.n_step = max(int(_MAX_RESAMPLED * min(rate / target_rate, 1.0) / (n_target or 1)), 1)
        if rate != target_rate:
            self.stream = soxr.ResampleStream(rate, target_rate, n_target or 1, dtype="float32", quality="HQ")

    def push(self, block: np.ndarray, is_last: bool) -> np.ndarray:
        """Convert float32 (S, channels) to (S',) or (S', n_target); the last block is followed by all that remains."""
        if self.mixer is not None:
            block = self.mixer.push(block, is_last)
        elif self.n_channels != self.n_target:
            block = block.mean(axis=1, keepdims=True).repeat(self.n_target or 1, axis=1)
        if self.stream is not None:
            block = self.stream.resample_chunk(block, last=is_last)
        return np.ascontiguousarray(block, dtype=np.float32)

    def push_steps(self, block: np.ndarray, is_last: bool) -> Iterator[np.ndarray]:
        """Convert a block in steps of limited memory; yields what is not empty."""
        for start in range(0, len(block), self.n_step):
            piece = self.push(block[start : start + self.n_step], is_last and start + self.n_step >= len(block))
            if len(piece):
                yield piece


def describe_joined(shapes: list[tuple[int, int]], sample_rate: int) -> str:
    """Return a sentence on a sound whose (rate, channels) change, and its common rate."""
    each = " and ".join(f"{rate} Hz with {n} channel{'s' * (n > 1)}" for rate, n in shapes[:3])
    more = f" and {len(shapes) - 3} others" if len(shapes) > 3 else ""
    return f"has several streams of different kinds ({each}{more}), all converted to {sample_rate} Hz"


def describe_opposite(n_opposite: float, n_seconds: float) -> str:
    """Return a sentence on the seconds in which channels are of opposite polarity."""
    return (
        f"has stereo channels of opposite polarity in {n_opposite:.2f} of {n_seconds:.2f} s, where half their "
        "difference was taken, since their mean is near silence"
    )


def decode(
    path: str | Path, sample_rate: int | None = None, *, mix_down: bool = True, limits: SoundLimits = DEFAULT_LIMITS
) -> Decoded:
    """Decode a whole sound file.

    Args:
        path: a sound file of any kind.
        sample_rate: target rate in Hz; the file's own when None.
        mix_down: average the channels.
        limits: of the file, and of what is held in memory.

    Raises:
        AudioReadError: missing, unreadable, empty, with samples that are not finite, or beyond a limit.
    """
    blocks = AudioBlocks(path, sample_rate, mix_down=mix_down, limits=limits)
    parts: list[np.ndarray] = []
    n_samples = 0
    for block in blocks:
        parts.append(block)
        n_samples += block.size
        if n_samples > limits.clip_samples:
            raise AudioReadError(path, describe_long(limits, blocks.sample_rate, block.size // len(block)))
    waveform = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Decoded(waveform, blocks.sample_rate, blocks.source_rate, blocks.warnings)


def describe_long(limits: SoundLimits, sample_rate: int, n_channels: int) -> str:
    """Return a sentence on a clip that exceeds its limit."""
    hours = limits.clip_samples / n_channels / sample_rate / 3600
    return (
        f"is longer than {hours:.3g} h at {sample_rate} Hz, {limits.clip_mb:.0f} MB, the most that one clip may take "
        "in memory: cut it, or raise the limit with --limits '{clip_mb: N}'"
    )


def read_audio(path: str | Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Read a sound file as one channel.

    Args:
        path: a sound file of any kind.
        sample_rate: target rate in Hz; the file's own when None.

    Returns:
        The waveform, float32 (S,), channels averaged, and its sample rate in Hz. Integer formats are in [-1, 1];
        floating-point files may exceed full scale, and resampling may exceed it a little.

    Raises:
        AudioReadError: missing, unreadable, empty, or with samples that are not finite.
    """
    decoded = decode(path, sample_rate)
    return decoded.waveform, decoded.sample_rate


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Change the sample rate with soxr (HQ: linear phase, band-limited).

    Args:
        waveform: (S,) or (S, channels).
        from_rate: its rate in Hz.
        to_rate: the target rate in Hz.

    Returns:
        float32 (round(S * to_rate / from_rate),) or (.., channels), at least one sample; the input itself when the
        rates are equal.
    """
    waveform = np.asarray(waveform, dtype=np.float32)
    if from_rate == to_rate or len(waveform) == 0:
        return waveform
    resampled = soxr.resample(waveform, from_rate, to_rate, quality="HQ")
    if len(resampled) == 0:
        return np.zeros((1, *waveform.shape[1:]), np.float32)
    return resampled


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Quantise to 16 bit: full scale 1.0 is 32768, rounded to nearest, clipped (any shape)."""
    return np.clip(np.rint(np.asarray(waveform) * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(samples: np.ndarray) -> np.ndarray:
    """Convert 16-bit samples to float32 with full scale 1.0; the exact inverse of `to_int16` (any shape)."""
    return np.multiply(samples, np.float32(1 / 32768), dtype=np.float32)


def find_audio_files(paths: Iterable[str | Path]) -> list[Path]:
    """List the sound files of a command line.

    Args:
        paths: files, which are kept under any name, and folders, which are searched recursively, also through links,
            for the extensions of sound in any case. Formats that are not decoded and broken links are included, so that
            they are reported.

    Returns:
        Files in the order of `paths`, each folder's sorted, none twice.

    Raises:
        UserError: a path that does not exist, a folder that may not be read, or without any sound file.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_find_sounds(path))
            if not inside:
                known = " ".join(sorted(AUDIO_EXTENSIONS))
                raise UserError(f"{path}: the folder has no sound files (searched recursively for {known})")
            found.update(dict.fromkeys(inside))
        elif path.exists() or path.is_symlink():
            found[path] = None
        else:
            raise UserError(f"{path}: there is no such file or folder")
    return list(found)


def _find_sounds(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})")

    extensions = AUDIO_EXTENSIONS | FOREIGN_EXTENSIONS
    for parent, _, names in walk_folders(folder, refuse):
        for name in names:
            # macOS writes ._NAME beside a file on other file systems
            if os.path.splitext(name)[1].lower() in extensions:
                if not name.startswith("._"):
                    yield Path(parent, name)
            elif os.path.islink(path := os.path.join(parent, name)) and not os.path.exists(path):
                yield Path(path)  # perhaps of a folder of sounds, which is gone


def walk_folders(
    folder: str | Path, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, also through links to folders, each folder once.

    A folder below `folder` that is also linked to is walked at its own path; one outside that is linked to twice, at
    the first link in the order of names; one above `folder` not at all.

    Args:
        folder: root.
        on_error: called with the error of a folder that cannot be read.
    """
    links: list[str] = []
    seen: set[tuple[int, int]] = set()

    def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, names in os.walk(top, onerror=on_error):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            links.extend(path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            yield parent, folders, names

    root = os.path.realpath(folder)
    yield from walk(os.fspath(folder))
    while links:  # after all that is in the folder itself
        links.sort(reverse=True)
        link = links.pop()
        target = os.path.realpath(link)
        if not root.startswith(os.path.join(target, "")):  # a folder above would add all of its files
            yield from walk(link)
