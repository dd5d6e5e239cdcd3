"""A sound file decoded block by block: which decoder reads what of it, and what was lost.

libsndfile is first wherever it reads all that a file holds, since it is many times faster for WAV; FFmpeg decodes what
libsndfile does not know, and what it breaks off in. What was decoded is compared with what the file holds.

S samples.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from audio.chunks import UNKNOWN_LENGTHS
from audio.containers import inspect
from audio.errors import AudioReadError
from audio.ffmpeg import FFmpegBlocks, FFmpegError
from audio.flac import find_rest
from audio.parts import PLAIN_FLAC, Contents, Part, Slice, describe_cut
from audio.scale import LARGEST_SAMPLE, ScaleError, ScaleRestorer

LOWEST_RATE = 100  # Hz
SMALLEST_LOSS = 0.1  # seconds by which a length may differ from what is announced: encoders pad
# The most that is read at once: frames, seconds (headers may announce any rate), samples of all channels.
_BLOCK_FRAMES, _BLOCK_SECONDS, _BLOCK_SAMPLES = 1 << 18, 10, 1 << 22
# Containers whose announced length FFmpeg does not guess from the size of the file.
_EXACT = {"mov", "matroska", "asf", "ape", "wv", "tta", "flac", "caf", "aiff", "avi", "mpc8", "tak", "w64", "dsf"}
_NO_SAMPLES = "has no samples"

Blocks = Iterator[tuple[np.ndarray, int]]


class FileDecoder:
    """The blocks of a file with their sample rates: float32 (S, channels), full scale 1.0, and Hz.

    Iterating, once, decodes; rate and channels may change from one block to the next.

    Args:
        path: a sound file of any kind.

    Attributes:
        warnings: kind → what is odd, see `audio.io.AudioBlocks`; known at the end.

    Raises:
        AudioReadError: while iterating: missing, unreadable, empty, or with samples that are not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Blocks:
        try:
            for block, rate in self._blocks():
                self._check(block, rate)
                yield block, rate
        except FFmpegError as error:
            raise self._error(error) from None
        except ScaleError as error:
            raise AudioReadError(self.path, error.reason) from None
        except (soundfile.SoundFileError, TypeError, OSError) as error:
            raise AudioReadError(self.path, f"cannot be decoded ({_message(error)})") from None

    def _check(self, block: np.ndarray, rate: int) -> None:
        """Refuse rates and samples that no sound has."""
        if rate < LOWEST_RATE:
            raise AudioReadError(self.path, f"its header announces {rate} Hz; below {LOWEST_RATE} is no sound")
        peak = max(-float(block.min()), float(block.max()))
        if not math.isfinite(peak):
            raise AudioReadError(self.path, "has samples that are not finite numbers (NaN or infinite)", kind="nan")
        if peak > LARGEST_SAMPLE:
            raise AudioReadError(self.path, f"has samples of {peak:.1e}, where full scale is 1: is it damaged?")

    def _blocks(self) -> Blocks:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            is_link = os.path.islink(self.path)
            what = f"is a link to {os.readlink(self.path)}, where there is nothing" if is_link else ""
            raise AudioReadError(self.path, what or "there is no such file") from None
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                contents = inspect(descriptor, status.st_size, self.path)
                self.warnings.update(contents.warnings)
                yield from self._parts(descriptor, status.st_size, contents)
            elif stat.S_ISREG(status.st_mode):
                raise AudioReadError(self.path, "the file has no content (0 bytes)", kind="empty")
            elif stat.S_ISDIR(status.st_mode):
                raise AudioReadError(self.path, "is a folder, not a sound file")
            else:  # a pipe, which can be read but once
                with open(descriptor, "rb", closefd=False) as pipe:
                    yield from self._with_ffmpeg(FFmpegBlocks(pipe), 0, None)
        finally:
            os.close(descriptor)

    def _parts(self, descriptor: int, size: int, contents: Contents) -> Blocks:
        try:
            for part in contents.parts:
                yield from self._part(descriptor, size, part, contents.kind)
        except FFmpegError as error:
            if contents.kind == "mp4" and error.is_unknown:
                raise FFmpegError("its index is missing: it was cut, or is not finished") from None
            raise
        if contents is PLAIN_FLAC:
            for part in find_rest(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR), size):
                yield from self._part(descriptor, size, part, contents.kind)

    def _part(self, descriptor: int, size: int, part: Part, kind: str) -> Blocks:
        """Decode a part by the decoder that reads it whole."""

        def bytes_of_part() -> Slice:
            return Slice(descriptor, part.start, size if part.stop is None else part.stop, part.head)

        if part.decoder == "ffmpeg":
            yield from self._with_ffmpeg(FFmpegBlocks(bytes_of_part(), container=part.container), 0, part.seconds)
            return
        try:
            file = self._open(descriptor, part, bytes_of_part)
        except (soundfile.SoundFileError, TypeError) as error:
            try:
                yield from self._with_ffmpeg(FFmpegBlocks(bytes_of_part()), 0, None)
            except FFmpegError as other:
                raise (error if other.is_unknown else other) from None
            return
        if file.subtype.startswith("MPEG") and part.seconds is None:  # guessed from the first frame
            file.close()
            yield from self._with_ffmpeg(FFmpegBlocks(bytes_of_part()), 0, None)
            return
        with file:
            n_read, rate = 0, file.samplerate
            try:
                for block in self._with_libsndfile(file):
                    n_read += len(block)
                    yield block, rate
            except soundfile.SoundFileError as error:
                yield from self._go_on(bytes_of_part(), n_read, rate, error)
                return
            if part.seconds is not None:
                if n_read < (part.seconds - SMALLEST_LOSS) * rate:
                    self._note_loss(n_read / rate, part.seconds, is_cut=False)
            elif n_read < file.frames or (not kind and _is_cut(file.extra_info, n_read)):
                self._note_loss(n_read / rate, None, is_cut=True)

    def _open(self, descriptor: int, part: Part, bytes_of_part: Callable[[], Slice]) -> soundfile.SoundFile:
        if part.raw is not None:
            return part.raw.open(bytes_of_part())
        if part.stop is not None:
            return soundfile.SoundFile(bytes_of_part())
        if os.fspath(self.path).endswith((".gsm", ".vox", ".raw")):  # known by their names alone
            return soundfile.SoundFile(os.fsencode(self.path))
        os.lseek(descriptor, 0, os.SEEK_SET)
        return soundfile.SoundFile(descriptor, closefd=False)

    def _with_libsndfile(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        """Decode with libsndfile."""
        rate, n_channels, n_left = file.samplerate, file.channels, file.frames
        if rate < LOWEST_RATE:  # before anything is read
            self._check(np.zeros((1, 1), np.float32), rate)
        blocks = self._read(file, rate, n_channels, n_left)
        if file.subtype in ("FLOAT", "DOUBLE"):
            blocks = (block for block, _ in self._restored((block, rate) for block in blocks))
        return blocks

    def _read(self, file: soundfile.SoundFile, rate: int, n_channels: int, n_left: int) -> Iterator[np.ndarray]:
        n_block = min(_BLOCK_FRAMES, _BLOCK_SECONDS * rate, _BLOCK_SAMPLES // n_channels)
        n_block -= n_block % rate if n_block > rate else 0  # whole seconds, see `audio.channels`
        while n_left > 0:  # never more than announced: libFLAC would go on into another stream behind it, and break off
            n_wanted = min(n_block, n_left)
            block = file.read(out=np.empty((n_wanted, n_channels), np.float32))  # (S, channels)
            n_left -= len(block)
            if len(block):
                yield block
            if len(block) < n_wanted:
                return

    def _go_on(self, source: Slice, n_read: int, rate: int, error: Exception) -> Blocks:
        """Decode with FFmpeg what libsndfile broke off in."""
        try:
            yield from self._with_ffmpeg(FFmpegBlocks(source), n_read, None)
        except FFmpegError:
            if not n_read:
                raise error from None
            self.warnings["damaged"] = f"is damaged: what is behind {n_read / rate:.2f} s cannot be decoded"

    def _with_ffmpeg(self, blocks: FFmpegBlocks, n_skipped: int, seconds: float | None) -> Blocks:
        """Decode with FFmpeg, behind the first samples, and note what was lost.

        Args:
            blocks: to decode.
            n_skipped: samples that were decoded already.
            seconds: how long the part is by its own bytes; None: as its container has it, if it does.
        """
        decoded = _behind(iter(blocks), n_skipped)
        for block, rate in decoded:
            if blocks.codec.startswith("pcm_f"):
                decoded = self._restored(_with_first(block, rate, decoded))
            else:
                yield block, rate
            break
        yield from decoded
        if blocks.n_bad_packets and "damaged" not in self.warnings:
            n = blocks.n_bad_packets
            what = f"{n} of its packets" if n > 1 else "one of its packets"
            self.warnings["damaged"] = (
                f"is damaged: {what} could not be decoded and left out ({blocks.bad_seconds:.2f} s)"
            )
        if blocks.container.split(",")[0] not in _EXACT and seconds is None:
            announced = None
        else:
            announced = seconds or blocks.announced_seconds
        lost = (announced or 0.0) - blocks.seconds - blocks.bad_seconds
        if announced is not None and lost > SMALLEST_LOSS:
            gap = blocks.gap_seconds if blocks.gap_seconds > lost / 2 else 0.0
            self._note_loss(blocks.seconds, announced, is_cut=not gap)
        elif blocks.cut and announced is None and "truncated" not in self.warnings:
            self.warnings["truncated"] = "ends early: its last packet is not whole"

    def _note_loss(self, seconds: float, announced: float | None, *, is_cut: bool) -> None:
        """Note that a part is shorter than announced: cut, or with something missing in it."""
        if "truncated" in self.warnings:
            return
        if is_cut:
            self.warnings["truncated"] = describe_cut(seconds, announced)
        elif announced is not None:
            text = self.warnings.get("damaged", "is damaged")
            self.warnings["damaged"] = f"{text}; {announced - seconds:.2f} of its {announced:.2f} s are missing"

    def _restored(self, blocks: Blocks) -> Blocks:
        """Give full scale 1.0 to values in floating point that have another one."""
        restorer = ScaleRestorer()
        yield from restorer.restore(blocks)
        full_scale = restorer.full_scale or 1.0
        if full_scale != 1.0:
            self.warnings["rescaled"] = (
                f"holds integers of {round(math.log2(full_scale)) + 1} bits as floating-point values, which were "
                f"divided by {full_scale:.0f}"
            )

    def _error(self, error: FFmpegError) -> AudioReadError:
        if error.empty:
            return AudioReadError(self.path, _NO_SAMPLES, kind="empty")
        return AudioReadError(self.path, f"cannot be decoded ({error.reason})")


def _behind(blocks: Blocks, n_skipped: int) -> Blocks:
    """Leave out the first samples."""
    for block, rate in blocks:
        rest = block[n_skipped:]
        n_skipped = max(n_skipped - len(block), 0)
        if len(rest):
            yield rest, rate


def _with_first(block: np.ndarray, rate: int, blocks: Blocks) -> Blocks:
    yield block, rate
    yield from blocks


def _is_cut(header_log: str, n_read: int) -> bool:
    """Whether libsndfile has noted that a file of a rare kind holds fewer samples than its header announces."""
    for announced, present in re.findall(r"\b(?:BODY|data|SSND|length) *:? *(\d+) \(?should be (\d+)", header_log):
        if int(announced) > int(present) and int(announced) not in UNKNOWN_LENGTHS:
            return True
    frames = re.search(r"^ *(?:Frames|Samples) *: (\d+)$", header_log, re.MULTILINE)
    return "truncated" in header_log or (frames is not None and int(frames[1]) > n_read)


def _message(error: Exception) -> str:
    """What a decoder or the system says, in a few words."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    message = (getattr(error, "error_string", None) or str(error)).strip().rstrip(".")
    # libsndfile says the second of an .mp3 without a sound frame, and the third of anything, if it has once said it
    if not message or any(words in message for words in ("not recognised", "does not exist", "resource fork")):
        return "no sound found in it"
    return message
