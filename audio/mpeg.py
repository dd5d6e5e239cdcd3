"""MPEG audio (MP3, MP2, MP1): its frames counted, and where one stream ends and the next begins.

There is no length in the format itself. A Xing or VBRI frame may announce one; without it decoders guess from the size
of the file and the first frame, which is wrong where the bit rate varies. Frames are found by their headers alone.
Formats: ISO/IEC 11172-3 and 13818-3, the Xing and VBRI headers, ID3v2, APEv2.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from audio.parts import PLAIN_FLAC, Contents, Part, describe_cut

_BLOCK = 1 << 20
_LARGEST_FRAME = 1 << 12  # bytes: 2,881 of layer 2
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_V1 = {
    3: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_V2 = {
    3: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    1: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class MpegFrame(NamedTuple):
    """What a frame's header says."""

    n_bytes: int
    n_samples: int
    rate: int
    side: int  # bytes from the frame's start to a Xing tag in one channel


@dataclass
class MpegStream:
    """Frames of one rate, one behind the other.

    Attributes:
        start: first byte.
        stop: behind the last one.
        rate: in Hz.
        announced: frames, by a Xing or VBRI header; None without one.
        n_frames: that there are, without that header.
        n_samples: in them.
        n_garbage: bytes between its frames that are none.
        has_xing: its first frame is no sound but a Xing header.
        is_cut: its last frame is not whole.
    """

    start: int
    stop: int
    rate: int
    announced: int | None = None
    n_frames: int = 0
    n_samples: int = 0
    n_garbage: int = 0
    has_xing: bool = False
    is_cut: bool = False


