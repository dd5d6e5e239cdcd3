"""Decode a sound file block by block, with the decoder that reads all of it, and detect lost sound.

libsndfile is used wherever it reads the whole file, since it is many times faster for WAV; FFmpeg decodes formats that
libsndfile does not support, and files in which it fails. The length decoded is compared with the file's own.

S samples.
"""

import errno
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile

from audio.byte_stream import ByteStream
from audio.chunks import UNKNOWN_LENGTHS, has_header, read_header
from audio.containers import inspect
from audio.errors import AudioReadError
from audio.ffmpeg import FFmpegBlocks, FFmpegError
from audio.flac import describe_contradiction, find_rest
from audio.limits import DEFAULT_LIMITS, SoundLimits
from audio.parts import PLAIN_FLAC, Contents, Part, Slice, describe_cut
from audio.scale import LARGEST_SAMPLE, ScaleError, ScaleRestorer

MIN_LOSS = 0.1  # seconds; smaller differences from the announced length come from encoder padding
_MPEG_PADDING = 2304  # samples that encoders add, announce, and decoders leave out: two frames
# Limits of one read: frames, seconds (headers may announce any rate), samples of all channels.
_BLOCK_FRAMES, _BLOCK_SECONDS, _BLOCK_SAMPLES = 1 << 18, 10, 1 << 22
# Containers whose length FFmpeg does not estimate from the size of the file.
_EXACT = {"mov", "matroska", "asf", "ape", "wv", "tta", "flac", "caf", "aiff", "avi", "mpc8", "tak", "w64", "dsf"}
_NO_SAMPLES = "has no samples"

Blocks = Iterator[tuple[np.ndarray, int]]


