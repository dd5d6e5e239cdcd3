"""One sound has one answer: models of band-limited sounds do not learn what a resampler leaves above."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import soxr
import torch

from audio.dataset import Pack
from audio.io import from_int16, to_int16
from models import create_model, load_model, save_checkpoint
from models.onnx import export_onnx
from tagging.base import Engine
from tagging.engines import TorchEngine, open_engine
from tagging.files import TagOptions, tag_files
from tagging.onnx_engine import OnnxEngine
from tests.conftest import run_command
from tests.sounds_resampled import RESAMPLERS, resample_by
from tests.training.test_automatic import noise, write_pack
from training.band_limit import describe_unusable_bands, measure_band_limits, usable_limit
from training.evaluate import evaluate_command, predict_pack
from training.precision import Precision
from training.prepare import prepare_run

ROOT = Path(__file__).resolve().parents[2]
RATE, PACK_RATE, N_CLASSES = 8000, 16000, 4
TEACHER = str(ROOT / "trainconfig" / "own_teacher.yaml")


def limit_of(folder: Path, sounds: list[np.ndarray], rate: int) -> float:
    return measure_band_limits(Pack.open(write_pack(folder, sounds, ["a"] * len(sounds), rate))).limit


@pytest.mark.parametrize(
    ("source_rate", "pack_rate", "limit"),
    [(8000, 16000, 4000), (11025, 16000, 5512), (16000, 16000, 8000), (16000, 32000, 8000), (44100, 48000, 22050)],
)
@pytest.mark.parametrize("quality", ["HQ", "VHQ"])
def test_the_band_limit_is_that_of_the_rate_the_sounds_were_recorded_at(
    tmp_path, source_rate, pack_rate, limit, quality
):
    sounds = [soxr.resample(noise(0.5, source_rate, i), source_rate, pack_rate, quality) for i in range(5)]
    assert limit_of(tmp_path, [*sounds, np.zeros(pack_rate)], pack_rate) == limit


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_files_that_were_upsampled_before_they_were_packed_are_found_whatever_the_resampler(tmp_path, resampler):
    sounds = [resample_by(resampler, noise(0.5, 8000, i), 8000, 16000) for i in range(10)]
    assert limit_of(tmp_path, sounds, 16000) == 4000  # mirror images reach up to 5 kHz and more


def test_sounds_that_grow_softer_with_frequency_reach_up_to_half_their_rate(tmp_path):
    """As speech and most natural sounds do: 12 dB an octave."""
    tilted = []
    for seed in range(10):
        spectrum = np.fft.rfft(noise(0.5, 16000, seed))
        spectrum /= 1 + (np.arange(len(spectrum)) / len(spectrum) * 8000 / 500) ** 2
        tilted.append(np.fft.irfft(spectrum))
    assert limit_of(tmp_path, tilted, 16000) == 8000


def test_a_few_clips_that_were_cut_while_loud_do_not_set_the_band_limit(tmp_path):
    rng = np.random.default_rng(0)
    sounds = [soxr.resample(noise(0.4, 8000, i), 8000, 16000) for i in range(100)]
    for row in rng.choice(100, 6, replace=False):
        sounds[row][3000:] = 0  # a step, which reaches up to half the sample rate
    assert limit_of(tmp_path, sounds, 16000) == 4000


def test_silence_and_very_short_clips_have_the_limit_of_their_rate(tmp_path):
    assert limit_of(tmp_path / "a", [np.zeros(8000)] * 3, 16000) == 8000
    assert limit_of(tmp_path / "b", [noise(0.02, 16000, 1)] * 3, 16000) == 8000


def test_clips_that_end_early_among_others_are_reported_with_what_to_do(tmp_path):
    narrow = [soxr.resample(noise(0.5, 8000, i), 8000, 16000) for i in range(4)]
    wide = [noise(0.5, 16000, i) for i in range(8)]
    full = create_model("resnet10", num_classes=1)
    limited = create_model("resnet10", num_classes=1, band_limit=usable_limit(4000))

    def message(name, sounds, model):
        pack = Pack.open(write_pack(tmp_path / name, sounds, ["a"] * len(sounds)))
        return describe_unusable_bands(measure_band_limits(pack), model, "LIST.tsv")

    assert message("wide", wide, full) is None
    assert message("narrow", narrow, limited) is None
    assert "its clips have no content above 4000 Hz" in message("narrow_full", narrow, full)
    mixed = message("mixed", narrow + wide, full)
    assert "33% of its clips have no content above 4000 Hz" in mixed
    assert "--model_args.band_limit 3600" in mixed


def word(label: int, rng: np.random.Generator) -> np.ndarray:
    """0.4 s at 8 kHz, from loud to soft: a hump of noise whose pitch is the class, on noise up to 4 kHz."""
    n_samples = round(0.4 * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    hertz = np.arange(len(spectrum)) * RATE / n_samples
    hump = 1 / (1 + ((hertz - 500 * 1.6**label * rng.uniform(0.93, 1.07)) / 150) ** 2)
    spectrum *= hump + 0.25 / (1 + hertz / 800) ** rng.uniform(0.6, 1.6) + 0.3 * rng.uniform() * (hertz > 3000)
    sound = np.fft.irfft(spectrum, n_samples) * np.sin(np.pi * np.arange(n_samples) / n_samples) ** 2
    return from_int16(to_int16(sound / np.abs(sound).max() * 10 ** rng.uniform(-2, -0.4)))


@pytest.fixture(scope="module")
def recordings() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Recordings of 8 kHz to learn from (128) and to be judged by (200), class by class in turn."""
    rng = np.random.default_rng(0)
    train, test = ([word(i % N_CLASSES, rng) for i in range(n)] for n in (128, 200))
    return train, test


