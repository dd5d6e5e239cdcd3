"""Sound files to mono waveforms: decode, mix down, resample.

S samples. Waveforms are float32 with full scale at 1.0.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from common.errors import UserError

# What libsndfile decodes without being told a format; lower case, with the dot.
AUDIO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "mp2", "aiff", "aif", "aifc"),
        *("au", "snd", "caf", "w64", "rf64", "sph", "nist", "voc", "avr", "8svx"),
    )
)
# Known to be sound, though libsndfile cannot decode them: names in published stores carry these too.
FOREIGN_EXTENSIONS = frozenset((".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".wv", ".ape"))

LOWEST_RATE = 100  # Hz
LARGEST_SAMPLE = 1e10  # whole numbers of 32 bits pass; what is far beyond them overflows in any spectrum

# The most that is read at once: frames, seconds (headers may announce any rate), samples of all channels.
_BLOCK_FRAMES, _BLOCK_SECONDS, _BLOCK_SAMPLES = 1 << 18, 10, 1 << 22
_SHORT_BODY = re.compile(r"\b(?:data|SSND) *: *(\d+) \(should be (\d+)\)")
# Lengths that a program writing to a pipe puts into a header because it cannot know better.
UNKNOWN_LENGTHS = {0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF}


class AudioReadError(UserError):
    """A sound file that cannot be used.

    Attributes:
        path: the file, as given.
        reason: what is wrong with it, in a few words.
        kind: "unreadable", "empty" (no samples) or "nan" (samples that are not finite numbers).
    """

    def __init__(self, path: str | Path, reason: str, kind: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str | Path, str, str]]:
        return type(self), (self.path, self.reason, self.kind)  # else it cannot cross from a worker process


@dataclass(frozen=True)
class Decoded:
    """What `decode` found in a file.

    Attributes:
        waveform: float32 (S,) when mixed down, else (S, channels); full scale is 1.0.
        sample_rate: of `waveform`, in Hz.
        source_rate: of the file, in Hz.
        truncated: the file ends before the length that its header announces.
    """

    waveform: np.ndarray
    sample_rate: int
    source_rate: int
    truncated: bool


class AudioBlocks:
    """A sound file, decoded block by block: the memory it takes does not depend on the file's length.

    Iterating gives float32 blocks (S,), or (S, channels) without mixing down; full scale is 1.0.

    Args:
        path: any file that libsndfile reads.
        sample_rate: rate wanted in Hz; the file's own when None.
        mix_down: average the channels.

    Attributes:
        sample_rate: of the blocks, in Hz, known once the first block was read.
        source_rate: of the file, in Hz, likewise.
        truncated: the file ends before the length that its header announces; known at the end.

    Raises:
        AudioReadError: while iterating: missing, unreadable, empty, or with samples that are not finite.
    """

    def __init__(self, path: str | Path, sample_rate: int | None = None, *, mix_down: bool = True) -> None:
        self.path = Path(path)
        self.wanted_rate = sample_rate
        self.mix_down = mix_down
        self.sample_rate = self.source_rate = 0
        self.truncated = False

    def __iter__(self) -> Iterator[np.ndarray]:
        path = self.path
        try:
            if not path.exists():
                raise AudioReadError(path, "there is no such file")
            if path.is_dir():
                raise AudioReadError(path, "is a folder, not a sound file")
            if path.stat().st_size == 0:
                raise AudioReadError(path, "the file has no content (0 bytes)", kind="empty")
            with soundfile.SoundFile(os.fsencode(path)) as file:  # a name need not be text
                yield from self._blocks(file)
        except (soundfile.SoundFileError, TypeError, OSError) as error:
            # TypeError: header-less formats (.raw), for which soundfile wants a rate.
            message = (getattr(error, "error_string", None) or str(error)).strip().rstrip(".")
            if "does not exist" in message:  # libsndfile says so of an .mp3 without a sound frame, too
                message = "no sound found in it"
            if path.suffix.lower() in FOREIGN_EXTENSIONS:
                message += f"; convert {path.suffix} to .flac or .wav first"
            raise AudioReadError(path, f"cannot be decoded ({message})") from None

    def _blocks(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        if file.samplerate < LOWEST_RATE:
            raise AudioReadError(
                self.path, f"its header announces {file.samplerate} Hz; below {LOWEST_RATE} is no sound"
            )
        n_block = min(_BLOCK_FRAMES, _BLOCK_SECONDS * file.samplerate, _BLOCK_SAMPLES // file.channels)
        self.source_rate = file.samplerate
        self.sample_rate = self.wanted_rate or self.source_rate
        n_channels = 1 if self.mix_down else file.channels
        stream = None
        if self.sample_rate != self.source_rate:
            stream = soxr.ResampleStream(self.source_rate, self.sample_rate, n_channels, dtype="float32", quality="HQ")
        n_read = n_given = 0
        last = False
        while not last:
            block = file.read(n_block, dtype="float32", always_2d=True)  # (S, channels)
            peak = max(-float(block.min()), float(block.max())) if len(block) else 0.0
            if not math.isfinite(peak):
                reason = "has samples that are not finite numbers (NaN or infinite)"
                raise AudioReadError(self.path, reason, kind="nan")
            if peak > LARGEST_SAMPLE:
                raise AudioReadError(self.path, f"has samples of {peak:.1e}, where full scale is 1: is it damaged?")
            n_read += len(block)
            last = len(block) < n_block
            if n_read == 0:
                raise AudioReadError(self.path, "has no samples", kind="empty")
            if self.mix_down:
                block = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
            if stream is not None:
                block = stream.resample_chunk(block, last=last)
            if last and n_given + len(block) == 0:  # a handful of samples, resampled to none
                block = np.zeros((1, *block.shape[1:]), np.float32)
            n_given += len(block)
            if len(block):
                yield np.ascontiguousarray(block, dtype=np.float32)
        self.truncated = n_read < file.frames or _body_is_short(file.extra_info)


def decode(path: str | Path, sample_rate: int | None = None, *, mix_down: bool = True) -> Decoded:
    """Decode a whole sound file; only the wanted rate and channels are ever held whole.

    Args:
        path: any file that libsndfile reads.
        sample_rate: rate wanted in Hz; the file's own when None.
        mix_down: average the channels.

    Raises:
        AudioReadError: missing, unreadable, empty, or with samples that are not finite.
    """
    blocks = AudioBlocks(path, sample_rate, mix_down=mix_down)
    parts = list(blocks)
    waveform = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Decoded(waveform, blocks.sample_rate, blocks.source_rate, blocks.truncated)


def _body_is_short(header_log: str) -> bool:
    """Whether libsndfile noted that the samples end before the length in the header."""
    found = _SHORT_BODY.search(header_log)
    if not found:
        return False
    announced, present = int(found[1]), int(found[2])
    return announced > present and announced not in UNKNOWN_LENGTHS


def read_audio(path: str | Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Read a sound file as one channel.

    Args:
        path: any file that libsndfile reads (wav, flac, ogg, mp3, aiff, ...).
        sample_rate: rate wanted in Hz; the file's own when None.

    Returns:
        The waveform, float32 (S,), channels averaged, and its sample rate in Hz. Integer formats lie in [-1, 1];
        a floating-point file may exceed full scale, and so may resampling by a little.

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
        to_rate: the rate wanted in Hz.

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
    """Quantise to 16 bit: full scale 1.0 is 32768, rounded to nearest, and clipped beyond (any shape)."""
    return np.clip(np.rint(np.asarray(waveform) * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(samples: np.ndarray) -> np.ndarray:
    """Return 16-bit samples as float32 with full scale at 1.0; exactly undone by `to_int16` (any shape)."""
    return np.multiply(samples, np.float32(1 / 32768), dtype=np.float32)


def find_audio_files(paths: Iterable[str | Path]) -> list[Path]:
    """List the sound files that a command line means.

    Args:
        paths: files, which are kept whatever their name, and folders, which are searched with all below them for the
            extensions of sound, in any case: also of those that libsndfile does not read, so that they are told of.

    Returns:
        Files in the order of `paths`, each folder's sorted, none twice.

    Raises:
        UserError: a path that does not exist, a folder that may not be read, or without any sound file.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_sounds_below(path))
            if not inside:
                known = " ".join(sorted(AUDIO_EXTENSIONS))
                raise UserError(f"{path}: the folder holds no sound file (looked, also below it, for {known})")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise UserError(f"{path}: there is no such file or folder")
    return list(found)


def _sounds_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})")

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            # ._NAME is what macOS keeps beside a file on foreign disks
            if os.path.splitext(name)[1].lower() in AUDIO_EXTENSIONS | FOREIGN_EXTENSIONS and not name.startswith("._"):
                yield Path(parent, name)
