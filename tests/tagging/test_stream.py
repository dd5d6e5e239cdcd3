import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import inference
from audio.streams import FORMATS, Encoding, StreamDecoder
from common.errors import UserError
from tagging.files import TagOptions, tag_files
from tagging.stream import StreamTagger
from tests.audio.odd_files import ODD_FILES
from tests.audio.sound_bytes import encoded, id3, tones, without_xing, written
from tests.audio.test_streams import Pipe
from tests.conftest import ROOT
from tests.tagging.sounds import RATE, Meter, humming, steady

EVERY = TagOptions(None)
RAW = Encoding(RATE)
SUBTYPES = {
    "u8": "PCM_U8",
    "s16le": "PCM_16",
    "s24le": "PCM_24",
    "s32le": "PCM_32",
    "f32le": "FLOAT",
    "f64le": "DOUBLE",
}


def tag_bytes(engine, data, raw=RAW, block_seconds=0.1, **times):
    decoder = StreamDecoder(io.BytesIO(data), raw, block_seconds=block_seconds)
    tagger = StreamTagger(engine, EVERY, **times)
    return [window for block in decoder for window in tagger.push_block(*block)] + tagger.finish()


def check_same(found, expected):
    assert [(w.start, w.end) for w in found] == [(w.start, w.end) for w in expected]
    for one, other in zip(found, expected, strict=True):
        assert dict(one.tags) == pytest.approx(dict(other.tags), abs=1e-5)
        assert [label for label, _ in one.tags] == [label for label, _ in other.tags]


def samples_of(path):
    """The bytes behind a wav's header."""
    data = path.read_bytes()
    place = data.index(b"data")
    return data[place + 8 : place + 8 + struct.unpack("<I", data[place + 4 : place + 8])[0]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 3)])
def test_a_stream_is_tagged_as_the_file_in_one_piece(tmp_path, pico, form, rate, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(5, 2.35, rate, channels), rate, subtype=SUBTYPES[form])
    times = {"chunk_seconds": 1.0, "hop_seconds": 0.5}
    (file,) = tag_files(pico, [path], EVERY, **times)
    assert [window.end for window in file.windows] == [1.0, 1.5, 2.0, 2.35]
    check_same(tag_bytes(pico, path.read_bytes(), **times), file.windows)
    raw = Encoding(rate, channels, form)
    check_same(tag_bytes(pico, samples_of(path), raw, **times), file.windows)


@pytest.mark.parametrize("block_seconds", [1e-9, 0.00123, 0.37, 100])
@pytest.mark.parametrize("hop", [0.25, None, 1.3])
def test_neither_blocks_nor_hops_change_what_is_given(tmp_path, pico, block_seconds, hop):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(6, 1.83, 22050, 2), 22050)
    times = {"chunk_seconds": 0.5, "hop_seconds": hop}
    (file,) = tag_files(pico, [path], EVERY, **times)
    check_same(tag_bytes(pico, path.read_bytes(), block_seconds=block_seconds, **times), file.windows)


@pytest.mark.parametrize("sizes", [(1,), (160, 3, 9999), (10**6,)])
def test_samples_may_be_pushed_in_any_pieces(pico, sizes):
    sound = humming(7, 2.0, 48000, 2)
    whole = StreamTagger(pico, EVERY, chunk_seconds=0.75, sample_rate=48000)
    expected = whole.push(sound) + whole.finish()
    tagger = StreamTagger(pico, EVERY, chunk_seconds=0.75, sample_rate=48000)
    found, first = [], 0
    if sizes == (1,):
        sizes = (16000, 1)  # single samples, now and then
    while first < len(sound):
        size = sizes[len(found) % len(sizes)] if len(sizes) > 1 else sizes[0]
        found += tagger.push(sound[first : first + size])
        first += size
    found += tagger.finish()
    check_same(found, expected)
    assert tagger.seconds == 2.0


def with_header(path, place, values):
    data = bytearray(path.read_bytes())
    for offset, value in zip((4, place), values, strict=True):
        data[offset : offset + 4] = struct.pack("<I", value)
    return bytes(data)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0x7FFFFFFF, 2 * RATE, 2 * RATE + 1])
