"""What a file's own bytes say, beside slow references."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio.byte_stream import ByteStream
from audio.containers import inspect
from audio.io import AudioReadError, decode
from audio.mpeg import MpegPieces, MpegStream
from audio.ogg import OggPage, checksum, read_pages
from audio.parts import Part, Slice
from tests.audio.odd_files import ODD_FILES
from tests.audio.sound_bytes import RATE, SCALE, id3, noisy, patched, variable_mp3, wav, without_xing, written


def checksum_bit_by_bit(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


@pytest.fixture
def look(tmp_path: Path):
    """Call with bytes: what is found in a file of these bytes."""

    def look(data: bytes):
        (tmp_path / "x").write_bytes(data)
        with open(tmp_path / "x", "rb") as file:
            return inspect(file.fileno(), len(data))

    return look


def pages_of(data: bytes) -> list[OggPage]:
    return list(read_pages(ByteStream(io.BytesIO(data))))


def streams_of(data: bytes) -> tuple[list[MpegStream | None], int]:
    """The streams, and bytes of garbage between their frames."""
    pieces = MpegPieces(ByteStream(io.BytesIO(data)))
    return [pieces.current for piece in pieces if piece.is_first], pieces.n_garbage


def test_the_checksum_of_a_page_is_that_of_the_format() -> None:
    for seed in range(5):
        page = b"OggS" + np.random.default_rng(seed).bytes(40 + seed)
        assert checksum(page) == checksum_bit_by_bit(page[:22] + bytes(4) + page[26:])


def test_pages_lie_one_behind_the_other_and_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audio.byte_stream._BLOCK", 70_000)  # bytes read at once
    data = written("OGG", "VORBIS", sound=noisy(range(300, 900, 20)))
    pages = pages_of(data)
    assert b"".join(page.data for page in pages) == data
    assert [page.start for page in pages] == [0, *np.cumsum([len(page.data) for page in pages[:-1]])]
    assert len(data) > 1 << 16
    assert all(page.is_whole for page in pages)
    assert pages[-1].place == 30 * RATE
    for at in (200, len(data) // 2, len(data) - 1):
        damaged = pages_of(patched(data, at, bytes([data[at] ^ 0xAA])))
        assert [page.is_whole for page in damaged].count(False) == 1


def test_bytes_missing_from_a_page_cost_that_page_alone() -> None:
    data = written("OGG", "VORBIS", sound=noisy(range(300, 900, 20)))
    pages = pages_of(data[: len(data) // 2] + data[len(data) // 2 + 7 :])
    assert len(pages) == len(pages_of(data))
    assert [page.is_whole for page in pages].count(False) == 1


@pytest.mark.parametrize("make", [variable_mp3, lambda: written("MP3", rate=44100), lambda: written("MP3", rate=8000)])
def test_frames_of_an_mp3_are_counted_as_its_header_has_them(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audio.byte_stream._BLOCK", 9000)  # bytes read at once
    data = make()
    (stream,), _ = streams_of(data)
    assert stream.n_frames == stream.announced
    assert (stream.start, stream.stop) == (0, len(data))
    (bare,), n_garbage = streams_of(without_xing(data))
    assert (bare.n_frames, bare.announced, n_garbage) == (stream.n_frames, None, 0)
    tag = id3(5000)  # it holds what looks like frames
    (tagged,), n_garbage = streams_of(tag + data + b"TAG" + bytes(125))
    assert (tagged.start, tagged.n_frames, n_garbage) == (5010, stream.n_frames, 0)
    (cut,), _ = streams_of(data[:-5])
    assert (cut.n_frames, cut.is_cut) == (stream.n_frames - 1, True)
    (damaged,), n_garbage = streams_of(patched(data, len(data) // 2, bytes(3000)))
    assert 2000 < n_garbage < 4500  # whole frames
    assert 0 < stream.n_frames - damaged.n_frames < 30


def test_bytes_ahead_are_there_and_are_taken_once() -> None:
    data = bytes(range(256)) * 300
    for source in (io.BytesIO(data), OnlyRead(data)):
        stream = ByteStream(source)
        assert stream.peek(10) == data[:10]
        assert (stream.read(3), stream.position) == (data[:3], 3)
        stream.skip(70_000)
        assert stream.peek(5) == data[70_003:70_008]
        stream.unread(b"xyz")
        assert (stream.read(5), stream.position) == (b"xyz" + data[70_003:70_005], 70_005)
        rest = b"".join(iter(lambda: stream.read1(999), b""))  # noqa: B023
        assert rest == data[70_005:]
        assert (stream.position, stream.peek(1), stream.read(1)) == (len(data), b"", b"")


class OnlyRead:
    """A source that waits for all that it is to read."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


