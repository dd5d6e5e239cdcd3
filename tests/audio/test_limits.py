"""Limits of sound files: rates, channels and memory, whatever the header announces."""

import os
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio import decoder_processes
from audio.clip_blocks import ClipBlocks
from audio.clips import load_clip
from audio.errors import AudioReadError
from audio.io import AudioBlocks, decode
from audio.isolation import IsolatedBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.errors import UserError
from tests.audio.sound_bytes import RATE, noisy, patched, tones, wav, written


def wav_of(rate: int, channels: int) -> bytes:
    """A WAV whose header announces any rate and number of channels."""
    return patched(
        wav(), 22, struct.pack("<HIIH", channels, rate, rate * 2 * channels & 0xFFFFFFFF, 2 * channels & 0xFFFF)
    )


def aiff_of(rate: int) -> bytes:
    data = written("AIFF", "PCM_16")
    exponent = rate.bit_length() - 1
    return patched(data, data.find(b"COMM") + 16, struct.pack(">HQ", 16383 + exponent, rate << (63 - exponent)))


def au_of(rate: int, channels: int) -> bytes:
    return patched(written("AU", "PCM_16"), 16, struct.pack(">II", rate, channels))


def caf_of(rate: float) -> bytes:
    data = written("CAF", "PCM_16")
    return patched(data, data.find(b"desc") + 12, struct.pack(">d", rate))


def w64_of(rate: int, channels: int) -> bytes:
    data = written("W64")
    at = data.find(b"fmt ") + 26
    return patched(
        data, at, struct.pack("<HIIH", channels, rate, rate * 2 * channels & 0xFFFFFFFF, 2 * channels & 0xFFFF)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(wav_of, 1, 1), "1 Hz"),
        (partial(wav_of, 2**31, 1), "2147483648 Hz"),
        (partial(wav_of, 2**32 - 1, 1), "4294967295 Hz"),
        (partial(wav_of, 5_000_000, 1), "5000000 Hz"),
        (partial(wav_of, RATE, 30000), "30000 channels"),
        (partial(wav_of, RATE, 2000), "2000 channels"),
        (partial(aiff_of, 1), "1 Hz"),
        (partial(aiff_of, 2**40), "[0-9]+ Hz"),
        (partial(au_of, 2**31, 1), "2147483648 Hz"),
        (partial(au_of, 99, 1), "99 Hz"),
        (partial(caf_of, 9e6), "9000000 Hz"),
        (partial(w64_of, 2**31, 1), "2147483648 Hz"),
        (partial(w64_of, RATE, 20000), "20000 channels"),
    ],
)
def test_headers_beyond_the_limits_are_refused_with_what_they_announce(tmp_path, make, words) -> None:
    (tmp_path / "x").write_bytes(make())
    with pytest.raises(AudioReadError, match=rf"announces {words}.*--limits"):
        list(AudioBlocks(tmp_path / "x", RATE))


@pytest.mark.parametrize("make", [partial(wav_of, 2**31, 7), partial(caf_of, 1e300), partial(caf_of, float("nan"))])
def test_headers_that_no_decoder_takes_are_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "x").write_bytes(make())
    with pytest.raises(AudioReadError):
        list(AudioBlocks(tmp_path / "x", RATE))