class FileDecoder:
    """The blocks of a file, float32 (S, channels) with full scale 1.0, and their sample rates in Hz.

    Iterating, once, decodes; rate and channels may change from block to block.

    Args:
        path: a sound file of any kind.
        limits: of rates and channels.

    Attributes:
        warnings: kind → sentence, see `audio.io.AudioBlocks`; complete at the end.

    Raises:
        AudioReadError: while iterating: missing, unreadable, empty, beyond a limit, or samples that are not finite.
    """

    def __init__(self, path: Path, limits: SoundLimits = DEFAULT_LIMITS) -> None:
        self.path, self.limits = path, limits
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Blocks:
        try:
            for block, rate in self._blocks():
                self._check(block, rate)
                yield block, rate
        except FFmpegError as error:
            raise self._to_read_error(error) from None
        except ScaleError as error:
            raise AudioReadError(self.path, error.reason) from None
        except (soundfile.SoundFileError, TypeError, OSError) as error:
            raise AudioReadError(self.path, f"cannot be decoded ({_format_error(error)})") from None

    def _check(self, block: np.ndarray, rate: int) -> None:
        """Raise `AudioReadError` for rates, channels and samples that no sound has."""
        self._check_format(rate, block.shape[1])
        peak = max(-float(block.min()), float(block.max()))
        if not math.isfinite(peak):
            raise AudioReadError(self.path, "has samples that are not finite numbers (NaN or infinite)", kind="nan")
        if peak > LARGEST_SAMPLE:
            raise AudioReadError(self.path, f"has samples of {peak:.1e}, where full scale is 1; it may be damaged")

    def _check_format(self, rate: int, n_channels: int) -> None:
        """Raise `AudioReadError` for rates and channels beyond their limits."""
        limits = self.limits
        if not limits.lowest_rate <= rate <= limits.highest_rate:
            expected = f"{limits.lowest_rate:g} to {limits.highest_rate:.0f} Hz are expected"
            name = "lowest_rate" if rate < limits.lowest_rate else "highest_rate"
            raise AudioReadError(
                self.path,
                f"its header announces {rate} Hz; {expected}, or with --limits '{{{name}: {max(rate, 1)}}}' all rates "
                f"{'down' if name == 'lowest_rate' else 'up'} to it",
            )
        if not 1 <= n_channels <= limits.channels:
            raise AudioReadError(
                self.path,
                f"its header announces {n_channels} channels; at most {limits.channels:.0f} are expected "
                f"(--limits '{{channels: N}}' allows more)",
            )

    def _check_header(self, source: Slice) -> None:
        """Raise `AudioReadError` where the header of a file that cannot be opened is beyond the limits."""
        stream = ByteStream(source)
        header = read_header(stream) if has_header(stream.peek(12)) else None
        if header is not None and header.raw is not None:
            self._check_format(header.raw.sample_rate, header.raw.channels)

    def _blocks(self) -> Blocks:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            is_link = os.path.islink(self.path)
            broken = f"is a link to {os.readlink(self.path)}, which does not exist" if is_link else ""
            raise AudioReadError(self.path, broken or "there is no such file") from None
        except OSError as error:
            what = (
                "is a socket, not a sound file"
                if error.errno == errno.ENXIO
                else f"cannot be opened ({error.strerror})"
            )
            raise AudioReadError(self.path, what) from None
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                contents = inspect(descriptor, status.st_size, self.path)
                self.warnings.update(contents.warnings)
                yield from self._decode_parts(descriptor, status.st_size, contents)
                self._note_change(status, os.fstat(descriptor))
            elif stat.S_ISREG(status.st_mode):
                raise AudioReadError(self.path, "the file is empty (0 bytes)", kind="empty")
            elif stat.S_ISDIR(status.st_mode):
                raise AudioReadError(self.path, "is a folder, not a sound file")
            elif not stat.S_ISFIFO(status.st_mode):
                raise AudioReadError(self.path, "is a device, not a sound file")
            else:  # a pipe, which can be read only once
                with open(descriptor, "rb", closefd=False) as pipe:
                    yield from self._decode_with_ffmpeg(FFmpegBlocks(pipe), 0, None)
        finally:
            os.close(descriptor)

    def _decode_parts(self, descriptor: int, size: int, contents: Contents) -> Blocks:
        try:
            for part in contents.parts:
                yield from self._decode_part(descriptor, size, part, contents.kind)
        except FFmpegError as error:
            if contents.kind == "mp4" and error.is_unknown:
                raise FFmpegError("its index is missing: it is truncated, or was not finished") from None
            raise
        if contents is PLAIN_FLAC:
            rest = find_rest(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR), size)
            for part in rest:
                yield from self._decode_part(descriptor, size, part, contents.kind)
            text = None if rest else describe_contradiction(descriptor, size)
            if text:
                self.warnings["inconsistent"] = text

    def _decode_part(self, descriptor: int, size: int, part: Part, kind: str) -> Blocks:
        """Decode a part with the decoder that reads all of it."""

        def open_slice() -> Slice:
            return Slice(descriptor, part.start, size if part.stop is None else part.stop, part.head)

        if part.decoder == "ffmpeg":
            yield from self._decode_with_ffmpeg(FFmpegBlocks(open_slice(), container=part.container), 0, part.seconds)
            return
        if part.raw is not None:
            self._check_format(part.raw.sample_rate, part.raw.channels)
        try:
            file = self._open(descriptor, part, open_slice)
        except (soundfile.SoundFileError, TypeError) as error:
            self._check_header(open_slice())
            try:
                yield from self._decode_with_ffmpeg(FFmpegBlocks(open_slice()), 0, None)
            except FFmpegError as other:
                raise (error if other.is_unknown else other) from None
            return
        if (
            file.subtype.startswith("MPEG") and part.seconds is None
        ):  # libsndfile would estimate it from the first frame
            file.close()
            yield from self._decode_with_ffmpeg(FFmpegBlocks(open_slice()), 0, None)
            return
        with file:
            n_read, rate = 0, file.samplerate
            try:
                for block in self._decode_with_libsndfile(file):
                    n_read += len(block)
                    yield block, rate
            except soundfile.SoundFileError as error:
                yield from self._decode_rest(open_slice(), n_read, rate, error)
                return
            if part.seconds is not None:
                n_allowed = max(MIN_LOSS * rate, _MPEG_PADDING if kind == "mp3" else 0)
                if n_read < part.seconds * rate - n_allowed:
                    self._note_loss(n_read / rate, part.seconds, is_cut=False)
            elif n_read < file.frames or (not kind and _is_cut(file.extra_info, n_read)):
                self._note_loss(n_read / rate, None, is_cut=True)

    def _open(self, descriptor: int, part: Part, open_slice: Callable[[], Slice]) -> soundfile.SoundFile:
        if part.raw is not None:
            return part.raw.open(open_slice())
        if part.stop is not None:
            return soundfile.SoundFile(open_slice())
        if os.fspath(self.path).endswith((".gsm", ".vox", ".raw")):  # libsndfile recognises them by their names alone
            return soundfile.SoundFile(os.fsencode(self.path))
        os.lseek(descriptor, 0, os.SEEK_SET)
        return soundfile.SoundFile(descriptor, closefd=False)

    def _decode_with_libsndfile(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        """Decode with libsndfile."""
        rate, n_channels, n_left = file.samplerate, file.channels, file.frames
        self._check_format(rate, n_channels)  # before anything is decoded
        blocks = self._read(file, rate, n_channels, n_left)
        if file.subtype in ("FLOAT", "DOUBLE"):
            blocks = (block for block, _ in self._restore_scale((block, rate) for block in blocks))
        return blocks

    def _read(self, file: soundfile.SoundFile, rate: int, n_channels: int, n_left: int) -> Iterator[np.ndarray]:
        n_block = min(_BLOCK_FRAMES, _BLOCK_SECONDS * rate, _BLOCK_SAMPLES // n_channels)
        n_block -= n_block % rate if n_block > rate else 0  # whole seconds, see `audio.channels`
        while n_left > 0:  # never more than announced: libFLAC would continue into another stream behind it, and fail
            n_needed = min(n_block, n_left)
            block = file.read(out=np.empty((n_needed, n_channels), np.float32))  # (S, channels)
            n_left -= len(block)
            if len(block):
                yield block
            if len(block) < n_needed:
                return

    def _decode_rest(self, source: Slice, n_read: int, rate: int, error: Exception) -> Blocks:
        """Decode with FFmpeg a part in which libsndfile failed, behind the samples that it has decoded."""
        try:
            yield from self._decode_with_ffmpeg(FFmpegBlocks(source), n_read, None)
        except FFmpegError:
            if not n_read:
                raise error from None
            self.warnings["damaged"] = f"is damaged: the sound after {n_read / rate:.2f} s cannot be decoded"
        if "truncated" not in self.warnings:
            self.warnings.setdefault("damaged", "is damaged: a small part of it cannot be decoded")

    def _decode_with_ffmpeg(self, blocks: FFmpegBlocks, n_skipped: int, seconds: float | None) -> Blocks:
        """Decode with FFmpeg, and note lost sound in `warnings`.

        Args:
            blocks: to decode.
            n_skipped: samples that were decoded already.
            seconds: length of the part by its own bytes; None: as announced by its container, if it is.
        """
        decoded = _skip_samples(iter(blocks), n_skipped)
        for block, rate in decoded:
            if blocks.codec.startswith("pcm_f"):
                decoded = self._restore_scale(chain([(block, rate)], decoded))
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
        if announced is not None and lost > MIN_LOSS:
            gap = blocks.gap_seconds if blocks.gap_seconds > lost / 2 else 0.0
            self._note_loss(blocks.seconds, announced, is_cut=not gap)
        elif blocks.cut and announced is None and "truncated" not in self.warnings:
            self.warnings["truncated"] = "ends early: its last packet is incomplete"

    def _note_loss(self, seconds: float, announced: float | None, *, is_cut: bool) -> None:
        """Note that a part is shorter than announced: truncated, or with a gap."""
        if "truncated" in self.warnings:
            return
        if is_cut:
            self.warnings["truncated"] = describe_cut(seconds, announced)
        elif announced is not None:
            text = self.warnings.get("damaged", "is damaged")
            self.warnings["damaged"] = f"{text}; {announced - seconds:.2f} of its {announced:.2f} s are missing"

    def _note_change(self, before: os.stat_result, after: os.stat_result) -> None:
        """Note that a file was written to while it was read: part of the sound may be of either version."""
        if after.st_size > before.st_size:
            self.warnings.setdefault(
                "truncated",
                f"grew from {before.st_size} to {after.st_size} bytes while it was read; the rest is missing",
            )
        elif (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self.warnings.setdefault("damaged", "was changed by another program while it was read")

    def _restore_scale(self, blocks: Blocks) -> Blocks:
        """Rescale floating-point values whose full scale is not 1.0."""
        restorer = ScaleRestorer()
        yield from restorer.restore(blocks)
        full_scale = restorer.full_scale or 1.0
        if full_scale != 1.0:
            self.warnings["rescaled"] = (
                f"has integers of {round(math.log2(full_scale)) + 1} bits stored as floating-point values, which were "
                f"divided by {full_scale:.0f}"
            )

    def _to_read_error(self, error: FFmpegError) -> AudioReadError:
        if error.empty:
            return AudioReadError(self.path, _NO_SAMPLES, kind="empty")
        return AudioReadError(self.path, f"cannot be decoded ({error.reason})")


def _skip_samples(blocks: Blocks, n_skipped: int) -> Blocks:
    """Leave out the first samples."""
    for block, rate in blocks:
        rest = block[n_skipped:]
        n_skipped = max(n_skipped - len(block), 0)
        if len(rest):
            yield rest, rate


def _is_cut(header_log: str, n_read: int) -> bool:
    """Whether libsndfile's log of a rare format has fewer samples than its header announces."""
    for announced, present in re.findall(r"\b(?:BODY|data|SSND|length) *:? *(\d+) \(?should be (\d+)", header_log):
        if int(announced) > int(present) and int(announced) not in UNKNOWN_LENGTHS:
            return True
    frames = re.search(r"^ *(?:Frames|Samples) *: (\d+)$", header_log, re.MULTILINE)
    return "truncated" in header_log or (frames is not None and int(frames[1]) > n_read)


def _format_error(error: Exception) -> str:
    """Return the message of a decoder or of the system, shortened."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    message = (getattr(error, "error_string", None) or str(error)).strip().rstrip(".")
    # libsndfile reports the second for an .mp3 without frames, and the third for any file once it has reported it
    if not message or any(words in message for words in ("not recognised", "does not exist", "resource fork")):
        return "no sound found in it"
    return message