def test_the_length_in_a_wavs_header_may_be_unknown_or_out_of_date(tmp_path, pico, length):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(5, 2.35), RATE)
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=1.0)
    data = with_header(path, 40, (length, length))  # half of it was there when the header was written
    check_same(tag_bytes(pico, data, chunk_seconds=1.0), file.windows)


def test_what_a_program_wrote_behind_the_samples_is_not_given(tmp_path, pico):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(5, 2.35), RATE)
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=1.0)
    behind = b"LIST" + struct.pack("<I", 9000) + b"INFOICMT" + os.urandom(8992)
    check_same(tag_bytes(pico, path.read_bytes() + behind, chunk_seconds=1.0), file.windows)
    odd = bytearray(path.read_bytes() + b"\x01\x00" + behind)
    odd[40:44] = struct.pack("<I", len(odd) - 44 - len(behind) - 1)
    check_same(tag_bytes(pico, bytes(odd), chunk_seconds=1.0), file.windows)


def test_extensible_headers_and_other_chunks_before_the_samples_are_read(tmp_path, pico):
    path = tmp_path / "a.wav"
    sound = humming(5, 1.2, 44100, 6)
    soundfile.write(path, sound, 44100, format="WAVEX", subtype="PCM_24")
    assert path.read_bytes()[20:22] == b"\xfe\xff"
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=1.0)
    data = path.read_bytes()
    check_same(tag_bytes(pico, data, chunk_seconds=1.0), file.windows)
    more = data[:12] + b"bext" + struct.pack("<I", 5) + b"hello\x00" + data[12:]
    check_same(tag_bytes(pico, more, chunk_seconds=1.0), file.windows)
    soundfile.write(path, sound, 44100, format="RF64", subtype="FLOAT")
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=1.0)
    check_same(tag_bytes(pico, path.read_bytes(), chunk_seconds=1.0), file.windows)


def test_a_stream_may_end_within_a_sample_but_not_before_the_first():
    meter = Meter()
    with pytest.raises(UserError, match="standard input: has no samples"):  # a recorder that failed, say
        tag_bytes(meter, b"")
    ones = np.full(RATE, 8192, "<i2").tobytes()
    for n_more in (0, 1):
        (window,) = tag_bytes(meter, ones + b"\x00" * n_more)
        assert (window.start, window.end, dict(window.tags)["level"]) == (0, 1, 0.25)
    (window,) = tag_bytes(meter, ones[:2])
    assert window.end == 1 / RATE
    (window,) = tag_bytes(Meter(sample_rate=400), bytes([192] * 1000), Encoding(400, 1, "u8"))
    assert (window.end, dict(window.tags)["level"]) == (2.5, 0.5)


FMT = b"RIFF\x00\x00\x00\x00WAVEfmt "


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"RIFF", "no sound found in it"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "cannot be decoded"),
        (b"RIFF\x00\x00\x00\x00WAVE", "ends within its header"),
        (FMT + struct.pack("<I", 16) + b"\x01\x00", "ends within its header"),
        (FMT + struct.pack("<I", 4) + b"\x01\x00\x01\x00" + b"data\x00\x00\x00\x00", "cannot be decoded"),
        (FMT + struct.pack("<IHHIIHH", 16, 9, 1, 8000, 8000, 1, 8) + b"data1234", "cannot be decoded"),
        (FMT + struct.pack("<IHHIIHH", 16, 1, 0, 8000, 8000, 1, 16) + b"data1234", "cannot be decoded"),
        (b"RIFF\x00\x00\x00\x00WAVEdata\x00\x00\x00\x00", "cannot be decoded"),
        (b"fLaC\x00\x00", "cannot be decoded"),
        (b"OggS\x00\x00", "no sound found in it"),
        (b"ID3\x04\x00\x00", "no sound found in it"),
    ],
)
def test_bad_headers_are_sentences(data, sentence):
    with pytest.raises(UserError, match=sentence):
        tag_bytes(Meter(), data)