def train(folder: Path, sounds: list[np.ndarray], **changes):
    """Train a small network on a pack of recordings, as the preset for one's own sounds does, and load it."""
    packed = [resample_by("soxr", sound, RATE, PACK_RATE) for sound in sounds]
    pack = str(write_pack(folder / "pack", packed, [f"word {i % N_CLASSES}" for i in range(len(sounds))], PACK_RATE))
    given = {"train_data": pack, "valid_data": pack, "eval_data": None, "outputpath": str(folder / "runs")}
    given |= {"model": "resnet10", "model_args": {"auto": True, "width": 4}, "epochs": 8, "num_workers": 0}
    torch.manual_seed(0)
    prepared = prepare_run(TEACHER, given | {"device": "cpu", "baseline": False} | changes, 1)
    prepared.fit()
    return load_model(prepared.folder.path)


@pytest.fixture(scope="module")
def model(recordings, tmp_path_factory):
    """What the preset makes of recordings of 8 kHz in a pack of 16 kHz."""
    return train(tmp_path_factory.mktemp("limited"), recordings[0])


@pytest.fixture(scope="module")
def versions(recordings, tmp_path_factory) -> dict[str, tuple[Pack, list[Path]]]:
    """The same test recordings at 16 kHz by each resampler: 16-bit packs, and files of floating-point samples."""
    found = {}
    for name in RESAMPLERS:
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        sounds = [resample_by(name, sound, RATE, PACK_RATE) for sound in recordings[1]]
        pack = Pack.open(write_pack(folder / "pack", sounds, ["word 0"] * len(sounds), PACK_RATE))
        found[name] = pack, write_wavs(folder, sounds, PACK_RATE, "FLOAT")
    return found


def write_wavs(folder: Path, sounds: list[np.ndarray], rate: int, subtype: str) -> list[Path]:
    paths = [folder / f"{number:03d}.wav" for number in range(len(sounds))]
    for path, sound in zip(paths, sounds, strict=True):
        soundfile.write(path, sound, rate, subtype=subtype)
    return paths


def tag_pack(model, pack: Pack) -> np.ndarray:
    """Probabilities (N,C) as `run.py evaluate` computes them."""
    return predict_pack(model, pack, batch_size=32, num_workers=0, precision=Precision("fp32", torch.device("cpu")))


def tag_paths(engine: Engine, paths: list[Path]) -> np.ndarray:
    """Probabilities (N,C) as `inference.py` computes them."""
    tagged = list(tag_files(engine, paths, TagOptions(top_k=None)))
    assert all(len(file.windows) == 1 for file in tagged)
    return np.array([[dict(file.windows[0].tags)[label] for label in engine.labels] for file in tagged])


def accuracy(probabilities: np.ndarray) -> float:
    return 100 * float((probabilities.argmax(1) == np.arange(len(probabilities)) % N_CLASSES).mean())