def test_limits_can_be_raised(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(wav_of(50, 1))
    limits = SoundLimits.from_mapping({"lowest_rate": 50})
    assert len(decode(tmp_path / "x.wav", limits=limits).waveform) == 6 * RATE
    (tmp_path / "y.wav").write_bytes(wav_of(5_000_000, 1))
    assert decode(tmp_path / "y.wav", limits=SoundLimits(highest_rate=5e6)).sample_rate == 5_000_000
    with pytest.raises(UserError, match=r"none named 'clip_gb' \(did you mean 'clip_mb'"):
        SoundLimits.from_mapping({"clip_gb": 1})
    with pytest.raises(UserError, match="clip_mb is 0; expected a number above 0"):
        SoundLimits(clip_mb=0)


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(blocks: IsolatedBlocks, seconds: float) -> float:
    """Decode up to so many seconds in a process of its own; returns its highest memory in MB."""
    decoder_processes._end_all()  # those of earlier tests may have had more
    peak, n_samples = 0.0, 0
    for block in blocks:
        n_samples += len(block)
        assert blocks.process is not None
        peak = peak_mb(blocks.process.pid)
        if n_samples > seconds * RATE:
            break
    return peak


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLAC of 16 days of silence at 100 Hz, 86 GB at 16 kHz."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.flac"
    with soundfile.SoundFile(path, "w", 100, 1, "PCM_16", format="FLAC") as file:
        for _ in range(34):
            file.write(np.zeros(1 << 22, np.int16))
    assert os.path.getsize(path) < 530_000
    return path


def test_a_small_file_of_days_takes_little_memory_and_is_not_packed(bomb: Path) -> None:
    assert measure(IsolatedBlocks(bomb, RATE), 3600) < 200
    clip = load_clip(bomb, RATE, isolated=True, limits=SoundLimits(clip_mb=20))
    assert clip.samples is None
    assert "is longer than 0.174 h at 16000 Hz, 20 MB, the most that one clip may take in memory" in clip.reason
    with pytest.raises(AudioReadError, match=r"is longer than 0\.174 h"):
        decode(bomb, RATE, limits=SoundLimits(clip_mb=20))


@pytest.mark.parametrize("rate", [100, pytest.param(4_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("channels", "mix_down"), [(1, True), (2, True), (2, False), (16, False), (1000, True)])
def test_memory_of_a_block_does_not_depend_on_rate_and_channels(tmp_path, rate, channels, mix_down) -> None:
    with open(tmp_path / "x.wav", "wb") as file:  # zeros that take no room on the disk
        file.write(wav_of(rate, channels)[:40] + struct.pack("<I", 800_000_000))
        file.truncate(44 + 800_000_000)
    assert measure(IsolatedBlocks(tmp_path / "x.wav", RATE, mix_down=mix_down), 1) < 250


def test_a_clip_just_below_its_limit_is_whole(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", noisy(range(300, 400, 10)), RATE)
    n_bytes = 2 * 10 * RATE
    clip = load_clip(tmp_path / "x.wav", RATE, limits=SoundLimits(clip_mb=n_bytes / 1e6))
    assert clip.samples is not None
    assert clip.samples.nbytes == clip.n_bytes == n_bytes
    assert load_clip(tmp_path / "x.wav", RATE, limits=SoundLimits(clip_mb=n_bytes / 1e6 - 1e-6)).fault == "unreadable"


@pytest.mark.parametrize("n_at_full", [2, 3])
def test_clipping_that_lies_across_blocks_is_seen(tmp_path, monkeypatch, n_at_full: int) -> None:
    monkeypatch.setattr("audio.decoders._BLOCK_FRAMES", 1000)
    sound = np.zeros(3000, np.float32)
    sound[999 : 999 + n_at_full] = 1.0
    soundfile.write(tmp_path / "x.wav", sound, RATE, subtype="FLOAT")
    blocks = ClipBlocks(tmp_path / "x.wav", RATE)
    assert [len(block) for block in blocks] == [1000] * 3
    assert (blocks.clipped, blocks.silent) == (n_at_full == 3, False)


# Files that change while they are read


def change_midway(path: Path, change: Callable[[], None]) -> tuple[int, dict[str, str]]:
    """Number of samples and warnings of a file that changes after its first block."""
    blocks = AudioBlocks(path)
    n_samples = 0
    for number, block in enumerate(blocks):
        n_samples += len(block)
        if number == 0:
            change()
    return n_samples, blocks.warnings


@pytest.fixture
def minute(tmp_path: Path) -> Path:
    (tmp_path / "x.wav").write_bytes(wav(sound=tones([300] * 60)))
    os.utime(tmp_path / "x.wav", (1, 1))
    return tmp_path / "x.wav"


def test_a_file_that_shrinks_while_it_is_read_is_reported(minute: Path) -> None:
    n_samples, warnings = change_midway(minute, lambda: os.truncate(minute, 44 + 40 * RATE))
    assert n_samples <= 20 * RATE
    assert set(warnings) == {"truncated", "damaged"}


def test_a_file_that_grows_while_it_is_read_is_reported(minute: Path) -> None:
    def grow() -> None:
        with open(minute, "ab") as file:
            file.write(bytes(1000))

    n_samples, warnings = change_midway(minute, grow)
    assert n_samples == 60 * RATE
    assert "grew from 1920044 to 1921044 bytes while it was read" in warnings["truncated"]


def test_a_file_that_is_written_over_while_it_is_read_is_reported(minute: Path) -> None:
    def overwrite() -> None:
        with open(minute, "r+b") as file:
            file.seek(1_500_000)
            file.write(bytes(1000))

    assert "changed by another program" in change_midway(minute, overwrite)[1]["damaged"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_is_removed_or_replaced_while_it_is_read_is_read_to_its_end(minute: Path, replace: bool) -> None:
    def remove() -> None:
        minute.unlink()
        if replace:
            minute.write_bytes(wav())

    assert change_midway(minute, remove) == (60 * RATE, {})


def test_a_short_sound_is_noted_and_decoded(tmp_path: Path) -> None:
    for n_samples, is_short in ((1, True), (1599, True), (1600, False)):
        soundfile.write(tmp_path / "x.wav", noisy([300])[:n_samples], RATE)
        decoded = decode(tmp_path / "x.wav")
        assert len(decoded.waveform) == n_samples
        assert list(decoded.warnings) == ["short"] * is_short


def test_default_limits_are_those_of_the_text() -> None:
    assert DEFAULT_LIMITS.clip_samples / 16000 / 3600 == pytest.approx(8.7, abs=0.03)
    assert threading.active_count() < 50
