"""Decode with FFmpeg (PyAV has it in its wheels): what libsndfile does not know, or does not read whole.

S samples. Blocks are float32 with full scale at 1.0, each with a sample rate of its own.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError

_READ_SIZE = 1 << 16  # bytes
_SMALLEST_GAP = 0.02  # seconds between frames; times are rounded to milliseconds in some containers
_MOST_READ_ERRORS = 100  # one after the other, of the container and not of a packet: then there is nothing behind them
_FULL_SCALES = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0}
_SILENCE = {"u8": 128}  # where it is not zero
# What is looked for. FFmpeg knows hundreds of other things (playlists, pictures, raw formats that text can pass for).
CONTAINERS = (
    *("aac", "ac3", "aiff", "amr", "ape", "asf", "ast", "au", "avi", "bonk", "caf", "dsf", "dts", "dtshd", "dv"),
    *("eac3", "flac", "flv", "iff", "ircam", "latm", "loas", "lvf", "matroska", "mlp", "mov", "mp3", "mpc", "mpc8"),
    *("mpeg", "mpegts", "mxf", "nistsphere", "nut", "ogg", "oma", "osq", "paf", "pvf", "qcp", "qoa", "rka", "rm"),
    *("shn", "sox", "tak", "truehd", "tta", "voc", "vqf", "w64", "wav", "wtv", "wv", "wve", "xwma"),
)
# A playlist could name other files or addresses: nothing but the bytes that were given is opened.
_OPTIONS = {"protocol_whitelist": "none", "format_whitelist": ",".join(CONTAINERS)}


class FFmpegError(UserError):
    """Bytes in which FFmpeg finds no sound.

    Attributes:
        reason: in a few words.
        empty: there is a stream of sound, without samples.
        is_unknown: it is no container that FFmpeg knows.
    """

    def __init__(self, reason: str, *, empty: bool = False, is_unknown: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.empty = empty
        self.is_unknown = is_unknown


class FFmpegBlocks:
    """The sound of a file or pipe, decoded packet by packet; memory does not depend on its length.

    Iterating, once, gives `(block, sample_rate)`: float32 (S, channels) and hertz. Rate and channels may differ from
    one block to the next (HE-AAC, joined MP3s). A packet that cannot be decoded is left out and counted. Of several
    streams of sound, the one that FFmpeg finds best is taken. Encoder delay and padding are left out where the
    container announces them.

    Args:
        source: a path, or an open binary file. A pipe will do: it is read forward only, and what has come is decoded.
        block_seconds: gather at least so much into a block; with 0, every packet's samples are given as they come.
        container: FFmpeg's name of the container ("mp3", "flac", ...); found from the bytes when None.

    Attributes:
        container: FFmpeg's name of it, known from the first block on, as are the next two.
        codec: FFmpeg's name of it.
        announced_seconds: how long the container says that the sound is, or None. An estimate in some formats.
        seconds: decoded so far.
        n_packets: packets decoded so far, bad ones included.
        n_bad_packets: packets that could not be decoded.
        bad_seconds: how long these would have been, as far as they say.
        gap_seconds: what is missing between packets by their times (packets that are lost, or a pause).
        cut: the last bytes are the beginning of something that is missing; known at the end.

    Raises:
        FFmpegError: while iterating: no sound in it, or none that can be decoded.
        OSError: while iterating: the file cannot be read.
    """

    def __init__(
        self, source: str | Path | BinaryIO | io.RawIOBase, *, block_seconds: float = 1.0, container: str | None = None
    ) -> None:
        self.source = source
        self.block_seconds = block_seconds
        self.container = container or ""
        self.codec = ""
        self.announced_seconds: float | None = None
        self.seconds = self.bad_seconds = self.gap_seconds = 0.0
        self.n_packets = self.n_bad_packets = 0
        self.cut = False

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        if isinstance(self.source, str | Path):
            with open(self.source, "rb") as file:
                yield from self._decode(file)
        else:
            yield from self._decode(self.source)

    def _decode(self, file: BinaryIO | io.RawIOBase) -> Iterator[tuple[np.ndarray, int]]:
        import av  # here, since most files do without

        reader = _Reader(file) if _is_seekable(file) else _Pipe(file)
        try:
            opened: Any = av.open(reader, format=self.container or None, options=_OPTIONS, buffer_size=_READ_SIZE)
        except (av.error.FFmpegError, ValueError) as error:
            raise reader.error or FFmpegError(_sentence(error), is_unknown=True) from None
        with opened as container:
            self.container = container.format.name
            stream = container.streams.best("audio")
            if stream is None:
                kinds = sorted({str(kind.type) for kind in container.streams})
                raise FFmpegError(f"it holds no sound, only {' and '.join(kinds) or 'nothing'}")
            if stream.codec_context is None:
                raise FFmpegError("its kind of compression is not known here")
            stream.codec_context.thread_count = 1  # files are decoded side by side
            self.codec = stream.codec_context.name
            if stream.duration is not None and stream.time_base is not None:
                self.announced_seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                self.announced_seconds = container.duration / 1e6
            yield from self._gather(self._frames(container, stream))
        if reader.error is not None:
            raise reader.error
        if self.seconds == 0 and self.n_packets:
            raise FFmpegError(f"none of its {self.n_packets} packets can be decoded")
        if self.seconds == 0:
            raise FFmpegError("has no samples", empty=True)

    def _frames(self, container: Any, stream: Any) -> Iterator[tuple[np.ndarray, int]]:
        """Decode each packet alone, so that what is wrong with one costs no other."""
        import av

        n_errors = 0  # of the container, one after the other
        bad: Any = None  # the last packet, if it could not be decoded
        expected: float | None = None  # seconds at which the next frame should start
        while n_errors < _MOST_READ_ERRORS:
            try:
                for packet in container.demux(stream):
                    if packet.size > 0:
                        n_errors = 0
                        self.n_packets += 1
                        if bad is not None:
                            self._count_bad(bad)
                            bad = None
                    try:
                        frames = packet.decode()
                    except (av.error.FFmpegError, ValueError):
                        bad = packet if packet.size > 0 else bad
                        continue
                    # of plain samples every last packet that is not full is called corrupt
                    self.cut |= packet.size > 0 and packet.is_corrupt and not self.codec.startswith("pcm_")
                    for frame in frames:
                        if frame.samples > 0 and frame.sample_rate > 0:
                            start = frame.time
                            if start is not None:
                                if expected is not None and start > expected + _SMALLEST_GAP:
                                    self.gap_seconds += start - expected
                                expected = start + frame.samples / frame.sample_rate
                            yield _to_float(frame), frame.sample_rate
                break
            except (EOFError, BlockingIOError):
                break
            except av.error.FFmpegError:  # of the container: the next packet may be whole again
                n_errors += 1
                self.cut |= n_errors == 1 and self.n_packets > 0
        if bad is not None:  # the last one, of which only the beginning is there
            self.cut = True
            self.n_packets -= 1

    def _count_bad(self, packet: Any) -> None:
        self.n_bad_packets += 1
        if packet.duration and packet.time_base:
            self.bad_seconds += float(packet.duration * packet.time_base)

    def _gather(self, frames: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Join neighbours of one rate and as many channels until they are long enough."""
        held: list[np.ndarray] = []
        n_held = rate = 0
        for samples, frame_rate in frames:
            if held and (frame_rate != rate or samples.shape[1] != held[0].shape[1]):
                yield _join(held), rate
                held, n_held = [], 0
            held.append(samples)
            rate = frame_rate
            n_held += len(samples)
            self.seconds += len(samples) / rate
            if n_held >= self.block_seconds * rate:
                yield _join(held), rate
                held, n_held = [], 0
        if held:
            yield _join(held), rate


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _to_float(frame: Any) -> np.ndarray:
    """Samples of a frame as float32 (S, channels) with full scale at 1.0."""
    import av

    kind = frame.format.name
    if kind.rstrip("p") not in {"u8", "s16", "s32", "flt", "dbl"}:  # 64-bit integers
        (frame,) = av.AudioResampler(format="dbl").resample(frame)
        kind = "dbl"
    values = frame.to_ndarray()  # (channels, S) where planar, else (1, S * channels)
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    name = kind.rstrip("p") if frame.format.is_planar else kind
    scale = _FULL_SCALES.get(name)
    if scale is None:
        return np.ascontiguousarray(values, dtype=np.float32)
    # doubles: 32 bits do not fit into a float32 before the division
    wide = values.astype(np.float32 if name == "s16" else np.float64) - _SILENCE.get(name, 0)
    return np.ascontiguousarray(wide / scale, dtype=np.float32)


def _is_seekable(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, OSError, ValueError):
        return False


class _Pipe:
    """A file that can only be read forward; its own errors are kept, since FFmpeg knows them as a number alone.

    Args:
        file: to read from.
    """

    name = ""  # FFmpeg would guess by it, and it need not be text

    def __init__(self, file: Any) -> None:
        self._read = getattr(file, "read1", file.read)  # what is there, rather than wait for all it could take
        self.error: OSError | None = None

    def read(self, n_bytes: int) -> bytes:
        """Read at most so many bytes; none at the end, and where the file cannot be read any more."""
        try:
            return self._read(n_bytes)
        except OSError as error:
            self.error = error
            return b""


class _Reader(_Pipe):
    """A file in which FFmpeg may move.

    Args:
        file: to read from.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._file = file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Return True."""
        return True


def _sentence(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error)
    if "Invalid data" in text or "Invalid argument" in text:  # not in the list of containers
        return "no sound found in it"
    return text.strip().rstrip(".")