def check_one_answer(answers: dict[str, np.ndarray]) -> None:
    """See that all versions of the sounds get the same tags: within half a point, and each sound's probabilities."""
    wanted = answers["soxr pack"]
    assert accuracy(wanted) > 85
    for name, probabilities in answers.items():
        assert abs(accuracy(probabilities) - accuracy(wanted)) <= 0.5, name
        assert np.abs(probabilities - wanted).max() < 0.1, name


def all_answers(model, engines: dict[str, Engine], versions, originals: list[Path]) -> dict[str, np.ndarray]:
    answers = {f"{name} pack": tag_pack(model, pack) for name, (pack, _) in versions.items()}
    for kind, engine in engines.items():
        answers |= {f"{name} files, {kind}": tag_paths(engine, paths) for name, (_, paths) in versions.items()}
        answers[f"recordings of 8 kHz, {kind}"] = tag_paths(engine, originals)
    return answers


def test_all_resamplers_packs_files_and_exports_give_a_sound_the_same_tags(model, recordings, versions, tmp_path):
    assert model.front_end.highest_hz == usable_limit(4000)
    export_onnx(model, {"fp32": tmp_path / "wave.onnx"}, waveform=True)
    engines = {"PyTorch": TorchEngine(model), "ONNX": OnnxEngine(tmp_path / "wave.onnx")}
    originals = write_wavs(tmp_path, recordings[1], RATE, "PCM_16")
    check_one_answer(all_answers(model, engines, versions, originals))


def test_what_a_recording_holds_above_the_limit_changes_no_tag(model, recordings, tmp_path):
    rng = np.random.default_rng(1)
    hiss = [np.fft.rfft(0.05 * rng.standard_normal(round(0.4 * 44100))) for _ in recordings[1]]
    for spectrum in hiss:
        spectrum[: round(0.4 * 4200)] = 0  # loud, all of it above 4.2 kHz
    clean = [soxr.resample(sound, RATE, 44100, "VHQ") for sound in recordings[1]]
    bright = [sound + np.fft.irfft(spectrum) for sound, spectrum in zip(clean, hiss, strict=True)]
    (tmp_path / "bright").mkdir()
    engine = TorchEngine(model)
    answers = [tag_paths(engine, write_wavs(tmp_path, clean, 44100, "FLOAT"))]
    answers.append(tag_paths(engine, write_wavs(tmp_path / "bright", bright, 44100, "FLOAT")))
    assert abs(accuracy(answers[0]) - accuracy(answers[1])) <= 0.5
    assert np.abs(answers[0] - answers[1]).max() < 0.1


def test_without_the_limit_tags_would_follow_the_resampler(recordings, versions, tmp_path):
    """What the others test is there to be seen: tens of points between resamplers, ten between packs and files."""
    full = train(tmp_path, recordings[0], model_args={"auto": True, "width": 4, "f_max": 8000})
    (log,) = tmp_path.rglob("train.log")
    assert "no content above 4000 Hz, but resnet10 has mel bands up to 8000 Hz" in log.read_text()
    pack, files = (versions["soxr"][0], versions["soxr"][1])
    wanted = tag_pack(full, pack)
    assert accuracy(wanted) > 75
    assert accuracy(wanted) - accuracy(tag_pack(full, versions["torchaudio"][0])) > 15
    assert (tag_paths(TorchEngine(full), files).argmax(1) != wanted.argmax(1)).mean() > 0.05


@pytest.mark.parametrize("name", ["mn02_as", "audiotransformer_pico"])
def test_fine_tuning_keeps_the_bands_of_the_weights_and_silences_those_above(recordings, versions, tmp_path, name):
    torch.manual_seed(0)
    start = create_model(name, num_classes=3)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    changes = {"model": name, "pretrained": str(tmp_path / "start.pt"), "model_args": "auto", "epochs": 1}
    tuned = train(tmp_path, recordings[0][:32], **changes)
    assert tuned.arguments["band_limit"] == usable_limit(4000)
    torch.testing.assert_close(tuned.front_end.mel_edges_hz, start.front_end.mel_edges_hz)
    wanted = tag_pack(tuned, versions["soxr"][0])
    for pack, files in versions.values():
        assert np.abs(tag_pack(tuned, pack) - wanted).max() < 0.02
        assert np.abs(tag_paths(TorchEngine(tuned), files) - wanted).max() < 0.02


