"""Every kind of file in `odd_files.ODD_FILES`: decoded, packed and tagged with the right length and values, or told."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference
from audio.containers import inspect
from audio.ffmpeg import FFmpegBlocks
from audio.io import LOSSES, WARNINGS, AudioBlocks, AudioReadError, decode
from audio.manifest import read_manifest
from audio.parts import Slice
from models import create_model, save_checkpoint
from scripts import wavlist_to_hdf5
from tagging.files import TagOptions, tag_files
from tests.audio.odd_files import ODD_FILES, OddFile, sound_rows
from tests.audio.sound_bytes import LEVEL, RATE, encoded, noisy, patched, tones, wav, written
from tests.tagging.sounds import Meter

ROOT = Path(__file__).resolve().parents[2]
REFUSED = [row for row in ODD_FILES if row.seconds is None]
KINDS = {row.name: row for row in ODD_FILES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them."""
    folder = tmp_path_factory.mktemp("odd")
    for row in ODD_FILES:
        (folder / row.name).write_bytes(row.data)
    return folder


def check_tones(waveform: np.ndarray, rate: int, row: OddFile) -> None:
    """Check frequency and level in the middle of each second."""
    for second, hertz in enumerate(row.hertz):
        middle = waveform[int((second + 0.3) * rate) : int((second + 0.7) * rate)]
        if hertz is None or len(middle) < 0.4 * rate - 1:
            continue
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        assert spectrum.argmax() * rate / len(middle) == pytest.approx(hertz, abs=4), f"second {second}"
        assert np.sqrt(np.mean(middle**2)) == pytest.approx(LEVEL / np.sqrt(2), rel=0.25), f"second {second}"


def test_the_list_has_sixty_kinds_and_each_its_own_name() -> None:
    assert len(KINDS) == len(ODD_FILES) >= 60
    assert {kind for row in ODD_FILES for kind in row.warnings} == set(WARNINGS)


@pytest.mark.parametrize("row", list(sound_rows()), ids=lambda row: row.name)
def test_it_has_the_right_length_values_and_warnings(folder: Path, row: OddFile) -> None:
    decoded = decode(folder / row.name)
    assert len(decoded.waveform) / decoded.sample_rate == pytest.approx(row.seconds, abs=0.1)
    assert tuple(decoded.warnings) == row.warnings
    check_tones(decoded.waveform, decoded.sample_rate, row)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_it_is_refused_with_a_sentence(folder: Path, row: OddFile) -> None:
    with pytest.raises(AudioReadError) as caught:
        decode(folder / row.name)
    assert row.refusal in caught.value.reason


def test_all_of_them_are_packed_and_reported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [row.name for row in ODD_FILES]
    (folder / "list.tsv").write_text("\n".join(["filename", *names, ""]))
    words = [str(folder / "list.tsv"), str(tmp_path / "out"), "--duration", "-n", "0"]
    with pytest.raises(SystemExit) as stopped:
        wavlist_to_hdf5.main(words)
    assert stopped.value.code == 1  # sound is missing, though all that could be packed is packed
    packed = read_manifest(tmp_path / "out/labels/list.tsv").set_index("filename")["duration"].astype(float)
    assert packed.to_dict() == pytest.approx({row.name: row.seconds for row in sound_rows()}, abs=0.1)
    report = json.loads((tmp_path / "out/labels/list.report.json").read_text())
    for kind in WARNINGS:
        assert report["noted_clips"][kind] == [row.name for row in ODD_FILES if kind in row.warnings]
    reasons = {row["filename"]: row["reason"] for rows in report["left_out_clips"].values() for row in rows}
    assert set(reasons) == {row.name for row in REFUSED}
    assert all(row.refusal in reasons[row.name] for row in REFUSED)
    assert {(row["filename"], row["kind"]) for row in report["warnings"]} == {
        (row.name, kind) for row in ODD_FILES for kind in row.warnings
    }
    printed = capsys.readouterr().out
    assert all(f"{kind:<11} {len(report['noted_clips'][kind])}   packed nevertheless" in printed for kind in WARNINGS)


