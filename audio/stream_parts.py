"""Parts of a compressed stream as they come: links of an Ogg, frames of MPEG audio, FLAC streams.

What `audio.ogg`, `audio.mpeg` and `audio.flac` find in a file, found in a pipe: where one stream ends and the next one
begins, and what is missing.
"""

from collections.abc import Iterator

from audio.byte_stream import ByteStream, Piece
from audio.flac import MARKER
from audio.mpeg import MpegStream, describe_loss, find_announcement, measure_tag, parse_frame
from audio.ogg import FIRST_PAGE, PAGE_HEADER, OggLink, OggPage, add_page, begin_stream, checksum, sounds_of

_BLOCK = 1 << 12  # bytes
_TAG_HEADER = 32  # bytes
_ANNOUNCEMENT = 64  # bytes from a frame's start to the end of what a Xing or VBRI header announces


class OggParts:
    """The links of an Ogg stream.

    Args:
        stream: to read from.

    Attributes:
        warnings: kind of oddity → a sentence without its subject; known at the end.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Iterator[Piece]:
        """Give page after page; bytes that belong to none are passed over."""
        link: OggLink | None = None
        n_lost = 0
        is_whole = True
        while self._find_page():
            data, page, is_whole = self._read_page()
            is_first = link is None or (bool(page.type & FIRST_PAGE) and not link.in_front)
            if link is None or is_first:
                link = OggLink(0)
            n_before = link.n_lost
            if page.type & FIRST_PAGE:
                link.streams[page.serial] = begin_stream(page)
            else:
                link.in_front = False
                add_page(link, page)
            n_lost += link.n_lost - n_before + (is_whole and not page.is_whole)
            yield Piece(data, is_first)
        if link is not None and (not is_whole or not all(stream.is_ended for stream in sounds_of(link))):
            self.warnings["truncated"] = "ends early: its last page is missing, which would be marked as the end"
        if n_lost:
            are = "is" if n_lost == 1 else "are"
            self.warnings["damaged"] = f"is damaged: {n_lost} of its pages {are} not whole"

    def _find_page(self) -> bool:
        """Pass over what is no page; whether there is another one."""
        head = self.stream.peek(PAGE_HEADER)
        while len(head) == PAGE_HEADER and head[:4] != b"OggS":
            found = head.find(b"O", 1)
            self.stream.skip(found if found > 0 else PAGE_HEADER)
            head = self.stream.peek(PAGE_HEADER)
        return len(head) == PAGE_HEADER

    def _read_page(self) -> tuple[bytes, OggPage, bool]:
        """Return its bytes, what they say, and whether they are all there."""
        n_header = PAGE_HEADER + self.stream.peek(PAGE_HEADER)[26]
        header = self.stream.peek(n_header)
        n_bytes = n_header + sum(header[PAGE_HEADER:])
        data = self.stream.peek(n_bytes)
        is_complete = len(header) == n_header and len(data) == n_bytes
        is_whole = is_complete and checksum(data) == int.from_bytes(data[22:26], "little")
        if not is_whole and is_complete and (found := data.find(b"OggS", 4)) > 0:
            data = data[:found]  # bytes are missing
        self.stream.skip(len(data))
        page = OggPage(
            0,
            len(data),
            data[5],
            int.from_bytes(data[6:14], "little", signed=True),
            int.from_bytes(data[14:18], "little"),
            int.from_bytes(data[18:22], "little"),
            data[n_header : n_header + 64],
            is_whole,
        )
        return data, page, is_complete


class FlacParts:
    """FLAC streams, one behind the other.

    Args:
        stream: to read from.

    Attributes:
        warnings: none: the decoder finds what is missing.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Iterator[Piece]:
        """Give what has come, less a marker's length."""
        held, is_first = b"", True
        while data := self.stream.read1(_BLOCK):
            held += data
            while (at := held.find(MARKER, 1)) > 0:
                yield Piece(held[:at], is_first)
                held, is_first = held[at:], True
            n_given = len(held) - len(MARKER)
            if n_given > 0:
                yield Piece(held[:n_given], is_first)
                held, is_first = held[n_given:], False
        if held:
            yield Piece(held, is_first)


class MpegParts:
    """The streams of MPEG audio (MP3, MP2), frame after frame.

    A stream ends where the rate changes, a tag or another header with a length begins.

    Args:
        stream: to read from.

    Attributes:
        warnings: kind of oddity → a sentence without its subject; known at the end.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.warnings: dict[str, str] = {}

    def __iter__(self) -> Iterator[Piece]:
        """Give frame after frame; tags, and bytes that belong to no frame, are passed over."""
        current: MpegStream | None = None
        rate = n_garbage = n_before = 0  # bytes of garbage: since the last frame, and in streams before this one
        is_first = True
        while len(head := self.stream.peek(4)) == 4:
            frame = parse_frame(head[1], head[2]) if head[0] == 0xFF else None
            is_new = is_first or n_garbage > 0 or (frame is not None and frame.rate != rate)
            if frame is None or (is_new and not self._is_followed(frame.n_bytes, frame.rate)):
                n_tag = self._measure_tag(head)
                if n_tag:
                    self.stream.skip(n_tag)
                    is_first |= head[:3] == b"ID3"  # another file begins
                    continue
                n_garbage += self._skip_garbage()
                continue
            data = self.stream.peek(max(frame.n_bytes, _ANNOUNCEMENT))
            tag = find_announcement(data.ljust(_ANNOUNCEMENT, b"\0"), 0, frame)
            is_first |= tag is not None or frame.rate != rate
            if current is None or is_first:
                n_before += current.n_garbage if current else 0
                n_garbage = 0  # what is in front of a stream is no loss
                current = MpegStream(0, 0, frame.rate, has_xing=tag is not None)
                rate = frame.rate
            current.n_garbage += n_garbage
            n_garbage = 0
            current.is_cut = len(data) < frame.n_bytes
            if tag is not None:
                current.announced = tag or None
            elif not current.is_cut:
                current.n_frames += 1
                current.n_samples += frame.n_samples
            self.stream.skip(frame.n_bytes)
            yield Piece(data[: frame.n_bytes], is_first)
            is_first = False
        if current is not None and current.n_frames:
            current.n_garbage += n_before
            self.warnings = describe_loss([current])

    def _is_followed(self, n_bytes: int, rate: int) -> bool:
        """Whether another frame of the same rate, or the end of the stream, lies behind a frame."""
        following = self.stream.peek(n_bytes + 3)[n_bytes:]
        if len(following) < 3:
            return len(following) == 0
        frame = parse_frame(following[1], following[2]) if following[0] == 0xFF else None
        return frame is not None and frame.rate == rate

    def _measure_tag(self, head: bytes) -> int:
        if head[:3] not in (b"ID3", b"TAG") and head not in (b"APET", b"LYRI"):
            return 0
        n_bytes = 1 << 13 if head == b"LYRI" else 128
        block = self.stream.peek(n_bytes)
        return measure_tag(block, 0, len(block))

    def _skip_garbage(self) -> int:
        """Pass over bytes up to the next that may begin a frame or a tag."""
        data = self.stream.read1(_BLOCK)
        places = [at for mark in (b"\xff", b"ID3", b"TAG", b"APET", b"LYRI") if (at := data.find(mark, 1)) > 0]
        n_skipped = min(places, default=len(data))
        self.stream.unread(data[n_skipped:])
        return n_skipped