def test_most_files_are_left_to_libsndfile_as_they_are(look) -> None:
    for data in (wav(), *(written(format) for format in ("WAV", "FLAC", "AIFF", "AU", "CAF", "W64", "RF64", "VOC"))):
        contents = look(data)
        assert contents.parts == [Part()]
        assert contents.warnings == {}
    for data in (written("OGG", "VORBIS"), written("OGG", "OPUS"), written("MP3")):
        (part,) = look(data).parts
        assert (part.start, part.stop, part.decoder) == (0, None, "libsndfile")
        assert part.seconds == pytest.approx(len(SCALE), abs=0.11)


@pytest.mark.parametrize("row", [row for row in ODD_FILES if row.seconds and row.name.endswith((".wav", ".flac"))][::4])
def test_cutting_a_file_anywhere_is_reported_or_loses_nothing(tmp_path: Path, row) -> None:
    if row.warnings or row.seconds != len(SCALE):
        return
    for share in (0.3, 0.55, 0.9):
        (tmp_path / row.name).write_bytes(row.data[: int(share * len(row.data))])
        decoded = decode(tmp_path / row.name)
        is_whole = len(decoded.waveform) / decoded.sample_rate > row.seconds - 0.1
        assert is_whole or "truncated" in decoded.warnings or "of a" in row.name or "length 0" in row.name


def test_random_bytes_in_a_file_never_raise_anything_but_a_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for row in ODD_FILES[::2]:
        for _ in range(3):
            data = bytearray(row.data)
            for at in rng.integers(0, max(min(len(data), 3000), 1), 12):
                data[at : at + 1] = rng.bytes(1)
            (tmp_path / row.name).write_bytes(data)
            with contextlib.suppress(AudioReadError):
                decode(tmp_path / row.name)


def test_a_slice_reads_as_its_bytes_do(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb") as file:
        for head in (b"", b"HEAD"):
            expected = io.BytesIO(head + data[100 + len(head) : 900])
            part = Slice(file.fileno(), 100, 900, head)
            for offset, whence, n in ((0, 0, 3), (0, 1, 5), (-10, 2, 99), (700, 0, 50), (790, 0, 50), (2, 0, 600)):
                assert part.seek(offset, whence) == expected.seek(offset, whence)
                got = b""
                while len(got) < n and (more := part.read(n - len(got))):
                    got += more
                assert got == expected.read(n)
                assert part.tell() == expected.tell()
            buffer = bytearray(30)
            part.seek(0)
            assert part.readinto(memoryview(buffer)) == 30
            assert bytes(buffer) == expected.getvalue()[:30]


def test_libsndfile_reads_a_slice_as_a_file(tmp_path: Path) -> None:
    data = written("FLAC", sound=noisy(SCALE))
    (tmp_path / "x").write_bytes(b"in front" + data + b"behind")
    with open(tmp_path / "x", "rb") as file:
        samples, _ = soundfile.read(Slice(file.fileno(), 8, 8 + len(data)), dtype="float32")
    np.testing.assert_array_equal(samples, soundfile.read(io.BytesIO(data), dtype="float32")[0])