def test_a_pack_of_odd_files_that_lost_nothing_ends_well(folder: Path, tmp_path: Path) -> None:
    names = [row.name for row in sound_rows() if not LOSSES & set(row.warnings)][::5]
    (folder / "fine.tsv").write_text("\n".join(["filename", *names, names[0], ""]))  # one twice: that is no loss
    wavlist_to_hdf5.main([str(folder / "fine.tsv"), str(tmp_path / "out"), "-n", "0"])


def test_all_of_them_are_tagged(folder: Path) -> None:
    files = list(tag_files(Meter(), [folder / row.name for row in ODD_FILES], TagOptions(1), chunk_seconds=20.0))
    for row, file in zip(ODD_FILES, files, strict=True):
        assert (file.fault is None) == (row.seconds is not None)
        assert row.refusal in (file.fault or row.refusal)
        assert tuple(file.warnings) == row.warnings
        assert [window.end for window in file.windows] == ([pytest.approx(row.seconds, abs=0.1)] if row.seconds else [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "pico.pt"
    with torch.random.fork_rng():
        save_checkpoint(path, create_model("audiotransformer_pico", num_classes=2, labels=["a", "b"]).eval(), {})
    return path


def run_inference(*words: object) -> tuple[int, str]:
    """Exit status, and what it says on standard error."""
    message = io.StringIO()
    with contextlib.redirect_stderr(message):
        try:
            inference.main([*map(str, words), "--quiet"])
        except SystemExit as stopped:
            return int(stopped.code or 0), message.getvalue()
    return 0, message.getvalue()


def test_the_command_tells_what_is_odd_and_its_status_whether_sound_is_missing(folder, checkpoint, tmp_path) -> None:
    names = ["cut.ogg", "opposite channels.wav", "aac.m4a", "text.wav", "short length.wav"]
    output = "--output", tmp_path / "tags.csv"
    status, message = run_inference(*(folder / name for name in names), "-m", checkpoint, *output)
    assert status == 1
    assert "3 of 5 files have warnings:" in message
    assert f"  {folder / 'cut.ogg'}: truncated: ends early" in message
    assert f"  {folder / 'opposite channels.wav'}: out_of_phase: has stereo channels of opposite polarity" in message
    assert f"  {folder / 'text.wav'}: cannot be decoded (no sound found in it)" in message
    assert run_inference(folder / "cut.ogg", "-m", checkpoint)[0] == 1  # cut is enough
    assert run_inference(folder / "opposite channels.wav", folder / "aac.m4a", "-m", checkpoint)[0] == 0


# The decoders themselves


def ffmpeg(data: bytes) -> np.ndarray:
    return np.concatenate([block for block, _ in FFmpegBlocks(io.BytesIO(data))])


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        *(("WAV", subtype, 0) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
        *(("FLAC", subtype, 0) for subtype in ("PCM_16", "PCM_24")),
        ("OGG", "VORBIS", 3e-7),
        ("MP3", None, 5e-6),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_both_decoders_give_the_same_samples(tmp_path, format, subtype, tolerance, channels) -> None:
    (tmp_path / "x").write_bytes(written(format, subtype, sound=noisy((300, 500)), channels=channels))
    sndfile = soundfile.read(tmp_path / "x", dtype="float32", always_2d=True)[0]
    other = ffmpeg((tmp_path / "x").read_bytes())
    assert sndfile.shape == other.shape
    np.testing.assert_allclose(sndfile, other, atol=tolerance, rtol=0)


def test_ffmpeg_decodes_a_pipe_as_it_does_a_file_and_gives_what_has_come() -> None:
    data = written("FLAC", sound=noisy((300, 400, 500)))
    for source in (data, encoded("matroska", "flac")):
        reading, writing = os.pipe()
        sender = threading.Thread(target=lambda data=source, to=writing: send(data, to))
        sender.start()
        with os.fdopen(reading, "rb") as pipe:
            piped = [block for block, _ in FFmpegBlocks(pipe, block_seconds=0)]
        sender.join()
        assert max(map(len, piped)) <= 4608
        assert np.array_equal(np.concatenate(piped), ffmpeg(source))


def send(data: bytes, descriptor: int) -> None:
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(data)


def test_a_named_pipe_is_a_sound_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    sender = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(wav(0xFFFFFFFF)))
    sender.start()
    decoded = decode(tmp_path / "pipe")
    sender.join()
    assert (len(decoded.waveform), decoded.warnings) == (6 * RATE, {})


def test_ffmpeg_is_not_loaded_for_files_that_do_without() -> None:
    code = "import sys, audio.io; audio.io.decode(sys.argv[1]); sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, ROOT / "no.wav"], cwd=ROOT, capture_output=True).returncode == 1
    path = "import sys, io, soundfile, numpy, tempfile, audio.io as a; f = tempfile.NamedTemporaryFile(suffix='.wav'); "
    code = (
        path + "soundfile.write(f.name, numpy.zeros(9), 16000); a.decode(f.name); sys.exit(7 * ('av' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret.ts").write_bytes(encoded("mpegts", "aac"))
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:6,\n{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(text)
    with pytest.raises(AudioReadError, match="no sound found"):
        decode(tmp_path / "list.m3u8")


def test_a_wav_of_more_than_4_gb_is_read_to_its_end(tmp_path: Path) -> None:
    path, n_bytes = tmp_path / "long.wav", (1 << 32) + 64_000
    last = wav()[44 : 44 + 2 * RATE]
    for announced in (n_bytes & 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE, 0):
        with open(path, "wb") as file:  # it takes no room on the disk
            file.write(wav(announced)[:44] + last)
            file.truncate(44 + n_bytes)
            file.seek(44 + n_bytes - len(last))
            file.write(last)
        with open(path, "rb") as file:
            (part,) = inspect(file.fileno(), 44 + n_bytes).parts
            assert (part.start, part.stop) == (44, 44 + n_bytes)
            end = Slice(file.fileno(), 44 + n_bytes - len(last), part.stop or 0).read()
            assert end == last
        blocks = iter(AudioBlocks(path))
        np.testing.assert_allclose(next(blocks)[:RATE], tones([300]), atol=2**-15)
        blocks.close()


def test_damage_costs_no_more_than_the_packets_it_is_in(tmp_path: Path) -> None:
    whole = written("FLAC", sound=noisy(range(300, 900, 100)))
    (tmp_path / "x.flac").write_bytes(patched(whole, len(whole) // 2, bytes(40)))
    decoded = decode(tmp_path / "x.flac")
    samples, _ = soundfile.read(io.BytesIO(whole), dtype="float32")
    lost = len(samples) - len(decoded.waveform)
    assert 0 < lost <= 2 * 4608
    n_before = int(np.argmin(decoded.waveform == samples[: len(decoded.waveform)]))
    assert 2 * RATE < n_before < 4 * RATE
    np.testing.assert_array_equal(decoded.waveform[n_before:], samples[n_before + lost :])
    assert f"{lost / RATE:.2f} of its 6.00 s are missing" in decoded.warnings["damaged"]


def test_parts_of_other_rates_are_resampled_each_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(written("WAV", "FLOAT") + written("WAV", "FLOAT", rate=44100, channels=2))
    one, two = (decode_bytes(tmp_path, written("WAV", "FLOAT", rate=rate)) for rate in (16000, 44100))
    joined = decode(tmp_path / "x.wav", 32000)
    np.testing.assert_allclose(joined.waveform, np.concatenate([one, two]), atol=1e-6)
    assert (joined.source_rate, joined.sample_rate) == (16000, 32000)
    assert "16000 Hz with 1 channel and 44100 Hz with 2 channels" in joined.warnings["joined"]
    stereo = decode(tmp_path / "x.wav", mix_down=False)
    assert stereo.waveform.shape == (2 * 6 * RATE, 1)  # at the rate of the beginning, with its channels


def decode_bytes(folder: Path, data: bytes) -> np.ndarray:
    (folder / "one").write_bytes(data)
    return decode(folder / "one", 32000).waveform
