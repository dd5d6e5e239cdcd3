"""What a file's own bytes say, beside slow references."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio.containers import inspect
from audio.io import AudioReadError, decode
from audio.mpeg import _scan
from audio.ogg import _pages, checksum
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
    """Call with a function and bytes: what the function finds in a file of these bytes."""

    def look(find, data: bytes):
        (tmp_path / "x").write_bytes(data)
        with open(tmp_path / "x", "rb") as file:
            return find(file.fileno(), len(data))

    return look


def test_the_checksum_of_a_page_is_that_of_the_format() -> None:
    for seed in range(5):
        page = b"OggS" + np.random.default_rng(seed).bytes(40 + seed)
        assert checksum(page) == checksum_bit_by_bit(page[:22] + bytes(4) + page[26:])


def test_pages_lie_one_behind_the_other_and_are_whole(look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audio.ogg._BLOCK", 70_000)  # bytes read at once
    data = written("OGG", "VORBIS", sound=noisy(range(300, 900, 20)))
    pages = look(lambda descriptor, size: list(_pages(descriptor, size)), data)
    assert [page.start for page in pages] == [0, *(page.stop for page in pages[:-1])]
    assert pages[-1].stop == len(data) > 1 << 16
    assert all(page.is_whole for page in pages)
    assert pages[-1].place == 30 * RATE
    for at in (200, len(data) // 2, len(data) - 1):
        damaged = look(
            lambda descriptor, size: list(_pages(descriptor, size)), patched(data, at, bytes([data[at] ^ 0xAA]))
        )
        assert [page.is_whole for page in damaged].count(False) == 1


def test_bytes_missing_from_a_page_cost_that_page_alone(look) -> None:
    data = written("OGG", "VORBIS", sound=noisy(range(300, 900, 20)))
    shorter = data[: len(data) // 2] + data[len(data) // 2 + 7 :]
    pages = look(lambda descriptor, size: list(_pages(descriptor, size)), shorter)
    whole = look(lambda descriptor, size: list(_pages(descriptor, size)), data)
    assert len(pages) == len(whole)
    assert [page.is_whole for page in pages].count(False) == 1


@pytest.mark.parametrize("make", [variable_mp3, lambda: written("MP3", rate=44100), lambda: written("MP3", rate=8000)])
def test_frames_of_an_mp3_are_counted_as_its_header_has_them(look, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audio.mpeg._BLOCK", 9000)  # bytes read at once
    data = make()
    (stream,) = look(_scan, data)
    assert stream.n_frames == stream.announced
    assert (stream.start, stream.stop) == (0, len(data))
    (bare,) = look(_scan, without_xing(data))
    assert (bare.n_frames, bare.announced, bare.n_garbage) == (stream.n_frames, None, 0)
    (tagged,) = look(_scan, id3(5000) + data + b"TAG" + bytes(125))  # the tag holds what looks like frames
    assert (tagged.start, tagged.n_frames, tagged.n_garbage) == (5010, stream.n_frames, 0)
    (cut,) = look(_scan, data[:-5])
    assert (cut.n_frames, cut.is_cut) == (stream.n_frames - 1, True)


def test_most_files_are_left_to_libsndfile_as_they_are(look) -> None:
    for data in (wav(), *(written(format) for format in ("WAV", "FLAC", "AIFF", "AU", "CAF", "W64", "RF64", "VOC"))):
        contents = look(inspect, data)
        assert contents.parts == [Part()]
        assert contents.warnings == {}
    for data in (written("OGG", "VORBIS"), written("OGG", "OPUS"), written("MP3")):
        (part,) = look(inspect, data).parts
        assert (part.start, part.stop, part.decoder) == (0, None, "libsndfile")
        assert part.seconds == pytest.approx(len(SCALE), abs=0.11)


@pytest.mark.parametrize("row", [row for row in ODD_FILES if row.seconds and row.name.endswith((".wav", ".flac"))][::4])
def test_cutting_a_file_anywhere_is_told_or_loses_nothing(tmp_path: Path, row) -> None:
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
