"""Decode with FFmpeg (bundled with PyAV) what libsndfile does not support, or does not read completely.

S samples. Blocks are float32 with full scale at 1.0, each with a sample rate of its own.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError

_READ_SIZE = 1 << 16  # bytes
_MAX_GATHERED = 1 << 22  # samples of all channels that are joined to a block
_MIN_GAP = 0.02  # seconds between frames; times are rounded to milliseconds in some containers
_MAX_READ_ERRORS = 100  # of the container, not of a packet, one after the other
# Codecs with checksums, which FFmpeg ignores by default; packets whose checksum is wrong are then left out.
_CHECKED = {"flac", "wavpack", "tta", "tak", "ape", "truehd", "mlp"}
_FULL_SCALES = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0}
_SILENCE = {"u8": 128}  # where it is not 0
# Allowed formats. FFmpeg supports hundreds of others (playlists, pictures, raw formats that text is taken for).
CONTAINERS = (
    *("aac", "ac3", "aiff", "amr", "ape", "asf", "ast", "au", "avi", "bonk", "caf", "dsf", "dts", "dtshd", "dv"),
    *("eac3", "flac", "flv", "iff", "ircam", "latm", "loas", "lvf", "matroska", "mlp", "mov", "mp3", "mpc", "mpc8"),
    *("mpeg", "mpegts", "mxf", "nistsphere", "nut", "ogg", "oma", "osq", "paf", "pvf", "qcp", "qoa", "rka", "rm"),
    *("shn", "sox", "tak", "truehd", "tta", "voc", "vqf", "w64", "wav", "wtv", "wv", "wve", "xwma"),
)
# A playlist could contain other files or addresses: only the bytes given are opened.
_OPTIONS = {"protocol_whitelist": "none", "format_whitelist": ",".join(CONTAINERS)}


class FFmpegError(UserError):
    """FFmpeg finds no sound in the bytes given.

    Attributes:
        reason: in a few words.
        empty: there is a stream of sound without samples.
        is_unknown: FFmpeg does not recognise the container.
    """

    def __init__(self, reason: str, *, empty: bool = False, is_unknown: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.empty = empty
        self.is_unknown = is_unknown


class FFmpegBlocks:
    """The sound of a file or pipe, decoded packet by packet; memory does not depend on its length.

    Iterating, once, yields `(block, sample_rate)`: float32 (S, channels) and hertz. Rate and channels may change from
    block to block (HE-AAC, joined MP3s). A packet that cannot be decoded is left out and counted. Of several streams of
    sound, FFmpeg's choice of the best one is decoded. Encoder delay and padding are left out where the container
    announces them.

    Args:
        source: a path, or an open binary file. A pipe is read forward only, and decoded as far as it has come.
        block_seconds: minimum length of a block; with 0, every packet is a block.
        container: FFmpeg's name of the container ("mp3", "flac", ...); detected when None.

    Attributes:
        container: FFmpeg's name of it, set with the first block, as are the next two.
        codec: FFmpeg's name of it.
        announced_seconds: length by the container, or None. An estimate in some formats.
        seconds: decoded so far.
        n_packets: packets decoded so far, bad ones included.
        n_bad_packets: packets that could not be decoded.
        bad_seconds: length of these, as far as it is known.
        gap_seconds: gaps between the times of packets (lost packets, or a pause).
        cut: the last packet is incomplete; set at the end.

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
        import av  # imported here: most files do not need it

        reader = _Reader(file) if _is_seekable(file) else _Pipe(file)
        try:
            opened: Any = av.open(reader, format=self.container or None, options=_OPTIONS, buffer_size=_READ_SIZE)
        except (av.error.FFmpegError, ValueError) as error:
            raise reader.error or FFmpegError(_format_error(error), is_unknown=True) from None
        with opened as container:
            self.container = container.format.name
            stream = container.streams.best("audio")
            if stream is None:
                kinds = sorted({str(kind.type) for kind in container.streams})
                if "audio" in kinds:
                    raise FFmpegError("the rate or the number of channels of its sound is not valid")
                raise FFmpegError(f"it has no sound, only {' and '.join(kinds) or 'nothing'}")
            if stream.codec_context is None:
                raise FFmpegError("its codec is not supported")
            stream.codec_context.thread_count = 1  # files are decoded in parallel
            if stream.codec_context.name in _CHECKED:
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            self.codec = stream.codec_context.name
            if stream.duration is not None and stream.time_base is not None:
                self.announced_seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                self.announced_seconds = container.duration / 1e6
            yield from self._gather(self._decode_frames(container, stream))
        if reader.error is not None:
            raise reader.error
        if self.seconds == 0 and self.n_packets:
            raise FFmpegError(f"none of its {self.n_packets} packets can be decoded")
        if self.seconds == 0:
            raise FFmpegError("has no samples", empty=True)

    def _decode_frames(self, container: Any, stream: Any) -> Iterator[tuple[np.ndarray, int]]:
        """Decode each packet alone, so that a bad one affects no other."""
        import av

        n_errors = 0  # of the container, one after the other
        bad: Any = None  # the last packet, if it could not be decoded
        expected: float | None = None  # seconds at which the next frame should start
        while n_errors < _MAX_READ_ERRORS:
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
                    # of PCM FFmpeg marks a shorter last packet as corrupt
                    self.cut |= packet.size > 0 and packet.is_corrupt and not self.codec.startswith("pcm_")
                    for frame in frames:
                        if frame.samples > 0 and frame.sample_rate > 0:
                            start = frame.time
                            if start is not None:
                                if expected is not None and start > expected + _MIN_GAP:
                                    self.gap_seconds += start - expected
                                expected = start + frame.samples / frame.sample_rate
                            yield _to_float(frame), frame.sample_rate
                break
            except (EOFError, BlockingIOError):
                break
            except av.error.FFmpegError:  # of the container: the next packet may be readable
                n_errors += 1
                self.cut |= n_errors == 1 and self.n_packets > 0
        if bad is not None:  # the last one, which is incomplete
            self.cut = True
            self.n_packets -= 1

    def _count_bad(self, packet: Any) -> None:
        self.n_bad_packets += 1
        if packet.duration and packet.time_base:
            self.bad_seconds += float(packet.duration * packet.time_base)

    def _gather(self, frames: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Join neighbouring frames of one rate and number of channels until they are long enough."""
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
            if n_held >= min(self.block_seconds * rate, _MAX_GATHERED // samples.shape[1]):
                yield _join(held), rate
                held, n_held = [], 0
        if held:
            yield _join(held), rate


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _to_float(frame: Any) -> np.ndarray:
    """Convert the samples of a frame to float32 (S, channels) with full scale 1.0."""
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
    # float64: 32-bit integers are not exact in float32
    wide = values.astype(np.float32 if name == "s16" else np.float64) - _SILENCE.get(name, 0)
    return np.ascontiguousarray(wide / scale, dtype=np.float32)


def _is_seekable(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, OSError, ValueError):
        return False


class _Pipe:
    """A file that can only be read forward; keeps its own errors, of which FFmpeg reports the number alone.

    Args:
        file: to read from.
    """

    name = ""  # FFmpeg would use it for detection, and it need not be text

    def __init__(self, file: Any) -> None:
        self._read = getattr(file, "read1", file.read)  # read1 returns what is there instead of waiting for `n_bytes`
        self.error: OSError | None = None

    def read(self, n_bytes: int) -> bytes:
        """Read at most `n_bytes`; none at the end, and after an error."""
        try:
            return self._read(n_bytes)
        except OSError as error:
            self.error = error
            return b""


class _Reader(_Pipe):
    """A file in which FFmpeg may seek.

    Args:
        file: to read from.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._file = file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Return True."""
        return True


def _format_error(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error)
    if "Invalid data" in text or "Invalid argument" in text:  # FFmpeg recognised no allowed container
        return "no sound found in it"
    return text.strip().rstrip(".")
