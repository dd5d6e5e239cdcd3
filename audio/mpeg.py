"""MPEG audio (MP3, MP2, MP1): counts frames, and finds the boundaries of consecutive streams.

The format has no length. A Xing or VBRI frame may announce one; without it decoders estimate it from the size of the
file and the first frame, which is wrong for variable bit rates. Only the headers of frames are read.
Formats: ISO/IEC 11172-3 and 13818-3, the Xing and VBRI headers, ID3v2, APEv2.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from audio.byte_stream import ByteStream, Piece, StreamPieces
from audio.parts import PLAIN_FLAC, Contents, Part, Slice, describe_cut

_ANNOUNCEMENT = 64  # bytes from a frame's start to the end of the counts of a Xing or VBRI header
_LYRICS = 1 << 16  # bytes in which the end of a tag of lyrics is searched
_MARKS = re.compile(rb"\xff|ID3|TAG|APET|LYRI")  # a frame or a tag may begin
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
    """The header of a frame."""

    n_bytes: int
    n_samples: int
    rate: int
    side: int  # bytes from the frame's start to a Xing tag in one channel


@dataclass
class MpegStream:
    """Consecutive frames of one sample rate.

    Attributes:
        start: first byte.
        rate: in Hz.
        stop: end of the last frame.
        announced: frames by a Xing or VBRI header; None without one.
        n_frames: frames found, without that header.
        n_samples: of these.
        is_cut: the last frame is incomplete.
    """

    start: int
    rate: int
    stop: int = 0
    announced: int | None = None
    n_frames: int = 0
    n_samples: int = 0
    is_cut: bool = False


@lru_cache(maxsize=1 << 12)
def parse_frame(second: int, third: int) -> MpegFrame | None:
    """Parse the second and third byte of a frame's header; None for other bytes, and for a free bit rate."""
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


class MpegPieces(StreamPieces):
    """The streams of MPEG audio (MP3, MP2), frame after frame.

    A stream ends where the rate changes, a tag or another header with a length begins.

    Args:
        stream: to read from.

    Attributes:
        current: the current stream.
        n_garbage: bytes between frames that belong to none.
        warnings: kind → a sentence without its subject; complete at the end.
    """

    current: MpegStream | None = None
    n_garbage = 0

    def __iter__(self) -> Iterator[Piece]:
        """Yield the frames; tags and other bytes between them are skipped."""
        current = self.current
        n_garbage = 0  # since the last frame
        is_first = True
        while len(head := self.stream.peek(4)) == 4:
            frame = parse_frame(head[1], head[2]) if head[0] == 0xFF else None
            is_other = current is None or (frame is not None and frame.rate != current.rate)
            if frame is None or ((is_first or n_garbage or is_other) and not self._is_followed(frame)):
                n_tag = self._measure_tag(head)
                self.stream.skip(n_tag)
                is_first |= n_tag > 0 and head[:3] == b"ID3"  # another file begins
                n_garbage += 0 if n_tag else self.stream.skip_to(_MARKS)
                continue
            data = self.stream.peek(max(frame.n_bytes, _ANNOUNCEMENT))
            tag = find_announcement(data.ljust(_ANNOUNCEMENT, b"\0"), 0, frame)
            is_first |= tag is not None or is_other
            if current is None or is_first:
                n_garbage = 0  # bytes in front of a stream are no loss
                current = self.current = MpegStream(self.stream.position, frame.rate)
            self.n_garbage += n_garbage
            n_garbage = 0
            current.is_cut = len(data) < frame.n_bytes
            if tag is not None:
                current.announced = tag or None
            elif not current.is_cut:
                current.n_frames += 1
                current.n_samples += frame.n_samples
            self.stream.skip(frame.n_bytes)
            current.stop = self.stream.position
            yield Piece(data[: frame.n_bytes], is_first)
            is_first = False
        if current is not None and current.n_frames:
            self.warnings = describe_loss(current, self.n_garbage)

    def _is_followed(self, frame: MpegFrame) -> bool:
        """Whether a frame is followed by another one of the same rate, or by the end of the stream."""
        behind = self.stream.peek(frame.n_bytes + 3)[frame.n_bytes :]
        if len(behind) < 3:
            return len(behind) == 0
        following = parse_frame(behind[1], behind[2]) if behind[0] == 0xFF else None
        return following is not None and following.rate == frame.rate

    def _measure_tag(self, head: bytes) -> int:
        if head[:3] not in (b"ID3", b"TAG") and head not in (b"APET", b"LYRI"):
            return 0
        return measure_tag(self.stream.peek(_LYRICS if head == b"LYRI" else 128))