@lru_cache(maxsize=1 << 12)
def parse_frame(second: int, third: int) -> MpegFrame | None:
    """Read the second and third byte of a frame's header; None of what is no frame, or one of free bit rate."""
    version, layer, index, rate_index = (second >> 3) & 3, (second >> 1) & 3, third >> 4, (third >> 2) & 3
    if second & 0xE0 != 0xE0 or version == 1 or layer == 0 or index in (0, 15) or rate_index == 3:
        return None
    rate = _RATES[version][rate_index]
    bits = (_V1 if version == 3 else _V2)[layer][index] * 1000
    padding = (third >> 1) & 1
    side = 21 if version == 3 else 13
    if layer == 3:
        return MpegFrame((12 * bits // rate + padding) * 4, 384, rate, side)
    n_samples = 576 if layer == 1 and version != 3 else 1152
    return MpegFrame(n_samples // 8 * bits // rate + padding, n_samples, rate, side)


class _Bytes:
    """A file read forward in blocks.

    Args:
        descriptor: of the file.
        size: of it.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.base, self.block = 0, b""

    def at(self, position: int) -> int:
        """Return where in `block` a byte is, with a whole frame and a header behind it there as far as there is one."""
        end = self.base + len(self.block)
        if position < self.base or (position + 2 * _LARGEST_FRAME > end and end < self.size):
            self.base, self.block = position, os.pread(self.descriptor, min(_BLOCK, self.size - position), position)
        return position - self.base


def find_mpeg(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the streams of an MPEG audio file, or of what has an ID3 tag in front."""
    start = measure_id3(head[:10])
    if start and os.pread(descriptor, 4, start) == b"fLaC":
        return PLAIN_FLAC
    streams = _scan(descriptor, size)
    if not streams:
        return Contents()
    first = streams[0]
    is_plain = (
        len(streams) == 1
        and first.start == start
        and first.has_xing
        and first.announced is not None
        and not first.n_garbage
    )
    if is_plain and not first.is_cut and abs((first.announced or 0) - first.n_frames) <= 1:
        return Contents([Part(seconds=first.n_samples / first.rate)], "mp3")
    parts = [
        Part(stream.start, stream.stop, decoder="ffmpeg", container="mp3", seconds=stream.n_samples / stream.rate)
        for stream in streams
    ]
    return Contents(parts, "mp3", describe_loss(streams))


def describe_loss(streams: list[MpegStream]) -> dict[str, str]:
    """Say what is missing in streams that lie one behind the other: kind → sentence."""
    last = streams[-1]
    n_garbage = sum(stream.n_garbage for stream in streams)
    missing = (last.announced or 0) - last.n_frames
    seconds = last.n_samples / last.rate
    announced = seconds + missing * last.n_samples / last.n_frames / last.rate
    if n_garbage:
        lost = f"; {announced - seconds:.2f} of its {announced:.2f} s are missing" if missing > 1 else ""
        return {"damaged": f"is damaged: {n_garbage} bytes between its frames are none, and were left out{lost}"}
    if missing > 1:
        return {"truncated": describe_cut(seconds, announced)}
    if last.is_cut:
        return {"truncated": "ends early: its last frame is not whole"}
    return {}


def _scan(descriptor: int, size: int) -> list[MpegStream]:
    """Walk from frame to frame."""
    data = _Bytes(descriptor, size)
    streams: list[MpegStream] = []
    stream: MpegStream | None = None
    position = n_garbage = 0
    while position + 4 <= size:
        at = data.at(position)
        block = data.block
        frame = parse_frame(block[at + 1], block[at + 2]) if block[at] == 0xFF else None
        is_new = stream is None or n_garbage > 0 or (frame is not None and frame.rate != stream.rate)
        if frame is None or (is_new and not _is_followed(data, position, frame)):
            skipped = measure_tag(block, at, size - position)
            if skipped:
                position += skipped
                if block[at : at + 3] == b"ID3":
                    stream = None  # another file begins
                continue
            found = block.find(b"\xff", at + 1)
            step = (found if found > 0 else len(block)) - at
            n_garbage += step
            position += max(step, 1)
            continue
        tag = find_announcement(block, at, frame)
        if stream is None or tag is not None or frame.rate != stream.rate:
            stream = MpegStream(position, position, frame.rate, has_xing=tag is not None)
            streams.append(stream)
            n_garbage = 0
        stream.n_garbage += n_garbage
        n_garbage = 0
        if tag is None:
            stream.n_frames += 1
            stream.n_samples += frame.n_samples
        else:
            stream.announced = tag or None
        position += frame.n_bytes
        stream.stop = min(position, size)
        stream.is_cut = position > size
    if stream is not None and stream.is_cut:
        stream.n_frames -= 1
        stream.n_samples -= frame.n_samples if frame else 0
    return [stream for stream in streams if stream.n_frames]


def _is_followed(data: _Bytes, position: int, frame: MpegFrame) -> bool:
    """Whether another frame of the same rate, or the end of the file, lies behind a frame."""
    behind = position + frame.n_bytes
    if behind + 4 > data.size:
        return behind == data.size
    at = data.at(position) + frame.n_bytes
    following = parse_frame(data.block[at + 1], data.block[at + 2]) if data.block[at] == 0xFF else None
    return following is not None and following.rate == frame.rate


def find_announcement(block: bytes, at: int, frame: MpegFrame) -> int | None:
    """Return how many frames a Xing, Info or VBRI header announces, 0 if it does not say; None of any other frame."""
    side = frame.side if block[at + 3] >> 6 == 3 else frame.side + (15 if frame.side == 21 else 8)
    side += 0 if block[at + 1] & 1 else 2  # a checksum is in front
    if block[at + side : at + side + 4] in (b"Xing", b"Info"):
        has_frames = block[at + side + 7] & 1
        return int.from_bytes(block[at + side + 8 : at + side + 12], "big") if has_frames else 0
    if block[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(block[at + 50 : at + 54], "big")
    return None


def measure_id3(head: bytes) -> int:
    """Return how long an ID3v2 tag is, header included; 0 of anything else."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    length = 10
    for i, byte in enumerate(head[6:10]):
        length += (byte & 0x7F) << (7 * (3 - i))
    return length + (10 if head[5] & 0x10 else 0)


def measure_tag(block: bytes, at: int, n_left: int) -> int:
    """Return how many bytes of a tag begin here, 0 if none does."""
    first = block[at : at + 32]
    if first[:3] == b"ID3":
        return measure_id3(first[:10])
    if first[:3] == b"TAG" and n_left >= 128:
        return 128
    if first[:8] == b"APETAGEX":
        return 32 + (int.from_bytes(first[12:16], "little") if first[23] & 0x20 else 0)
    if first[:11] == b"LYRICSBEGIN":
        end = max(block.find(b"LYRICS200", at), block.find(b"LYRICSEND", at))
        return end + 9 - at if end > 0 else 0
    return 0
