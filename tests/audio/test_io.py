import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio.io import (
    AudioBlocks,
    AudioReadError,
    decode,
    find_audio_files,
    from_int16,
    read_audio,
    resample,
    to_int16,
)
from common.errors import UserError


def sine(rate: int, seconds: float = 1.0, hertz: float = 1000.0, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def peak_hertz(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * rate / len(waveform))


@pytest.mark.parametrize(
    ("extension", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 2**-7),
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-22),
        ("wav", "PCM_32", 2**-22),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("flac", "PCM_16", 2**-15),
        ("aiff", "PCM_24", 2**-22),
        ("ogg", "VORBIS", 0.05),
        ("mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_every_format_decodes_to_the_same_sine(tmp_path: Path, extension: str, subtype: str, tolerance: float) -> None:
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, sine(16000), 16000, subtype=subtype)
    waveform, rate = read_audio(path)
    assert (rate, waveform.dtype, waveform.shape) == (16000, np.float32, (16000,))
    middle = slice(2000, 14000)  # lossy formats ring at the ends
    assert np.abs(waveform - sine(16000))[middle].max() <= tolerance


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 192000])
@pytest.mark.parametrize("wanted", [16000, 32000])
def test_a_1_khz_sine_stays_one_at_another_rate(tmp_path: Path, rate: int, wanted: int) -> None:
    path = tmp_path / "sine.wav"
    soundfile.write(path, sine(rate, seconds=2), rate, subtype="FLOAT")
    waveform, found = read_audio(path, wanted)
    assert (found, len(waveform)) == (wanted, 2 * wanted)
    assert peak_hertz(waveform, wanted) == pytest.approx(1000, abs=0.6)
    inner = slice(wanted // 4, -wanted // 4)
    np.testing.assert_allclose(waveform[inner], sine(wanted, seconds=2)[inner], atol=2e-4)


def test_frequencies_above_the_new_nyquist_are_removed_rather_than_folded() -> None:
    high = sine(44100, hertz=12000)
    assert np.abs(resample(high, 44100, 16000)[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("n_channels", [2, 6])
def test_channels_are_averaged(tmp_path: Path, n_channels: int) -> None:
    channels = np.stack([sine(16000, hertz=200 * (k + 1), peak=0.8) for k in range(n_channels)], axis=1)
    soundfile.write(tmp_path / "many.wav", channels, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "many.wav")[0], channels.mean(axis=1), atol=1e-6)


def test_a_file_longer_than_a_block_is_resampled_without_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44100).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, 44100, subtype="FLOAT")
    monkeypatch.setattr("audio.decoders._BLOCK_FRAMES", 1000)
    np.testing.assert_allclose(read_audio(tmp_path / "noise.wav", 16000)[0], resample(noise, 44100, 16000), atol=1e-6)


def test_a_length_that_is_a_whole_number_of_blocks_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "x.wav", sine(8000), 8000, subtype="FLOAT")
    monkeypatch.setattr("audio.decoders._BLOCK_FRAMES", 4000)
    np.testing.assert_array_equal(read_audio(tmp_path / "x.wav")[0], sine(8000))
    assert len(read_audio(tmp_path / "x.wav", 16000)[0]) == 16000


def test_one_sample_survives_resampling(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 192000)
    assert len(read_audio(tmp_path / "one.wav", 8000)[0]) == 1
    assert len(resample(np.array([0.5]), 192000, 8000)) == 1


def write_bad(path: Path, what: str) -> None:
    soundfile.write(path, sine(16000), 16000)
    if what == "header only in part":
        path.write_bytes(path.read_bytes()[:20])
    elif what == "text":
        path.write_text("this is not a sound\n" * 50)
    elif what == "0 bytes":
        path.write_bytes(b"")
    elif what == "no samples":
        soundfile.write(path, np.zeros(0), 16000)
    elif what in ("nan", "inf"):
        waveform = sine(16000)
        waveform[7] = float(what)
        soundfile.write(path, waveform, 16000, subtype="FLOAT")
    elif what == "missing":
        path.unlink()
    elif what == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("header only in part", "unreadable", "cannot be decoded"),
        ("text", "unreadable", "cannot be decoded"),
        ("0 bytes", "empty", "0 bytes"),
        ("no samples", "empty", "no samples"),
        ("nan", "nan", "not finite"),
        ("inf", "nan", "not finite"),
        ("missing", "unreadable", "no such file"),
        ("folder", "unreadable", "is a folder"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, what: str, kind: str, words: str) -> None:
    path = tmp_path / "bad.wav"
    write_bad(path, what)
    with pytest.raises(AudioReadError, match=words) as caught:
        read_audio(path, 8000)
    assert (caught.value.path, caught.value.kind) == (path, kind)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.kind) == (str(caught.value), kind)