def test_a_pack_of_a_lower_rate_than_a_model_makes_use_of_is_reported(versions, tmp_path, caplog):
    labels = [f"word {i}" for i in range(N_CLASSES)]

    def message(**settings) -> str:
        caplog.clear()
        save_checkpoint(tmp_path / "model.pt", create_model("mn01_as", labels=labels, **settings))
        given = {"model": str(tmp_path / "model.pt"), "test_data": str(versions["soxr"][0].manifest)}
        given |= {"batch_size": 64, "num_workers": 0, "device": "cpu", "output": str(tmp_path)}
        evaluate_command(given, open_engine)
        return caplog.text

    assert "is at 16000 Hz, but mn01_as has mel bands up to 15000 Hz" in message()
    assert "mel bands" not in message(band_limit=7000.0)


@pytest.mark.long
def test_words_at_8_khz_get_the_same_tags_from_all_resamplers(shared, tmp_path):
    """Real recordings, by the commands; without the limit `evaluate` and `inference.py` are 1 to 18 points apart."""
    table = pd.read_csv(shared / "data" / "spoken_words" / "spoken_words.tsv", sep="\t", dtype=str)
    names = [f"{number:04d}.wav" for number in range(len(table))]
    (tmp_path / "8k").mkdir()
    for name, path in zip(names, table["filename"], strict=True):
        sound, rate = soundfile.read(shared / "data" / "spoken_words" / path, dtype="float32")
        sound = soxr.resample(sound, rate, RATE)
        loudness = np.convolve(sound**2, np.ones(3200), "valid")
        start = int(loudness.argmax()) if len(sound) > 3200 else 0
        soundfile.write(tmp_path / "8k" / name, sound[start : start + 3200], RATE, subtype="PCM_16")
    test = [row for row, split in enumerate(table["split"]) if split == "test"]

    def pack(folder: str, rows: list[int], name: str) -> str:
        listed = tmp_path / f"{name}.tsv"
        lines = [f"{tmp_path / folder / names[row]}\t{table['word'][row]}" for row in rows]
        listed.write_text("filename\tlabels\n" + "\n".join(lines) + "\n")
        run("scripts/wavlist_to_hdf5.py", listed, tmp_path / "packs")
        return str(tmp_path / "packs" / "labels" / f"{name}.tsv")

    packs = {"train": pack("8k", [row for row in range(len(table)) if row not in set(test)], "train")}
    packs["8k"] = pack("8k", test, "8k")
    for name in RESAMPLERS:
        folder = name.replace(" ", "_")
        (tmp_path / folder).mkdir()
        for row in test:
            sound = resample_by(name, soundfile.read(tmp_path / "8k" / names[row], dtype="float32")[0], RATE, PACK_RATE)
            soundfile.write(tmp_path / folder / names[row], sound, PACK_RATE, subtype="FLOAT")
        packs[folder] = pack(folder, test, folder)
    given = ["--train_data", packs["train"], "--valid_data", packs["8k"], "--eval_data", "null", "--epochs", "5"]
    run("run.py", "train", TEACHER, *given, "--outputpath", tmp_path / "runs", "--baseline", "false")
    trained = tmp_path / "runs" / "own_teacher" / "latest"

    figures = {}
    truth = {names[row]: table["word"][row] for row in test}
    for folder, packed in packs.items():
        if folder == "train":
            continue
        run("run.py", "evaluate", trained, "--test_data", packed, "--output", tmp_path / "results")
        figures[f"{folder} pack"] = json.loads((tmp_path / "results" / f"evaluation_{folder}.json").read_text())["top1"]
        tagged, files = tmp_path / f"{folder}.csv", [tmp_path / folder / names[row] for row in test]
        run("inference.py", *files, "-m", trained, "-k", "1", "--output", tagged)
        tags = pd.read_csv(tagged)
        right = [truth[Path(path).name] == label for path, label in zip(tags.iloc[:, 0], tags["label"], strict=True)]
        figures[f"{folder} files"] = float(np.mean(right))
    assert min(figures.values()) > 0.85, figures
    assert max(figures.values()) - min(figures.values()) <= 0.005, figures


def run(*words: str | Path) -> None:
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
