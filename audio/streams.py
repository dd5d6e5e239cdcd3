"""Sound that comes in as bytes: a microphone, a radio, a file through a pipe, a recording that still grows.

What a stream holds is known by how it begins. Raw samples, WAV and other uncompressed ones are given as they come;
everything else is decoded by FFmpeg, packet by packet.

S samples.
"""

from collections.abc import Iterator
from io import RawIOBase
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from audio.byte_stream import ByteStream, StreamPieces, split_parts
from audio.chunks import has_header, read_header
from audio.decoders import Blocks, FileDecoder
from audio.errors import AudioReadError
from audio.ffmpeg import FFmpegBlocks, FFmpegError
from audio.flac import FlacPieces
from audio.mpeg import MpegPieces, measure_id3
from audio.ogg import OggPieces
from audio.parts import RawFormat
from audio.recognition import N_GUESSED, describe_foreign, guess_frames, has_signature
from audio.stream_samples import FORMATS, Encoding, SampleBytes, decode_samples, raw_format

__all__ = ["FORMATS", "Encoding", "StreamDecoder"]

_HEAD = 32  # bytes, in which all signatures lie
_NO_WAY_BACK = "a pipe cannot be read backwards: give the file itself"
_MOST_BOXES = 1 << 20  # bytes of an MP4 in which its index is looked for


