import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

import audio.decoders
import tagging.pictures
from audio.io import AudioBlocks, AudioReadError
from audio.limits import SoundLimits
from tagging.files import TaggedFile, TaggedWindow, TagOptions, tag_files
from tagging.parts import SINGLE_PROCESS
from tagging.pictures import MAX_COLUMNS, MAX_LABELS, Pictures, compute_spectrogram, draw
from tagging.session import open_outputs
from tests.tagging.sounds import RATE, Meter, silence, steady
from tests.tagging.test_outputs import NAMES


def tone(path, hertz, seconds, rate=RATE, level=0.5):
    sound = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, sound, rate, subtype="FLOAT")
    return path


def slow_spectrogram(samples, n_columns):
    """One spectrum at a time; a column holds as few of them as leaves fewer than twice `n_columns`."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 511)
    spectra = []
    for first in range(0, len(samples) - 511, 512):
        spectra.append(np.abs(np.fft.rfft(samples[first : first + 512] * window)) ** 2)
    per_column = 1
    while len(spectra) // per_column >= 2 * n_columns:
        per_column *= 2
    n_whole = len(spectra) // per_column
    columns = [np.mean(spectra[i * per_column : (i + 1) * per_column], axis=0) for i in range(n_whole)]
    return 10 * np.log10(np.maximum(np.array(columns).T, 1e-10))


@pytest.mark.parametrize("n_columns", [3, 50, 1200])
@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_a_spectrogram_is_the_mean_power_of_its_columns(tmp_path, monkeypatch, n_columns, block):
    monkeypatch.setattr(audio.decoders, "_BLOCK_FRAMES", block)
    monkeypatch.setattr(tagging.pictures, "IsolatedBlocks", AudioBlocks)  # in this process
    samples = np.random.default_rng(0).standard_normal(70000).astype(np.float32) * np.linspace(0, 0.3, 70000)
    soundfile.write(tmp_path / "a.wav", samples.astype(np.float32), RATE, subtype="FLOAT")
    found, seconds = compute_spectrogram(tmp_path / "a.wav", n_columns)
    expected = slow_spectrogram(samples.astype(np.float32), n_columns)
    assert seconds == 70000 / RATE
    assert 0 <= found.shape[1] - expected.shape[1] <= 1  # the last one holds what remains
    assert found.shape[1] <= 2 * n_columns
    assert np.abs(found[:, : expected.shape[1]] - expected).max() < 1e-3


@pytest.mark.parametrize(("hertz", "rate"), [(440, 16000), (3000, 44100), (1000, 8000), (6000, 192000)])
def test_a_tone_lies_at_its_pitch_at_every_rate(tmp_path, hertz, rate):
    decibels, seconds = compute_spectrogram(tone(tmp_path / "a.wav", hertz, 2.0, rate))
    assert seconds == 2.0
    rows = decibels[:, 5:-5].argmax(axis=0) * 8000 / 256
    assert np.abs(rows - hertz).max() <= 8000 / 256 / 2 + 1
    assert decibels.max() == pytest.approx(20 * np.log10(0.5 * 512 / 4), abs=2)  # the window halves the level


def test_an_hour_has_as_few_columns_as_a_minute(tmp_path):
    decibels, seconds = compute_spectrogram(silence(tmp_path / "hour.wav", 3600))
    assert seconds == 3600
    assert MAX_COLUMNS <= decibels.shape[1] < 2 * MAX_COLUMNS
    assert decibels.max() == -100


def test_the_shortest_sound_has_a_spectrogram(tmp_path):
    decibels, seconds = compute_spectrogram(steady(tmp_path / "a.wav", [0.5], last=1 / RATE))
    assert decibels.shape == (257, 1)
    assert seconds == 1 / RATE


def colour(image, x, y):
    """Red, green and blue (0 to 255) at a place given as parts of the width and height from the top left."""
    height, width = image.shape[:2]
    return [round(255 * float(value)) for value in image[round(y * height), round(x * width), :3]]


def test_a_picture_shows_what_is_given_when(tmp_path):
    path = tone(tmp_path / "a.wav", 4000, 4.0)
    windows = [TaggedWindow(k, k + 2, [("tone", (0.2, 1.0, 0.6)[k])]) for k in range(3)]  # overlapping
    windows[2].tags.append(("hum", 0.5))
    draw(TaggedFile(path, windows), tmp_path / "a.png")
    image = imread(tmp_path / "a.png")
    inside = np.flatnonzero(image[round(image.shape[0] * 0.3), :, :3].sum(axis=1) < 0.1)  # through the black
    first, last = inside[0], inside[-1]
    assert (first, last) == pytest.approx((0.07 * image.shape[1], 0.99 * image.shape[1]), abs=20)
    bars = image[round(image.shape[0] * 0.745), :, 0]  # through the upper row, "tone"
    quarters = [bars[round(first + (last - first) * (k + 0.5) / 4)] for k in range(4)]
    assert quarters == pytest.approx([1 - 0.88 * value for value in (0.2, 1.0, 1.0, 0.6)], abs=0.03)  # the surest shows
    down = image[: round(image.shape[0] * 0.68), first + 9, :3].sum(
        axis=1
    )  # beside the left edge of the compute_spectrogram
    dark = np.flatnonzero(down < 0.1)
    lit = np.flatnonzero(down[dark[0] : dark[-1]] > 1)
    assert lit.mean() / (dark[-1] - dark[0]) == pytest.approx(0.5, abs=0.01)  # 4 of 8 kHz
    assert len(lit) < 10


def test_silence_is_dark(tmp_path):
    draw(TaggedFile(silence(tmp_path / "a.wav", 2), [TaggedWindow(0, 2, [("silence", 0.9)])]), tmp_path / "a.png")
    assert max(colour(imread(tmp_path / "a.png"), 0.6, 0.3)) < 30


def test_a_picture_of_each_sound_lies_where_it_is_looked_for(tmp_path):
    paths = [tone(tmp_path / f"{name}.wav", 500, 0.3) for name in ("a", "b")]
    pictures = Pictures(tmp_path / "pictures", paths, {"model": "meter"}, SINGLE_PROCESS)
    for file in tag_files(Meter(), paths):
        pictures.write(file)
    assert pictures.close(paths)
    for path in paths:
        image = imread(tmp_path / "pictures" / f"{path.name}.png")
        assert image.shape[1] == pytest.approx(1320, abs=2)
        assert 300 < image.shape[0] < 800
    again = Pictures(tmp_path / "pictures", paths, {"model": "meter"}, SINGLE_PROCESS)
    assert again.done == {str(path) for path in paths}


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_a_title_and_any_label_be_shown(tmp_path):
    for number, name in enumerate([*NAMES, "cost $5 \\frac $ x_1.wav", "long " * 49 + ".wav"]):
        tone(tmp_path / "made.wav", 500, 0.05).rename(tmp_path / name)
        path = tmp_path / name
        labels = ["$\\frac$", "a very long label of the kind that AudioSet has, (though, seldom), this long"]
        draw(TaggedFile(path, [TaggedWindow(0, 0.05, [(label, 0.5) for label in labels])]), tmp_path / f"{number}.png")
        image = imread(tmp_path / f"{number}.png")
        edge = np.concatenate([image[:3].ravel(), image[-3:].ravel(), image[:, :2].ravel(), image[:, -2:].ravel()])
        assert edge.min() == 1  # nothing is cut off


def test_no_more_labels_are_shown_than_there_is_room_for(tmp_path):
    path = tone(tmp_path / "a.wav", 500, 0.5)
    heights = []
    for n in (0, 1, MAX_LABELS, 527):
        draw(TaggedFile(path, [TaggedWindow(0, 0.5, [(str(i), 0.5) for i in range(n)])]), tmp_path / "a.png")
        heights.append(len(imread(tmp_path / "a.png")))
    assert heights[0] == heights[1] < heights[2] == heights[3]


def test_a_sound_that_is_gone_when_it_is_drawn_is_reported_of(tmp_path):
    path = tone(tmp_path / "a.wav", 500, 0.3)
    (file,) = tag_files(Meter(), [path], TagOptions(1))
    path.unlink()
    with pytest.raises(AudioReadError):
        draw(file, tmp_path / "a.png")
    pictures = Pictures(tmp_path / "pictures", [path], {}, SINGLE_PROCESS)
    pictures.write(file)
    pictures.close([path])
    assert pictures.faults == {str(path): "there is no such file"}
    assert not (tmp_path / "pictures" / "a.wav.png").exists()


def test_pictures_have_the_limits_of_tagging(tmp_path):
    path = tone(tmp_path / "a.wav", 20, 0.5, rate=90)
    faults = []
    for lowest_rate in (50, 100):
        limits = SoundLimits(lowest_rate=lowest_rate)
        (pictures,) = open_outputs([path], {}, SINGLE_PROCESS, plot=tmp_path / str(lowest_rate), limits=limits)
        pictures.write(TaggedFile(path, [TaggedWindow(0, 0.5, [("tone", 0.5)])]))
        pictures.close([path])
        faults += [pictures.faults]
    assert (tmp_path / "50" / "a.wav.png").exists()
    assert faults[0] == {}
    assert "90 Hz" in faults[1][str(path)]