def find_mpeg(descriptor: int, size: int, head: bytes) -> Contents:
    """Find the streams of an MPEG audio file, or of a file with an ID3 tag at the front."""
    start = measure_id3(head[:10])
    if start and os.pread(descriptor, 4, start) == b"fLaC":
        return PLAIN_FLAC
    pieces = MpegPieces(ByteStream(Slice(descriptor, 0, size)))
    begun = [pieces.current for piece in pieces if piece.is_first]
    streams = [stream for stream in begun if stream is not None and stream.n_frames]
    if not streams:
        return Contents()
    first, n_garbage = streams[0], pieces.n_garbage
    is_plain = len(streams) == 1 and first.start == start and first.announced is not None and not n_garbage
    if is_plain and not first.is_cut and abs((first.announced or 0) - first.n_frames) <= 1:
        return Contents([Part(seconds=first.n_samples / first.rate)], "mp3")
    parts = [
        Part(stream.start, stream.stop, decoder="ffmpeg", container="mp3", seconds=stream.n_samples / stream.rate)
        for stream in streams
    ]
    return Contents(parts, "mp3", describe_loss(streams[-1], n_garbage))


def describe_loss(last: MpegStream, n_garbage: int) -> dict[str, str]:
    """Return warnings on what is missing: kind → sentence.

    Args:
        last: of consecutive streams.
        n_garbage: bytes between their frames that belong to none.
    """
    missing = (last.announced or 0) - last.n_frames
    seconds = last.n_samples / last.rate
    announced = seconds + missing * last.n_samples / last.n_frames / last.rate
    if n_garbage:
        lost = f"; {announced - seconds:.2f} of its {announced:.2f} s are missing" if missing > 1 else ""
        return {"damaged": f"is damaged: {n_garbage} bytes between its frames belong to none, and were left out{lost}"}
    if missing > 1:
        return {"truncated": describe_cut(seconds, announced)}
    if last.is_cut:
        return {"truncated": "ends early: its last frame is incomplete"}
    return {}


def find_announcement(block: bytes, at: int, frame: MpegFrame) -> int | None:
    """Return the frames announced by a Xing, Info or VBRI header, 0 if it has no count; None for other frames."""
    side = frame.side if block[at + 3] >> 6 == 3 else frame.side + (15 if frame.side == 21 else 8)
    side += 0 if block[at + 1] & 1 else 2  # a checksum precedes it
    if block[at + side : at + side + 4] in (b"Xing", b"Info"):
        has_frames = block[at + side + 7] & 1
        return int.from_bytes(block[at + side + 8 : at + side + 12], "big") if has_frames else 0
    if block[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(block[at + 50 : at + 54], "big")
    return None


def measure_id3(head: bytes) -> int:
    """Return the length of an ID3v2 tag with its header; 0 for other bytes."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    length = 10
    for i, byte in enumerate(head[6:10]):
        length += (byte & 0x7F) << (7 * (3 - i))
    return length + (10 if head[5] & 0x10 else 0)


def measure_tag(block: bytes) -> int:
    """Return the length of the tag at the beginning of a block, 0 if there is none."""
    if block[:3] == b"ID3":
        return measure_id3(block[:10])
    if block[:3] == b"TAG" and len(block) >= 128:
        return 128
    if block[:8] == b"APETAGEX" and len(block) >= 32:
        return 32 + (int.from_bytes(block[12:16], "little") if block[23] & 0x20 else 0)
    if block[:11] == b"LYRICSBEGIN":
        end = max(block.find(b"LYRICS200"), block.find(b"LYRICSEND"))
        return end + 9 if end > 0 else 0
    return 0
