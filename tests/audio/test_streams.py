"""What a stream of bytes holds is recognised and decoded; samples that only look like a file stay samples."""

import io
import os
import struct
import threading

import numpy as np
import pytest

from audio.errors import AudioReadError
from audio.io import LOSSES, decode
from audio.recognition import guess_frames
from audio.streams import Encoding, StreamDecoder
from common.errors import UserError
from tests.audio.odd_files import ODD_FILES, OddFile
from tests.audio.sound_bytes import RATE, encoded, noisy, patched, tones, wav, without_xing, written
from tests.audio.test_odd_files import check_tones

# Their index or tables lie behind the sound, so that no pipe can be decoded as it comes.
BACKWARDS = {
    *("apple lossless.caf", "amiga.8svx", "cut.8svx", "aac.m4a", "apple lossless.m4a", "film.mp4", "film.mov"),
    *("telephone.3gp", "silent film.mp4", "cut, index at the end.m4a"),
}
RAW = Encoding(RATE)
RAW_ALIKE = {"zeros.mp3", "noise.wav"}  # they begin as any samples might


class Pipe(io.RawIOBase):
    """Bytes that come in pieces and can be read forward only."""

    def __init__(self, data: bytes, n_bytes: int = 4096) -> None:
        self.file, self.n_bytes = io.BytesIO(data), n_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.file.read(min(size, self.n_bytes) if size >= 0 else self.n_bytes)

    read1 = read


def decode_stream(data: bytes, raw: Encoding = RAW, n_bytes: int = 4096, **how):
    """Blocks with their rates, and what is odd."""
    decoder = StreamDecoder(Pipe(data, n_bytes), raw, **how)
    return list(decoder), decoder.warnings


def join(blocks) -> np.ndarray:
    """Samples of the first channel at the rate of the first block: two rates of sound are not compared."""
    return np.concatenate([block[:, 0] for block, rate in blocks if rate == blocks[0][1]])


@pytest.mark.parametrize("row", ODD_FILES, ids=lambda row: row.name)
def test_every_kind_of_file_comes_through_a_pipe_with_its_length_or_is_reported(row: OddFile) -> None:
    if row.name in BACKWARDS:
        with pytest.raises(AudioReadError, match=r"standard input: cannot be .* a pipe is not seekable"):
            decode_stream(row.data)
        return
    if row.name in RAW_ALIKE:
        assert sum(len(block) for block, _ in decode_stream(row.data)[0]) == len(row.data) // 2
        return
    if row.seconds is None:
        with pytest.raises(AudioReadError) as caught:
            decode_stream(row.data)
        assert (row.refusal if row.name != "nothing.wav" else "has no samples") in caught.value.reason
        return
    blocks, warnings = decode_stream(row.data)
    assert sum(len(block) / rate for block, rate in blocks) == pytest.approx(row.seconds, abs=0.1)
    assert LOSSES & set(warnings) == LOSSES & set(row.warnings)
    if "out_of_phase" not in row.warnings:
        check_tones(join(blocks), blocks[0][1], row)


@pytest.mark.parametrize("name", ["aac.m4a", "apple lossless.caf", "amiga.8svx", "film.mov"])
def test_what_has_to_be_read_backwards_is_decoded_where_it_is_a_file(name: str) -> None:
    (row,) = (row for row in ODD_FILES if row.name == name)
    blocks = list(StreamDecoder(io.BytesIO(row.data), Encoding(RATE)))
    assert sum(len(block) / rate for block, rate in blocks) == pytest.approx(6.0, abs=0.1)
    check_tones(join(blocks), blocks[0][1], row)
    within = io.BytesIO(b"another program's" + row.data)  # the places in it are counted from the beginning of the file
    within.seek(len(b"another program's"))
    with pytest.raises(AudioReadError, match="is not seekable"):
        list(StreamDecoder(within, Encoding(RATE)))


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda subtype=s: written("WAV", subtype)
            for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
        ),
        *(lambda subtype=s: written("WAV", subtype) for s in ("ULAW", "ALAW")),
        lambda: written("WAV", "PCM_24", endian="BIG"),
        lambda: written("AIFF", "PCM_S8"),
        lambda: written("AIFF", "PCM_24", channels=3),
        lambda: written("AU", "DOUBLE"),
        lambda: written("CAF", "PCM_16", endian="LITTLE"),
        lambda: written("W64", "PCM_16", channels=2),
        lambda: written("FLAC", "PCM_24", channels=2),
    ],
)
@pytest.mark.parametrize("n_bytes", [1000, 65536])
def test_samples_are_those_of_the_file(make, n_bytes: int, tmp_path) -> None:
    data = make()
    (tmp_path / "x").write_bytes(data)
    blocks, warnings = decode_stream(data, n_bytes=n_bytes)
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), decode_all(tmp_path / "x"))
    assert warnings == {}


