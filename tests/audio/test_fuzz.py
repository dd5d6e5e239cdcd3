"""Sounds of any length, rate and number of channels, and damaged ones: the right samples or a sentence, never else."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio.errors import AudioReadError
from audio.isolation import IsolatedBlocks
from audio.limits import SoundLimits
from tests.audio.fuzz import CHANGES, CONTAINERS, Change, Result, find_silent_damage

LIMITS = SoundLimits(stall_seconds=20, decoder_mb=1000)
FORMATS = [
    *(("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *(("W64", "PCM_16"), ("RF64", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_24")),
    *(("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")),
]


def decode(path: Path, limits: SoundLimits = LIMITS, rate: int | None = None) -> Result:
    """Decode in another process, which must neither crash, stall nor exceed its memory."""
    blocks = IsolatedBlocks(path, rate, limits=limits)
    try:
        samples = np.concatenate(list(blocks))
        result = Result(samples, blocks.sample_rate, blocks.warnings)
    except AudioReadError as error:
        result = Result(None, 0, {}, error.reason)
    for words in ("decoding failed", "crashed", "was killed", "no sound came", "needs more than"):
        assert words not in result.reason
    return result


def short(n_examples: int, seconds: float = 30) -> settings:
    return settings(
        max_examples=n_examples,
        deadline=timedelta(seconds=seconds),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The sounds of files without damage."""
    results = {}
    for name, container in CONTAINERS.items():
        path = tmp_path_factory.mktemp("whole") / name
        path.write_bytes(container.data)
        results[name] = decode(path)
        assert results[name].warnings == {}
    return results


def check_damaged(name: str, changes: list[Change], folder: Path, whole: dict[str, Result]) -> None:
    container = CONTAINERS[name]
    data = container.data
    for change in changes:
        data = change.apply(data) if data else data
    path = folder / name
    path.write_bytes(data)
    result = decode(path)
    if len(changes) == 1:
        assert find_silent_damage(container, changes[0], whole[name], result) is None


NAMES = st.sampled_from(sorted(CONTAINERS))
DAMAGE = st.lists(CHANGES, min_size=1, max_size=3)


def test_a_damaged_file_gives_its_samples_or_a_sentence(tmp_path, whole) -> None:
    @short(200)
    @given(NAMES, DAMAGE)
    def check(name: str, changes: list[Change]) -> None:
        check_damaged(name, changes, tmp_path, whole)

    check()


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_each_kind_of_file_damaged_hundreds_of_times_gives_its_samples_or_a_sentence(
    tmp_path, whole, name, record_property
) -> None:
    @short(600)
    @given(DAMAGE)
    def check(changes: list[Change]) -> None:
        check_damaged(name, changes, tmp_path, whole)

    check()
    record_property("damaged sound files", 600)


@pytest.mark.parametrize("name", ["16.wav", "x.flac"])
def test_every_bit_of_a_header_may_be_wrong(tmp_path: Path, whole: dict[str, Result], name: str) -> None:
    """Sample rate, channels and bits are in WAV and FLAC twice."""
    data = CONTAINERS[name].data
    before = whole[name]
    assert before.samples is not None
    for at, bit in ((at, bit) for at in range(44) for bit in range(0, 8, 2)):
        path = tmp_path / name
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        result = decode(path)
        if result.samples is not None and not result.warnings:
            is_equal = result.rate == before.rate and np.array_equal(result.samples, before.samples)
            assert is_equal or (name, at) == ("16.wav", 20), (at, bit)  # the code of the format


def check_whole(
    folder: Path, kind: tuple[str, str], n_samples: int, rate: int, n_channels: int, target: int, seed: int
) -> None:
    """Write a sound, and decode it: its length and level at any rate; refused where it is beyond the limits."""
    format, subtype = kind
    if format == "MP3":  # has few rates, and one or two channels
        rate, n_channels = (8000, 16000, 22050, 44100, 48000)[rate % 5], min(n_channels, 2)
    if format in ("FLAC", "OGG"):
        n_channels, rate = min(n_channels, 8), min(rate, 192_000 if format == "OGG" else 655_350)
    if format == "FLAC" and rate > 65535:
        rate -= rate % 10  # others cannot be stored
    wave = 0.5 * np.sin(np.arange(n_samples) * 0.05 + seed)
    path = folder / "sound"
    with soundfile.SoundFile(path, "w", rate, n_channels, subtype, format=format) as file:
        for start in range(0, n_samples, 4096):
            file.write(np.repeat(wave[start : start + 4096, None], n_channels, axis=1))
    result = decode(path, rate=target)
    if rate < LIMITS.lowest_rate:
        assert f"announces {rate} Hz" in result.reason
        result = decode(path, SoundLimits(lowest_rate=1), target)
    if result.samples is None:  # lossy encoders write nothing of a few samples
        assert "has no samples" in result.reason or "cannot be decoded" in result.reason
        assert format in ("MP3", "OGG")
        return
    expected = max(n_samples * target / rate, 1)
    padding = 4 * 1152 * target / rate if format == "MP3" else 0
    assert abs(len(result.samples) - expected) <= 1 + padding
    assert set(result.warnings) <= {"short"}
    assert ("short" in result.warnings) == (len(result.samples) < 0.1 * target)
    if rate == target and format not in ("MP3", "OGG"):
        tolerance = {"PCM_U8": 2**-7, "ULAW": 0.02, "ALAW": 0.02}.get(subtype, 2**-14)
        np.testing.assert_allclose(result.samples, wave, atol=tolerance)


RATES = st.one_of(st.sampled_from((8000, 16000, 44100, 48000, 96000)), st.integers(1, 768_000))
SOUNDS = st.tuples(
    st.sampled_from(FORMATS),
    st.one_of(st.integers(1, 50), st.integers(1, 40_000)),
    RATES,
    st.integers(1, 32),
    st.sampled_from((8000, 16000, 32000, 48000)),
    st.integers(0, 9),
)


def test_a_sound_of_any_length_rate_and_channels_is_whole(tmp_path: Path) -> None:
    @short(25)
    @given(SOUNDS)
    def check(sound) -> None:
        check_whole(tmp_path, *sound)

    check()


@pytest.mark.long
def test_thousands_of_sounds_of_any_length_rate_and_channels_are_whole(tmp_path: Path, record_property) -> None:
    @short(3000, seconds=120)  # some are gigabytes at the rate they are decoded to
    @given(SOUNDS)
    def check(sound) -> None:
        check_whole(tmp_path, *sound)

    check()
    record_property("sound files of any length, rate and channels", 3000)


def test_text_and_noise_are_no_sound(tmp_path: Path) -> None:
    @short(50)
    @given(
        st.one_of(st.binary(max_size=4000), st.text(max_size=2000).map(str.encode)),
        st.sampled_from(("", "RIFF", "fLaC", "OggS", "FORM", "caff", "ID3", "riff")),
    )
    def check(content: bytes, start: str) -> None:
        (tmp_path / "x.wav").write_bytes(start.encode() + content)
        decode(tmp_path / "x.wav")

    check()
