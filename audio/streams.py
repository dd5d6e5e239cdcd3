"""Decode streams: a microphone, a radio, a file through a pipe, a recording that still grows.

The format is detected from the first bytes. Raw samples, WAV and other uncompressed formats are decoded here, as they
come; everything else is decoded by FFmpeg, packet by packet.

S samples.
"""

from collections.abc import Iterator
from io import RawIOBase
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from audio.byte_stream import ByteStream, StreamPieces, split_parts
from audio.chunks import check_header, has_header, read_header
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

_HEAD = 32  # bytes, which contain all signatures
_NO_SEEKING = "a pipe is not seekable: give the file itself"
_MAX_BOXES = 1 << 20  # bytes of an MP4 in which its index is searched


class StreamDecoder(FileDecoder):
    """The blocks of a stream, float32 (S, channels) with full scale 1.0, and their sample rates in Hz.

    Iterating, once, decodes; rate and channels may change from block to block.

    Args:
        source: bytes of a sound file of any kind, or raw samples. It is read forward only, except an MP4 whose index is
            at its end, for which `source` must be seekable.
        raw: the encoding of raw samples.
        is_raw: the stream is raw unless it begins with the header or signature of a file. Else frames without a
            signature (MP3, AAC, AC-3, MPEG-TS) are searched in its first 8 kB, and text is refused.
        block_seconds: length to wait for at once.
        name: of the stream, for messages.

    Attributes:
        warnings: kind → sentence, see `audio.io.AudioBlocks`; complete at the end.

    Raises:
        UserError: an encoding that is not supported.
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
        blocks = self._detect_and_decode()
        first = next(blocks, None)
        if first is None:
            raise AudioReadError(self.path, "has no samples", kind="empty")
        yield from chain((first,), blocks)

    def _detect_and_decode(self) -> Blocks:
        """Choose the decoder by the first bytes."""
        is_file = _is_file(self.stream.source)
        head = self.stream.peek(4)
        if head == b"OggS":
            yield from self._decode_streams(OggPieces(self.stream), "ogg")
        elif head == b"fLaC":
            yield from self._decode_streams(FlacPieces(self.stream), "flac")
        elif head[:3] == b"ID3":
            yield from self._decode_behind_id3()
        elif has_header(self.stream.peek(12)):
            yield from self._decode_uncompressed(is_file)
        elif has_signature(head := self.stream.peek(_HEAD)):
            yield from self._decode_signed(head, is_file)
        else:
            yield from self._decode_unsigned()

    def _decode_unsigned(self) -> Blocks:
        if not self.is_raw:
            head = self.stream.peek(N_GUESSED)
            foreign = describe_foreign(head)
            if foreign is not None:
                raise FFmpegError(f"no sound found in it: {foreign}")
            container = guess_frames(head)
            if container == "mp3":
                yield from self._decode_streams(MpegPieces(self.stream), "mp3")
                return
            if container is not None:
                yield from self._decode_container(self.stream, container)
                return
        n_block = self._count_block_bytes(self.raw)
        yield from self._decode_raw(iter(lambda: self.stream.read1(n_block), b""), self.raw)

    def _decode_behind_id3(self) -> Blocks:
        """Decode the sound behind an ID3 tag: MP3, or a format that should have none."""
        while n_tag := measure_id3(self.stream.peek(10)):
            self.stream.skip(n_tag)
        if self.stream.peek(4) == b"fLaC":
            yield from self._decode_streams(FlacPieces(self.stream), "flac")
        elif guess_frames(self.stream.peek(N_GUESSED)) == "aac":
            yield from self._decode_container(self.stream, "aac")
        else:
            yield from self._decode_streams(MpegPieces(self.stream), "mp3")

    def _decode_signed(self, head: bytes, is_file: bool) -> Blocks:
        """Decode a format that FFmpeg detects by its signature; a file that is redirected here is seekable."""
        is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"skip")
        if is_mp4 and not is_file and self._has_index_behind():
            raise FFmpegError(
                f"the index of this MP4 is behind its sound, and {_NO_SEEKING}, or move its index to the front, "
                "`ffmpeg -i IN.m4a -c copy -movflags +faststart OUT.m4a`"
            )
        try:
            yield from self._decode_whole(is_file)
        except FFmpegError as error:
            if is_mp4 and error.is_unknown:
                raise FFmpegError("its index is missing: it is truncated, or was not finished") from None
            raise

    def _decode_whole(self, is_file: bool) -> Blocks:
        """Decode the whole stream with FFmpeg, as a file where it is seekable."""
        if is_file:
            self.stream.source.seek(0)
            yield from self._decode_container(self.stream.source, "")
            return
        try:
            yield from self._decode_container(self.stream, "")
        except FFmpegError as error:
            raise FFmpegError(f"{error.reason}; {_NO_SEEKING}", is_unknown=error.is_unknown) from None

    def _has_index_behind(self) -> bool:
        """Whether an MP4 begins with its sound: checks its boxes up to the first one of sound."""
        position = 0
        while position < _MAX_BOXES:
            head = self.stream.peek(position + 8)[position:]
            if len(head) < 8 or head[4:8] in (b"moov", b"mdat"):
                return head[4:8] == b"mdat"
            position += max(int.from_bytes(head[:4], "big"), 8)
        return False

    def _decode_container(self, source: ByteStream | BinaryIO | RawIOBase, container: str) -> Blocks:
        """Decode with FFmpeg."""
        blocks = FFmpegBlocks(source, block_seconds=self.block_seconds, container=container)  # type: ignore[arg-type]
        yield from self._decode_with_ffmpeg(blocks, 0, None)

    def _decode_streams(self, pieces: StreamPieces, container: str) -> Blocks:
        """Decode streams one after the other, each on its own."""
        error: FFmpegError | None = None
        is_decoded = False
        for part in split_parts(iter(pieces)):
            try:
                for block in self._decode_container(part, container):  # type: ignore[arg-type]
                    is_decoded = True
                    yield block
            except FFmpegError as raised:
                error = raised
        self.warnings |= pieces.warnings
        if not is_decoded:
            raise error or FFmpegError("no sound found in it")
        if error is not None and not error.empty:
            self.warnings.setdefault("damaged", f"is damaged: part of it cannot be decoded ({error.reason})")

    def _decode_uncompressed(self, is_file: bool) -> Blocks:
        """Decode WAV, Wave64, AIFF, CAF or AU, and further files behind it."""
        while True:
            header = read_header(self.stream)
            if header is None:
                raise FFmpegError("it ends within its header, or has no samples")
            if header.raw is None:
                self.stream.unread(header.data)
                yield from self._decode_whole(is_file)
                return
            data = SampleBytes(self.stream, header, self._count_block_bytes(header.raw))
            yield from self._decode_raw(iter(data), header.raw)
            if data.n_missing:
                rate = header.raw.frame_bytes * header.raw.sample_rate
                self._note_loss(data.n_read / rate, (data.n_read + data.n_missing) / rate, is_cut=True)
            elif data.n_read == header.n_bytes and (text := check_header(header)):  # else its lengths are old
                self.warnings["inconsistent"] = text
            if not data.is_followed:
                return

    def _count_block_bytes(self, raw: RawFormat) -> int:
        """Return the bytes to wait for at once."""
        return max(round(self.block_seconds * raw.sample_rate), 1) * raw.frame_bytes

    def _decode_raw(self, pieces: Iterator[bytes], raw: RawFormat) -> Blocks:
        if raw.sample_rate < 1 or raw.channels < 1:
            raise FFmpegError("its header announces no sample rate, or no channels")
        blocks: Blocks = ((block, raw.sample_rate) for block in decode_samples(pieces, raw))
        return self._restore_scale(blocks) if raw.subtype in ("FLOAT", "DOUBLE") else blocks


def _is_file(source: BinaryIO | RawIOBase) -> bool:
    """Whether a source is a seekable file at its beginning."""
    try:
        return source.seekable() and source.tell() == 0
    except (AttributeError, OSError, ValueError):
        return False