def decode_all(path) -> np.ndarray:
    """(S, channels)."""
    return decode(path, mix_down=False).waveform


@pytest.mark.parametrize("kind", ["mp3", "adts", "mpegts", "ac3", "eac3", "latm"])
@pytest.mark.parametrize("n_lost", [0, 333])
def test_a_radio_without_signature_is_recognised_wherever_one_tunes_in(kind: str, n_lost: int) -> None:
    codec = {"mp3": "libmp3lame", "adts": "aac", "mpegts": "aac", "latm": "aac"}.get(kind, kind)
    data = encoded(kind, codec, rate=48000)
    data = without_xing(data) if kind == "mp3" else data
    blocks, _ = decode_stream(data[n_lost:])
    seconds = sum(len(block) / rate for block, rate in blocks)
    assert {rate for _, rate in blocks} == {48000}
    assert seconds == pytest.approx(6.0, abs=0.1 if n_lost == 0 else 0.5)


def test_frames_are_decoded_as_they_come() -> None:
    """A decoder that waits for the end would wait for ever."""
    data = without_xing(written("MP3", hertz=range(300, 3300, 100), rate=44100))
    reading, writing = os.pipe()
    is_decoded = threading.Event()

    def send() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data[: len(data) // 2])
            pipe.flush()
            came_in_time.append(is_decoded.wait(20))
            pipe.write(data[len(data) // 2 :])

    came_in_time: list[bool] = []
    sender = threading.Thread(target=send)
    sender.start()
    seconds = 0.0
    with os.fdopen(reading, "rb") as pipe:
        for block, rate in StreamDecoder(pipe, Encoding(RATE)):
            seconds += len(block) / rate
            if seconds > 10.0:  # of the 15 that have come; FFmpeg reads some ahead
                is_decoded.set()
    sender.join()
    assert came_in_time == [True]
    assert seconds == pytest.approx(30.0, abs=0.1)


def frame_sync(n_samples: int = 20000) -> bytes:
    """Samples of 16 bits that begin like a frame of an MP3: 0xFFFB, 128 kbit/s, 44.1 kHz."""
    noise = np.random.default_rng(1).integers(-3000, 3000, n_samples).astype("<i2").tobytes()
    return b"\xff\xfb\x90\x64" + noise


def test_samples_that_begin_like_a_frame_are_samples() -> None:
    data = frame_sync()
    one_more = patched(data, 417, b"\xff\xfb\x90\x64")  # and a second frame where it should be
    for given in (data, one_more, patched(one_more, 834, b"\xff\xfb\x94\x64")):  # the third has another rate
        blocks, warnings = decode_stream(given)
        samples = np.concatenate([block[:, 0] for block, _ in blocks])
        np.testing.assert_array_equal(samples, np.frombuffer(given, "<i2") / np.float32(32768))
        assert warnings == {}


def test_what_an_option_declares_raw_is_raw_unless_it_has_a_header() -> None:
    data = without_xing(written("MP3"))
    data = data[: len(data) // 2 * 2]
    assert sum(len(block) for block, _ in decode_stream(data, is_raw=True)[0]) == len(data) // 2
    assert sum(len(block) / rate for block, rate in decode_stream(data)[0]) == pytest.approx(6.0, abs=0.1)
    text = b"these are words, not samples. " * 40
    assert sum(len(block) for block, _ in decode_stream(text, is_raw=True)[0]) == len(text) // 2
    for whole in (wav(), written("FLAC"), written("OGG", "VORBIS")):
        assert sum(len(block) for block, _ in decode_stream(whole, Encoding(8000), is_raw=True)[0]) == 6 * RATE


@pytest.mark.parametrize("seed", range(20))
def test_no_samples_are_taken_for_frames(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = 10.0 ** rng.uniform(-4, 0)
    sound = levels * rng.standard_normal(8000)
    for kind in ("<i2", "<i4", "u1", "<f4"):
        scale = {"<i2": 32767, "<i4": 2147483647, "u1": 127}.get(kind, 1)
        samples = np.clip(sound * scale, -scale, scale) + (128 if kind == "u1" else 0)
        assert guess_frames(samples.astype(kind).tobytes()[:8192]) is None
    period = rng.integers(-32768, 32767, rng.integers(1, 9)).astype("<i2").tobytes()
    assert guess_frames((period * 8192)[:8192]) is None
    assert guess_frames(np.full(4096, rng.integers(-2000, 2000), "<i2").tobytes()) is None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "has no samples"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "no sound found in it: it is text"),
        ("Grüße, müde Bären äsen.".encode() * 400, "it is text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is a picture"),
        (b"\x1f\x8b\x08" + bytes(99), "it is compressed with gzip"),
        (b"PK\x03\x04" + bytes(99), "it is a zip archive"),
        (b"2BIT" + bytes(200), "no sound found in it"),
        (b"ID3\x04\0\0\0\0\0\x05hello", "no sound found in it"),
        (wav()[:30], "it ends within its header"),
        (written("WAV", "FLOAT", sound=np.array([0.5, np.nan])), "not finite numbers"),
        (struct.pack("<2f", 0.5, 1e25), "full scale is 1"),
        (written("WAV", sound=np.zeros(9), rate=20), "announces 20 Hz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # some files hold the time at which they were written
)
def test_what_is_no_sound_is_a_sentence(data: bytes, sentence: str) -> None:
    raw = Encoding(RATE, 1, "f32le" if len(data) == 8 else "s16le")
    with pytest.raises(UserError, match=sentence) as caught:
        decode_stream(data, raw)
    assert str(caught.value).startswith("standard input: ")


def test_integers_as_floats_are_scaled_and_silence_is_not_held_back() -> None:
    whole = np.rint(tones(range(300, 600, 100)) * 32767)
    silent = np.zeros(2 * RATE, "<f4").tobytes()
    for data in (written("WAV", "FLOAT", sound=whole.astype(np.float32)), silent + whole.astype("<f4").tobytes()):
        blocks, warnings = decode_stream(data, Encoding(RATE, 1, "f32le"))
        samples = np.concatenate([block[:, 0] for block, _ in blocks])
        np.testing.assert_allclose(samples[-len(whole) :], whole / 32768, atol=1e-7)
        assert "integers of 16 bits" in warnings["rescaled"]
    first, rate = next(iter(StreamDecoder(Pipe(silent), Encoding(RATE, 1, "f32le"), is_raw=True)))
    assert (len(first) / rate, first.any()) == (pytest.approx(0.1, abs=0.1), False)


def test_a_recording_that_grows_is_read_beyond_its_header_but_not_what_lies_behind() -> None:
    sound = tones(range(300, 500, 100))
    more = np.rint(noisy([700, 800]) * 32767).astype("<i2").tobytes()
    samples = np.rint(sound * 32767).astype("<i2").tobytes()
    silence = bytes(RATE)
    for behind, n_more in (
        (more, len(more)),
        (silence + more, len(silence) + len(more)),
        (silence, 0),  # room that a recorder has kept
        (b"TAG" + bytes(125), 0),
    ):
        blocks, warnings = decode_stream(wav(None, behind, sound=sound))
        assert sum(len(block) for block, _ in blocks) == (len(samples) + n_more) // 2
        assert warnings == {}
    blocks, _ = decode_stream(wav(0xFFFFFFFF, b"fact" + more, sound=sound))  # a name by chance
    assert sum(len(block) for block, _ in blocks) == (len(samples) + 4 + len(more)) // 2


def test_rate_and_channels_may_change() -> None:
    data = written("OGG", "VORBIS", hertz=[300]) + written("OGG", "VORBIS", hertz=[500, 600], rate=44100, channels=2)
    blocks, _ = decode_stream(data)
    shapes = list(dict.fromkeys((rate, block.shape[1]) for block, rate in blocks))
    assert shapes == [(16000, 1), (44100, 2)]
    assert sum(len(block) / rate for block, rate in blocks) == pytest.approx(3.0, abs=0.02)