class StreamDecoder(FileDecoder):
    """The blocks of a stream with their sample rates: float32 (S, channels), full scale 1.0, and Hz.

    Iterating, once, decodes; rate and channels may change from one block to the next.

    Args:
        source: bytes of a sound file of any kind, or raw samples. It is read forward only, but for an MP4 whose index
            lies at its end: then `source` has to be a file.
        raw: the encoding of raw samples.
        is_raw: the stream is raw unless it begins with the header or signature of a file. Else frames without a
            signature (MP3, AAC, AC-3, MPEG-TS) are looked for in its first 8 kB, and text is refused.
        block_seconds: how much to wait for at once.
        name: how messages call the stream.

    Attributes:
        warnings: kind → what is odd, see `audio.io.AudioBlocks`; known at the end.

    Raises:
        UserError: an encoding that is not known here.
        AudioReadError: while iterating: no sound, or samples that are not finite.
    """

    def __init__(
        self,
        source: BinaryIO,
        raw: Encoding,
        *,
        is_raw: bool = False,
        block_seconds: float = 0.1,
        name: str = "standard input",
    ) -> None:
        super().__init__(Path(name))
        self.stream = ByteStream(source)
        self.raw = raw_format(raw)
        self.is_raw = is_raw
        self.block_seconds = block_seconds

    def _blocks(self) -> Blocks:
        blocks = self._recognised()
        first = next(blocks, None)
        if first is None:
            raise AudioReadError(self.path, "has no samples", kind="empty")
        yield from chain((first,), blocks)

    def _recognised(self) -> Blocks:
        """Choose by the first bytes who decodes."""
        is_file = _is_file(self.stream.source)
        head = self.stream.peek(4)
        if head == b"OggS":
            yield from self._streams(OggPieces(self.stream), "ogg")
        elif head == b"fLaC":
            yield from self._streams(FlacPieces(self.stream), "flac")
        elif head[:3] == b"ID3":
            yield from self._tagged()
        elif has_header(self.stream.peek(12)):
            yield from self._uncompressed(is_file)
        elif has_signature(head := self.stream.peek(_HEAD)):
            yield from self._with_signature(head, is_file)
        else:
            yield from self._without_signature()

    def _without_signature(self) -> Blocks:
        if not self.is_raw:
            head = self.stream.peek(N_GUESSED)
            foreign = describe_foreign(head)
            if foreign is not None:
                raise FFmpegError(f"no sound found in it: {foreign}")
            container = guess_frames(head)
            if container == "mp3":
                yield from self._streams(MpegPieces(self.stream), "mp3")
                return
            if container is not None:
                yield from self._foreign(self.stream, container)
                return
        n_block = self._n_block(self.raw)
        yield from self._samples(iter(lambda: self.stream.read1(n_block), b""), self.raw)

    def _tagged(self) -> Blocks:
        """Decode what lies behind an ID3 tag: MP3, or what should have none."""
        while n_tag := measure_id3(self.stream.peek(10)):
            self.stream.skip(n_tag)
        if self.stream.peek(4) == b"fLaC":
            yield from self._streams(FlacPieces(self.stream), "flac")
        elif guess_frames(self.stream.peek(N_GUESSED)) == "aac":
            yield from self._foreign(self.stream, "aac")
        else:
            yield from self._streams(MpegPieces(self.stream), "mp3")

    def _with_signature(self, head: bytes, is_file: bool) -> Blocks:
        """Decode what FFmpeg knows by its first bytes; a file that was redirected here can be read backwards."""
        is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"skip")
        if is_mp4 and not is_file and self._has_index_behind():
            raise FFmpegError(
                f"the index of this MP4 lies behind its sound, and {_NO_WAY_BACK}, or put its index in front, "
                "`ffmpeg -i IN.m4a -c copy -movflags +faststart OUT.m4a`"
            )
        try:
            yield from self._whole(is_file)
        except FFmpegError as error:
            if is_mp4 and error.is_unknown:
                raise FFmpegError("its index is missing: it was cut, or is not finished") from None
            raise

    def _whole(self, is_file: bool) -> Blocks:
        """Decode the whole stream with FFmpeg, as a file where it can be read backwards."""
        if is_file:
            self.stream.source.seek(0)
            yield from self._foreign(self.stream.source, "")
            return
        try:
            yield from self._foreign(self.stream, "")
        except FFmpegError as error:
            raise FFmpegError(f"{error.reason}; {_NO_WAY_BACK}", is_unknown=error.is_unknown) from None

    def _has_index_behind(self) -> bool:
        """Whether an MP4 begins with its sound: box by box, as far as no sound is passed over."""
        position = 0
        while position < _MOST_BOXES:
            head = self.stream.peek(position + 8)[position:]
            if len(head) < 8 or head[4:8] in (b"moov", b"mdat"):
                return head[4:8] == b"mdat"
            position += max(int.from_bytes(head[:4], "big"), 8)
        return False

    def _foreign(self, source: ByteStream | BinaryIO | RawIOBase, container: str) -> Blocks:
        """Decode with FFmpeg."""
        blocks = FFmpegBlocks(source, block_seconds=self.block_seconds, container=container)  # type: ignore[arg-type]
        yield from self._with_ffmpeg(blocks, 0, None)

    def _streams(self, pieces: StreamPieces, container: str) -> Blocks:
        """Decode streams that lie one behind the other, each on its own."""
        error: FFmpegError | None = None
        is_decoded = False
        for part in split_parts(iter(pieces)):
            try:
                for block in self._foreign(part, container):  # type: ignore[arg-type]
                    is_decoded = True
                    yield block
            except FFmpegError as raised:
                error = raised
        self.warnings |= pieces.warnings
        if not is_decoded:
            raise error or FFmpegError("no sound found in it")
        if error is not None and not error.empty:
            self.warnings.setdefault("damaged", f"is damaged: part of it cannot be decoded ({error.reason})")

    def _uncompressed(self, is_file: bool) -> Blocks:
        """Read WAV, Wave64, AIFF, CAF or AU, and whatever of them lies behind."""
        while True:
            header = read_header(self.stream)
            if header is None:
                raise FFmpegError("it ends within its header, or holds no samples")
            if header.raw is None:
                self.stream.unread(header.data)
                yield from self._whole(is_file)
                return
            data = SampleBytes(self.stream, header, self._n_block(header.raw))
            yield from self._samples(iter(data), header.raw)
            if data.n_missing:
                rate = header.raw.frame_bytes * header.raw.sample_rate
                self._note_loss(data.n_read / rate, (data.n_read + data.n_missing) / rate, is_cut=True)
            if not data.is_followed:
                return

    def _n_block(self, raw: RawFormat) -> int:
        """Bytes to wait for at once."""
        return max(round(self.block_seconds * raw.sample_rate), 1) * raw.frame_bytes

    def _samples(self, pieces: Iterator[bytes], raw: RawFormat) -> Blocks:
        if raw.sample_rate < 1 or raw.channels < 1:
            raise FFmpegError("its header announces no sample rate, or no channels")
        blocks: Blocks = ((block, raw.sample_rate) for block in decode_samples(pieces, raw))
        return self._restored(blocks) if raw.subtype in ("FLOAT", "DOUBLE") else blocks


def _is_file(source: BinaryIO | RawIOBase) -> bool:
    """Whether this is a file at its beginning, in which decoders may move."""
    try:
        return source.seekable() and source.tell() == 0
    except (AttributeError, OSError, ValueError):
        return False