def test_samples_that_are_no_numbers_and_formats_that_are_none_are_sentences():
    with pytest.raises(UserError, match="standard input: has samples that are not finite numbers"):
        tag_bytes(Meter(), np.append(np.zeros(RATE), np.nan).astype("<f4").tobytes(), Encoding(RATE, 1, "f32le"))
    tagger = StreamTagger(Meter())
    tagger.push(np.zeros(RATE))
    with pytest.raises(UserError, match=r"not finite numbers after 1\.00 s"):
        tagger.push(np.array([np.nan]))
    with pytest.raises(UserError, match=r"'s8'.*expected one of u8, s16le"):
        StreamDecoder(io.BytesIO(b""), Encoding(RATE, 1, "s8"))
    meter = Meter()
    meter.max_samples = RATE
    with pytest.raises(UserError, match="takes at most"):
        StreamTagger(meter, chunk_seconds=1.1)


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_memory_does_not_grow_with_the_stream(rate):
    class Forgetful(Meter):
        def predict(self, clips):
            self.batches.clear()
            return super().predict(clips)

    tagger = StreamTagger(Forgetful(), chunk_seconds=2.0, hop_seconds=0.5, sample_rate=rate)
    block = np.zeros((rate // 10, 2), np.float32)
    n_windows, peaks = 0, []
    tracemalloc.start()
    try:
        for _ in range(10):  # minutes
            tracemalloc.reset_peak()
            for _ in range(600):
                n_windows += len(tagger.push(block))
                assert len(tagger._windows._kept) < 2 * RATE
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert n_windows == pytest.approx(10 * 60 * 2 - 3, abs=1)
    assert peaks[-1] < peaks[1] + 20_000
    assert peaks[-1] < 3e6


def command(*words, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "inference.py"), "--stream", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **more,
    )


@pytest.mark.parametrize("channels", [1, 2])
def test_as_a_command_it_tells_of_each_window_before_the_stream_ends(tmp_path, checkpoint, pico, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(5, 5.3, 44100, channels), 44100)
    data = path.read_bytes()
    (file,) = tag_files(pico, [path], chunk_seconds=1.0)
    # What a window needs, a block and the resampler's delay; stereo is mixed down in whole seconds.
    n_bytes = round((1.25 if channels == 1 else 2.1) * 44100) * 2 * channels
    with command("-m", checkpoint, "-c", "1", stdin=subprocess.PIPE) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.daemon = True
        watchdog.start()
        message = []
        for k in range(2):
            process.stdin.write(data[k * n_bytes : (k + 1) * n_bytes])
            process.stdin.flush()
            message.append(process.stdout.readline().decode())  # would wait for ever if it waited for more
            time.sleep(0.05)
        process.stdin.write(data[2 * n_bytes :])
        process.stdin.close()
        message += process.stdout.read().decode().splitlines(keepends=True)
        assert process.stderr.read() == b""
        assert process.wait() == 0
        watchdog.cancel()
    expected = [
        f"  [{w.start:6.1f} - {w.end:6.1f} s]  " + ", ".join(f"{label} {value:.3f}" for label, value in w.tags) + "\n"
        for w in file.windows
    ]
    assert message == expected


def test_raw_samples_through_a_pipe_as_a_command(tmp_path, checkpoint, pico):
    path = tmp_path / "a.wav"
    soundfile.write(path, humming(8, 1.5, 8000, 2), 8000, subtype="PCM_U8")
    (file,) = tag_files(pico, [path], TagOptions(None, 0.5), chunk_seconds=1.0)
    with subprocess.Popen(["tail", "-c", "+45", path], stdout=subprocess.PIPE) as tail:
        raw = "--rate", "8000", "--channels", "2", "--encoding", "u8"
        with command("-m", checkpoint, "-c", "1", "--threshold", "0.5", *raw, stdin=tail.stdout) as process:
            output, error = process.communicate()
    assert process.returncode == 0, error
    lines = output.decode().splitlines()
    assert [len(re.findall(r" 0\.\d{3}", line)) for line in lines] == [len(window.tags) for window in file.windows]
    for line, window in zip(lines, file.windows, strict=True):
        assert all(f"{label} {value:.3f}" in line for label, value in window.tags)
        assert 0 < len(window.tags) < 6


def test_a_level_is_the_mean_of_the_channels(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([np.full(RATE, 0.75), np.full(RATE, 0.25)], axis=1), RATE)
    (window,) = tag_bytes(Meter(), (tmp_path / "a.wav").read_bytes())
    assert dict(window.tags)["level"] == 0.5
    steady(tmp_path / "b.wav", [0.25, 0.5])
    first, second = tag_bytes(Meter(), (tmp_path / "b.wav").read_bytes(), chunk_seconds=1.0)
    assert (dict(first.tags)["level"], dict(second.tags)["level"]) == (0.25, 0.5)


def test_samples_of_the_wrong_kind_and_after_the_end_are_refused(pico):
    tagger = StreamTagger(pico, chunk_seconds=1.0)
    with pytest.raises(UserError, match="int16; expected floats"):
        tagger.push(np.zeros(100, np.int16))
    tagger.push(np.zeros(8000))
    assert len(tagger.finish()) == 1
    assert tagger.finish() == []
    with pytest.raises(UserError, match="is finished"):
        tagger.push(np.zeros(100))


@pytest.mark.parametrize("shape", [(2, RATE), (6, 100), (1, 2), (RATE, 2, 1), ()])
def test_channels_first_and_other_shapes_are_refused(shape):
    tagger = StreamTagger(Meter(), chunk_seconds=0.5)
    with pytest.raises(UserError, match=r"samples have shape .* expected \(S,\) or \(S, channels\)"):
        tagger.push(np.zeros(shape))
    assert len(tagger.push(np.full((RATE, 2), 0.5))) == 2
    with pytest.raises(UserError, match="transpose them"):
        tagger.push(np.zeros((3, RATE)))
    assert tagger.push(np.full((1, 2), 0.5)) == []  # a single sample of the channels that have come
    assert tagger.push(np.zeros((0, 2))) == []
    assert tagger.push(np.full((RATE // 5 - 1, 2), 0.5)) == []
    assert [(window.start, window.end) for window in tagger.finish()] == [(1.0, 1.2)]


def test_rate_and_channels_may_change_on_the_way(tmp_path):
    sounds = [(np.full(RATE, 0.25), RATE), (np.full((2 * 44100, 2), 0.5), 44100), (np.full((8000, 3), 0.75), 8000)]
    tagger = StreamTagger(Meter(), EVERY, chunk_seconds=1.0)
    found = []
    for sound, rate in sounds:
        for first in range(0, len(sound), 3000):
            found += tagger.push(sound[first : first + 3000].astype(np.float32), rate)
    found += tagger.finish()
    assert [(window.start, window.end) for window in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [dict(w.tags)["level"] for w in found] == pytest.approx([0.25, 0.5, 0.5, 0.75], abs=0.003)
    assert "16000 Hz with 1 channel and 44100 Hz with 2 channels and 8000 Hz with 3" in tagger.warnings["joined"]


def test_channels_of_opposite_polarity_are_mixed_as_in_a_file(tmp_path, pico):
    sound = humming(5, 3.6, RATE)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([sound, -sound], axis=1), RATE, subtype="FLOAT")
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=1.0)
    tagger = StreamTagger(pico, EVERY, chunk_seconds=1.0)
    found = [window for block in np.array_split(np.stack([sound, -sound], axis=1), 50) for window in tagger.push(block)]
    check_same(found + tagger.finish(), file.windows)
    assert tagger.warnings == file.warnings
    assert "3.60 of 3.60 s" in tagger.warnings["out_of_phase"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mp3", lambda: without_xing(written("MP3"))),
        ("id3.mp3", lambda: id3(3000) + written("MP3")),
        ("w64", lambda: written("W64", channels=2)),
        ("au", lambda: written("AU", "FLOAT")),
        ("flac", lambda: written("FLAC")),
        ("m4a", lambda: encoded("mp4", "aac", options={"movflags": "+faststart"})),
        ("ogg", lambda: written("OGG", "VORBIS") * 2),
        ("webm", lambda: encoded("webm", "libopus", rate=48000)),
        ("wma", lambda: encoded("asf", "wmav2", rate=44100, bit_rate=64000)),
    ],
)
def test_other_formats_are_tagged_as_the_file(name, make, tmp_path, pico):
    path = tmp_path / f"a.{name}"
    path.write_bytes(make())
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=2.5)
    found = tag_bytes(pico, path.read_bytes(), chunk_seconds=2.5)
    assert [(w.start, w.end) for w in found] == [(w.start, pytest.approx(w.end, abs=0.02)) for w in file.windows]
    for one, other in zip(found, file.windows, strict=True):
        assert dict(one.tags) == pytest.approx(dict(other.tags), abs=3e-4)  # two decoders


def test_an_mp3_without_a_tag_is_no_noise_for_the_command(checkpoint, pico, tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(without_xing(written("MP3")))
    (file,) = tag_files(pico, [path], EVERY, chunk_seconds=3.0)
    with command("-m", checkpoint, "-c", "3", stdin=subprocess.PIPE) as process:
        output, error = process.communicate(path.read_bytes())
    assert (process.returncode, error) == (0, b"")
    lines = output.decode().splitlines()
    assert len(lines) == len(file.windows) == 2
    for line, window in zip(lines, file.windows, strict=True):
        assert [float(value) for value in re.findall(r" (0\.\d{3})", line)] == pytest.approx(
            [value for _, value in window.tags[:3]], abs=2e-3
        )


def run_with(monkeypatch, capsys, data, *words):
    """Exit status, lines, and what is said on standard error, of the command in this process."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(data)))
    status = 0
    try:
        inference.main(["--stream", *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err


def test_a_cut_stream_is_reported_and_a_bad_one_is_a_sentence(checkpoint, monkeypatch, capsys):
    words = "-m", checkpoint, "-c", "2"
    cut = written("FLAC")
    status, lines, error = run_with(monkeypatch, capsys, cut[: len(cut) // 2], *words)
    assert (status, len(lines)) == (1, 2)
    assert re.match(r"standard input ends before the length that its header announces \(3\.\d\d of 6\.00 s\)", error)
    status, lines, error = run_with(monkeypatch, capsys, encoded("ipod", "aac"), *words)
    assert (status, lines) == (1, [])
    assert "error: standard input: cannot be decoded (the index of this MP4 is behind its sound" in error
    status, lines, error = run_with(monkeypatch, capsys, b"<html><body>404 Not Found</body></html>", *words)
    assert (status, lines) == (1, [])
    assert "no sound found in it: it is text" in error
    whole = np.rint(tones([300, 400]) * 32767).astype("<f4").tobytes()
    status, lines, error = run_with(monkeypatch, capsys, whole, *words, "--encoding", "f32le", "--rate", "16000")
    assert (status, len(lines)) == (0, 1)
    assert "standard input has integers of 16 bits stored as floating-point values" in error
    mp3 = without_xing(written("MP3"))
    for raw in (("--encoding", "s16le"), ("--rate", "16000"), ("--channels", "1")):  # what is said to be raw is raw
        status, lines, error = run_with(monkeypatch, capsys, mp3, *words, *raw)
        assert (status, len(lines), error) == (0, -(-len(mp3) // 64000), "")


def test_every_kind_of_odd_file_is_tagged_or_reported():
    for row in ODD_FILES:
        tagger = StreamTagger(Meter(), chunk_seconds=20.0)
        decoder = StreamDecoder(io.BytesIO(row.data), RAW)
        if row.seconds is None and row.name not in ("zeros.mp3", "noise.wav"):  # they begin as any samples might
            with pytest.raises(UserError, match="standard input: "):
                list(decoder)
            continue
        (window,) = [window for block in decoder for window in tagger.push_block(*block)] + tagger.finish()
        if row.seconds is not None:
            assert window.end == pytest.approx(row.seconds, abs=0.1), row.name
            kinds = set(decoder.warnings | tagger.warnings)
            assert set(row.warnings) - kinds <= {"repaired", "short", *(["truncated"] if "8svx" in row.name else [])}, (
                row.name
            )