def test_a_header_less_file_is_an_error_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(b"123456")
    with pytest.raises(AudioReadError, match="cannot be decoded"):
        read_audio(tmp_path / "x.raw")


def test_an_mp3_without_sound_is_not_reported_to_be_absent(tmp_path: Path) -> None:
    (tmp_path / "x.mp3").write_bytes(bytes(3000))
    with pytest.raises(AudioReadError, match="no sound found in it"):
        read_audio(tmp_path / "x.mp3")


@pytest.mark.parametrize("extension", ["wav", "aiff", "mp3"])
def test_a_file_cut_short_is_known_as_truncated(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, sine(16000), 16000)
    assert decode(path).warnings == {}
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    decoded = decode(path)
    assert list(decoded.warnings) == ["truncated"]
    assert decoded.warnings["truncated"].startswith("ends before the length that its header announces (0.")
    assert 0 < len(decoded.waveform) < 12000


def test_16_bit_samples_go_to_float_and_back_unchanged() -> None:
    every = np.arange(-32768, 32768).astype(np.int16)
    assert from_int16(every).dtype == np.float32
    assert from_int16(every)[[0, -1]].tolist() == [-1.0, 32767 / 32768]
    np.testing.assert_array_equal(to_int16(from_int16(every)), every)


def test_quantisation_rounds_and_clips_without_wrapping() -> None:
    values = np.array([0.4 / 32768, 0.6 / 32768, -0.6 / 32768, 1.0, 1.5, -1.0, -7.0])
    assert to_int16(values).tolist() == [0, 1, -1, 32767, 32767, -32768, -32768]


def test_files_are_found_below_folders_by_extension_in_any_case_and_explicit_ones_are_kept(tmp_path: Path) -> None:
    for name in ("b.WAV", "a.flac", "deep/er/c.Mp3", "notes.txt", "odd.bin", "._b.WAV", "z.m4a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_audio_files([tmp_path / "odd.bin", tmp_path, tmp_path / "a.flac"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "odd.bin",
        "a.flac",
        "b.WAV",
        "deep/er/c.Mp3",
        "z.m4a",
    ]


def test_a_film_without_its_index_is_reported_so(tmp_path: Path) -> None:
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " + bytes(100))
    with pytest.raises(
        AudioReadError, match=r"cannot be decoded \(its index is missing: it is truncated, or was not finished"
    ):
        read_audio(tmp_path / "a.m4a")


def test_a_damaged_header_costs_no_memory_and_damaged_samples_are_reported(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "slow.wav", np.zeros(300_000), 20)
    with pytest.raises(AudioReadError, match="announces 20 Hz"):
        read_audio(tmp_path / "slow.wav", 16000)
    soundfile.write(tmp_path / "rare.wav", np.zeros(30_000), 100)  # five minutes
    assert max(map(len, AudioBlocks(tmp_path / "rare.wav", 16000))) <= 20 * 16000  # the last has the filter's delay
    soundfile.write(tmp_path / "huge.wav", np.array([0, 1e25, 0], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AudioReadError, match=r"samples of 1\.0e\+25"):
        read_audio(tmp_path / "huge.wav")


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.wav: there is no such file or folder"):
        find_audio_files([tmp_path / "absent.wav"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no sound files"):
        find_audio_files([tmp_path / "empty"])


def test_linked_folders_are_searched_once_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("sounds/a.wav", "sounds/below/b.wav", "elsewhere/c.wav", "elsewhere/deep/d.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sounds = tmp_path / "sounds"
    for name, target in (
        ("more", tmp_path / "elsewhere"),
        ("twice", tmp_path / "elsewhere"),  # the same again
        ("circle", sounds),
        ("up", tmp_path),  # would bring what lies beside the folder, and the folder itself
        ("below too", sounds / "below"),
    ):
        (sounds / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(sounds, target_is_directory=True)
    found = [str(path.relative_to(sounds)) for path in find_audio_files([sounds])]
    assert found == ["a.wav", "below/b.wav", "more/c.wav", "more/deep/d.wav"]


def test_links_that_lead_nowhere_are_reported(tmp_path: Path) -> None:
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "a folder").symlink_to(tmp_path / "no folder")
    found = find_audio_files([tmp_path])
    assert [path.name for path in found] == ["a folder", "gone.wav"]
    for path, target in zip(found, ("no folder", "nowhere.wav"), strict=True):
        with pytest.raises(AudioReadError, match=f"is a link to .*{target}, which does not exist"):
            read_audio(path)
