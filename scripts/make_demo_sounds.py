"""Make a small multi-label set of synthetic sounds, to try the whole pipeline without any download.

    python scripts/make_demo_sounds.py data/demo

Sixteen AudioSet classes are synthesised with numpy: each event has a random pitch, tempo, timbre, colouring, level and
position, and one to three events are mixed over background noise. The files are

    OUTDIR/audio/{train,valid,eval}/NNNN.wav       16-bit clips
    OUTDIR/{train,valid,eval}.tsv                  filename (relative to the table), labels (indices joined by ';')
    OUTDIR/class_labels_indices.csv                index, mid, display_name of the sixteen classes
    OUTDIR/folder_to_tag/                          a few named sounds in several formats and sample rates
    OUTDIR/settings.json                           the settings; written last, so that it marks a complete folder

Clip `i` of a split depends on the seed, the split, `i`, the length and the sample rate, not on the number of clips.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import io
import json
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import soundfile
from pydantic import Field
from tqdm.contrib.concurrent import thread_map

from common.files import explain_write_errors, write_json, write_text
from common.options import Options, parse_arguments

RECIPE = 3  # part of the settings: increase it when the sounds change, so that folders are made again
SPLITS = ("train", "valid", "eval")
Random = np.random.Generator
Synthesiser = Callable[[Random, int, int], np.ndarray]  # (rng, n_samples, sample_rate) -> (S,)


class SoundOptions(Options):
    """The options of make_demo_sounds.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("outdir",)

    outdir: str  # folder to write to
    n_train: int = Field(480, ge=0)  # training clips
    n_valid: int = Field(96, ge=0)  # validation clips
    n_eval: int = Field(144, ge=0)  # evaluation clips
    seconds: float = Field(4.0, ge=1)  # length of a clip
    sample_rate: int = Field(16000, ge=8000)  # in hertz
    seed: int = Field(0, ge=0)  # of the sounds


def log_uniform(rng: Random, low: float, high: float) -> float:
    """Draw a value whose logarithm is uniform, as for pitches and tempi."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def fft_size(n_samples: int) -> int:
    """Return a length of at least `n_samples` with small factors, for a fast transform."""
    step = 1 << max(n_samples.bit_length() - 4, 0)
    return -(-n_samples // step) * step


def shape_spectrum(signal: np.ndarray, rate: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Multiply the spectrum of `signal` (S,) by `gain(hertz)`, with zero padding against circular wrap-around."""
    size = fft_size(len(signal) + rate // 4)
    spectrum = np.fft.rfft(signal, size) * gain(np.fft.rfftfreq(size, 1 / rate))
    return np.fft.irfft(spectrum, size)[: len(signal)]


def band_pass(low: float, high: float, order: int = 2) -> Callable[[np.ndarray], np.ndarray]:
    """Return the gain of a smooth band pass from `low` to `high` hertz (0 and inf for none)."""

    def gain(hertz: np.ndarray) -> np.ndarray:
        hertz = np.maximum(hertz, 1.0)
        return 1 / np.sqrt((1 + (low / hertz) ** (2 * order)) * (1 + (hertz / high) ** (2 * order)))

    return gain


def tone(hertz: np.ndarray | float, n_samples: int, rate: int, harmonics: np.ndarray | tuple = (1.0,)) -> np.ndarray:
    """Return the sum of the harmonics of a (varying) frequency below the Nyquist frequency."""
    hertz = np.broadcast_to(hertz, (n_samples,))
    phase = 2 * np.pi * np.cumsum(hertz) / rate
    signal = np.zeros(n_samples)
    for number, amplitude in enumerate(harmonics, 1):
        signal += amplitude * np.sin(number * phase) * (number * hertz < 0.48 * rate)
    return signal


def pulses(times: np.ndarray, levels: np.ndarray | float, n_samples: int, rate: int) -> np.ndarray:
    """Return impulses of the given levels at `times` (seconds); those outside the signal are dropped."""
    positions = np.rint(np.asarray(times) * rate).astype(np.int64)
    levels = np.broadcast_to(levels, positions.shape)
    inside = (positions >= 0) & (positions < n_samples)
    train = np.zeros(n_samples)
    np.add.at(train, positions[inside], levels[inside])
    return train


def convolve(signal: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve by FFT, cut to the length of `signal`."""
    size = fft_size(len(signal) + len(kernel))
    return np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(kernel, size), size)[: len(signal)]


def beats(rng: Random, period: float, n_samples: int, rate: int, jitter: float = 0.0) -> np.ndarray:
    """Return regular times (seconds) from a random start in the first 0.3 s, with a jitter relative to the period."""
    times = np.arange(rng.uniform(0, min(period, 0.3)), n_samples / rate, period)
    return times + jitter * period * rng.standard_normal(len(times))


def gates(period: float, on: float, n_samples: int, rate: int, offset: float = 0.0) -> np.ndarray:
    """Return an on-off envelope (S,), `on` seconds of each period, with 5 ms edges."""
    within = (np.arange(n_samples) / rate + offset) % period
    return np.clip(np.minimum(within, on - within) / 0.005, 0, 1)


def drift(rng: Random, hertz: float, n_samples: int, rate: int) -> np.ndarray:
    """Return a smooth random signal (S,) of unit deviation that changes about `hertz` times a second."""
    n_knots = max(int(n_samples / rate * hertz) + 4, 4)
    knots = rng.standard_normal(n_knots)
    position = np.linspace(0, n_knots - 2, n_samples)
    left = position.astype(np.int64)
    part = (1 - np.cos(np.pi * (position - left))) / 2
    return knots[left] * (1 - part) + knots[np.minimum(left + 1, n_knots - 1)] * part


def resonance(rng: Random, hertz: float, ratios: np.ndarray, decay: float, rate: int, seconds: float) -> np.ndarray:
    """Return one stroke of decaying partials, of which high ones decay faster; `decay` in seconds to 1/e."""
    time = np.arange(int(seconds * rate)) / rate
    stroke = np.zeros(len(time))
    for ratio in ratios:
        if hertz * ratio < 0.48 * rate:
            level = rng.uniform(0.4, 1) / np.sqrt(max(ratio, 1))
            partial = np.sin(2 * np.pi * hertz * ratio * time + rng.uniform(0, 2 * np.pi))
            stroke += level * partial * np.exp(-time / decay * max(ratio, 0.5) ** 0.7)
    return stroke


# ---- the sixteen classes: (rng, n_samples, sample_rate) -> (S,), any level ------------------------------------------


def clapping(rng: Random, n: int, rate: int) -> np.ndarray:
    """Hands of one to three people: short bursts of noise around 1 to 2.5 kHz."""
    claps = np.zeros(n)
    for _ in range(rng.integers(1, 4)):
        times = beats(rng, 1 / rng.uniform(2.5, 5.5), n, rate, jitter=0.06)
        length = int(0.05 * rate)
        burst = rng.standard_normal(length) * np.exp(-np.arange(length) / rate / rng.uniform(0.004, 0.012))
        burst = shape_spectrum(burst, rate, band_pass(*np.array([0.6, 1.6]) * log_uniform(rng, 900, 2200)))
        claps += convolve(pulses(times, rng.uniform(0.6, 1.0, len(times)), n, rate), burst)
    return claps


def heartbeat(rng: Random, n: int, rate: int) -> np.ndarray:
    """Low double thumps, 55 to 120 a minute."""
    period = 60 / rng.uniform(55, 120)
    first = beats(rng, period, n, rate, jitter=0.01)
    low, time = rng.uniform(60, 110), np.arange(int(0.15 * rate)) / rate
    thump = np.sin(2 * np.pi * low * time) * np.exp(-time / rng.uniform(0.02, 0.04)) * np.minimum(time / 0.008, 1)
    gap = rng.uniform(0.26, 0.36) * period
    return convolve(pulses(first, 1.0, n, rate) + pulses(first + gap, rng.uniform(0.4, 0.8), n, rate), thump)


def bird(rng: Random, n: int, rate: int) -> np.ndarray:
    """Phrases of short, fast frequency sweeps between 2 and 6.5 kHz."""
    song, centre = np.zeros(n), log_uniform(rng, 3200, 4800)
    length = int(rng.uniform(0.04, 0.14) * rate)
    time = np.linspace(0, 1, length)
    curve = rng.uniform(-0.6, 0.6) * time + rng.uniform(-0.4, 0.4) * np.sin(2 * np.pi * time * rng.uniform(0.5, 2))
    note = tone(np.minimum(centre * 2 ** (curve - curve.mean()), 0.45 * rate), length, rate, (1.0, 0.15))
    note *= np.sin(np.pi * time) ** 2
    start = rng.uniform(0, 0.3)
    while start < n / rate:
        times = start + np.arange(rng.integers(2, 7)) * (length / rate + rng.uniform(0.02, 0.1))
        song += convolve(pulses(times, rng.uniform(0.5, 1.0, len(times)), n, rate), note)
        start = float(times[-1]) + rng.uniform(0.25, 0.8)
    return song


def bell(rng: Random, n: int, rate: int) -> np.ndarray:
    """One to four strokes of a church or hand bell: inharmonic partials that ring out."""
    ratios = np.array([0.5, 1, 1.2, 1.5, 2, 2.52, 2.67, 3.01, 4.1]) * rng.uniform(0.985, 1.015, 9)
    stroke = resonance(rng, log_uniform(rng, 280, 1100), ratios, rng.uniform(0.5, 1.6), rate, min(4.0, n / rate))
    times = np.arange(rng.uniform(0, 0.1), n / rate - 0.3, rng.uniform(0.7, 1.8))
    return convolve(pulses(times, rng.uniform(0.6, 1.0, len(times)), n, rate), stroke)


def wind(rng: Random, n: int, rate: int) -> np.ndarray:
    """Gusts: low noise and a whistling band, each with its own slow modulation."""
    gusts = np.zeros(n)
    for low, high, level in ((20, log_uniform(rng, 120, 350), 1.0), (250, log_uniform(rng, 500, 1000), 0.6)):
        noise = shape_spectrum(rng.standard_normal(n), rate, band_pass(low, high, order=2))
        gusts += level * noise / noise.std() * np.exp(0.7 * drift(rng, rng.uniform(0.7, 2.0), n, rate))
    return gusts


def rain(rng: Random, n: int, rate: int) -> np.ndarray:
    """Hundreds to thousands of drops a second, each a tiny ringing click, over a faint hiss."""
    drops = np.zeros(n)
    for _ in range(4):
        time = np.arange(int(0.012 * rate)) / rate
        drop = np.sin(2 * np.pi * log_uniform(rng, 1500, 6500) * time) * np.exp(-time / rng.uniform(0.0006, 0.002))
        count = int(rng.uniform(60, 350) * n / rate)
        drops += convolve(pulses(rng.uniform(0, n / rate, count), rng.exponential(1.0, count), n, rate), drop)
    hiss = shape_spectrum(rng.standard_normal(n), rate, band_pass(1500, 7000))
    return drops / drops.std() + rng.uniform(0.2, 0.5) * hiss / hiss.std()


def helicopter(rng: Random, n: int, rate: int) -> np.ndarray:
    """Rotor blades: thumps of low noise, 8 to 17 a second, and a faint turbine."""
    speed = rng.uniform(8, 17)
    phase = 2 * np.pi * (speed * np.arange(n) / rate + rng.uniform(0, 1))
    chop = np.exp(rng.uniform(2.0, 3.5) * (np.cos(phase) - 1))
    noise = shape_spectrum(rng.standard_normal(n), rate, band_pass(80, log_uniform(rng, 1000, 2500)))
    turbine = tone(rng.uniform(900, 2200), n, rate, (1.0, 0.3))
    return chop * noise / noise.std() + rng.uniform(0.0, 0.06) * turbine


def engine(rng: Random, n: int, rate: int) -> np.ndarray:
    """Irregular firing pulses at 40 to 85 Hz with slow revving, through two resonances of the exhaust."""
    speed = log_uniform(rng, 40, 85) * 2 ** (rng.uniform(0.02, 0.25) * drift(rng, 0.8, n, rate))
    phase = np.cumsum(speed) / rate
    firing = np.flatnonzero(np.diff(np.floor(phase)) > 0) / rate
    unevenness = 1 + 0.25 * np.resize(rng.standard_normal(4), len(firing))  # four cylinders
    times = firing + rng.normal(0, 0.0006, len(firing))
    exhaust = np.zeros(n)
    for hertz, width in ((rng.uniform(150, 300), 0.008), (rng.uniform(500, 1200), 0.004)):
        time = np.arange(int(0.03 * rate)) / rate
        stroke = np.sin(2 * np.pi * hertz * time) * np.exp(-time / width)
        exhaust += convolve(pulses(times, unevenness, n, rate), stroke)
    return exhaust


def telephone(rng: Random, n: int, rate: int) -> np.ndarray:
    """A clapper between two small gongs, 18 to 28 strokes a second, ringing and pausing."""
    speed, hertz = rng.uniform(18, 28), log_uniform(rng, 1000, 1900)
    ratios = np.array([1, 1.51, 2.22, 2.98, 3.7])
    ring = np.zeros(n)
    for gong in range(2):
        stroke = resonance(rng, hertz * (1.0, rng.uniform(1.15, 1.3))[gong], ratios, rng.uniform(0.06, 0.15), rate, 0.5)
        times = (np.arange(0, n / rate * speed) + gong / 2) / speed
        ring += convolve(pulses(times, rng.uniform(0.7, 1.0, len(times)), n, rate), stroke)
    return ring * gates(rng.uniform(1.6, 2.4), rng.uniform(0.8, 1.4), n, rate, offset=rng.uniform(0, 0.4))


def busy_signal(rng: Random, n: int, rate: int) -> np.ndarray:
    """The pair 480 + 620 Hz, detuned by up to 20 %, on for half of a period of 0.5 to 1 second."""
    detune = rng.uniform(0.85, 1.2)
    pair = tone(480 * detune, n, rate) + rng.uniform(0.7, 1.0) * tone(620 * detune, n, rate)
    period = rng.uniform(0.5, 1.0)
    return pair * gates(period, period / 2, n, rate, offset=rng.uniform(0, period / 2))


def siren(rng: Random, n: int, rate: int) -> np.ndarray:
    """A wail (slow) or yelp (fast): a harmonic tone whose pitch oscillates by about an octave."""
    speed = log_uniform(rng, 0.4, 4.0)
    turn = 2 * np.pi * (speed * np.arange(n) / rate + rng.uniform(0, 1))
    motion = np.sin(turn) if rng.random() < 0.5 else 2 / np.pi * np.arcsin(np.sin(turn))
    pitch = log_uniform(rng, 600, 1000) * 2 ** (rng.uniform(0.35, 0.6) * motion)
    return tone(pitch, n, rate, (1.0, rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6), rng.uniform(0.1, 0.3)))


def tick_tock(rng: Random, n: int, rate: int) -> np.ndarray:
    """Two alternating clicks of a clock, two to five a second."""
    times = beats(rng, 1 / rng.uniform(2, 5), n, rate)
    clock, base = np.zeros(n), log_uniform(rng, 1800, 3600)
    for side in range(2):
        time = np.arange(int(0.03 * rate)) / rate
        hertz = base * (1.0, rng.uniform(0.65, 0.85))[side]
        click = np.sin(2 * np.pi * hertz * time) + 0.6 * np.sin(2 * np.pi * 1.83 * hertz * time)
        clock += convolve(pulses(times[side::2], 1.0, n, rate), click * np.exp(-time / rng.uniform(0.002, 0.005)))
    return clock


def beep(rng: Random, n: int, rate: int) -> np.ndarray:
    """Short electronic pulses of one pitch, alone or in groups of two or three."""
    length, count = rng.uniform(0.05, 0.13), rng.integers(1, 4)
    pause = rng.uniform(0.25, 0.6)
    group = gates(2 * length, length, n, rate)  # beeps of equal length and distance
    period = 2 * length * count + pause
    keep = (np.arange(n) / rate) % period < 2 * length * count
    within = np.rint(((np.arange(n) / rate) % period) * rate).astype(np.int64)
    return tone(log_uniform(rng, 1800, 3000), n, rate, (1.0, 0.0, rng.uniform(0, 0.3))) * group[within % n] * keep


def sine_wave(rng: Random, n: int, rate: int) -> np.ndarray:
    """One steady pure tone."""
    return tone(log_uniform(rng, 350, 900), n, rate)


def chirp_tone(rng: Random, n: int, rate: int) -> np.ndarray:
    """Repeated sweeps of a pure tone through 1.5 to 3.5 octaves, all up or all down."""
    low, octaves = log_uniform(rng, 200, 600), rng.uniform(1.5, 3.5)
    period = rng.uniform(0.35, 1.2)
    part = (np.arange(n) / rate % period) / period
    part = 1 - part if rng.random() < 0.5 else part
    return tone(low * 2 ** (octaves * part), n, rate) * gates(period, period, n, rate)


def white_noise(rng: Random, n: int, rate: int) -> np.ndarray:
    """Steady noise of equal power in every hertz."""
    return rng.standard_normal(n)


class SoundClass(NamedTuple):
    """One class: AudioSet's name and identifier, and its synthesiser."""

    display_name: str
    mid: str
    synthesise: Synthesiser


# In the order of AudioSet's list; the index here is the label.
CLASSES = (
    SoundClass("Clapping", "/m/0l15bq", clapping),
    SoundClass("Heart sounds, heartbeat", "/m/01jg02", heartbeat),
    SoundClass("Chirp, tweet", "/m/07pggtn", bird),
    SoundClass("Bell", "/m/0395lw", bell),
    SoundClass("Wind", "/m/03m9d0z", wind),
    SoundClass("Rain", "/m/06mb1", rain),
    SoundClass("Helicopter", "/m/09ct_", helicopter),
    SoundClass("Engine", "/m/02mk9", engine),
    SoundClass("Telephone bell ringing", "/m/07pp8cl", telephone),
    SoundClass("Busy signal", "/m/01z47d", busy_signal),
    SoundClass("Siren", "/m/03kmc9", siren),
    SoundClass("Tick-tock", "/m/07qjznl", tick_tock),
    SoundClass("Beep, bleep", "/m/02fs_r", beep),
    SoundClass("Sine wave", "/m/01v_m0", sine_wave),
    SoundClass("Chirp tone", "/m/0hdsk", chirp_tone),
    SoundClass("White noise", "/m/0chx_", white_noise),
)

# name -> (classes by index, seconds, sample rate, soundfile subtype)
FOLDER_TO_TAG = {
    "siren_over_rain.wav": ((10, 5), 6.0, 44100, "PCM_16"),
    "birds_in_the_wind.flac": ((2, 4), 12.0, 48000, "PCM_24"),
    "bell_and_clapping.ogg": ((3, 0), 8.0, 22050, "VORBIS"),
    "indoors/telephone_beside_a_clock.wav": ((8, 11), 5.0, 8000, "PCM_16"),
    "indoors/busy_signal.flac": ((9,), 3.0, 16000, "PCM_16"),
    "outdoors/engine.wav": ((7,), 1.5, 32000, "PCM_32"),
    "outdoors/helicopter_over_noise.ogg": ((6, 15), 23.0, 44100, "VORBIS"),
}


def make_event(rng: Random, label: int, n_samples: int, rate: int) -> np.ndarray:
    """Return one event of a class (S,), randomly coloured, with 10 ms edges and unit level in its loud parts."""
    sound = CLASSES[label].synthesise(rng, n_samples, rate)
    tilt, centre, peak = rng.uniform(-1.5, 1.5), log_uniform(rng, 200, 5000), rng.uniform(-5, 5)

    def colour(hertz: np.ndarray) -> np.ndarray:  # a tilt in dB per octave and one broad peak or dip in dB
        octaves = np.log2(np.maximum(hertz, 30.0) / 1000)
        return 10 ** ((tilt * octaves + peak * np.exp(-((octaves - np.log2(centre / 1000)) ** 2) / 0.5)) / 20)

    sound = shape_spectrum(sound, rate, colour)
    edge = np.arange(n_samples) / (0.01 * rate)
    sound *= np.clip(np.minimum(edge, edge[::-1]), 0, 1)
    frames = sound[: n_samples // 160 * 160].reshape(-1, 160)
    # The level of the loudest tenth: by the mean level, sparse clicks would be far louder than steady sounds.
    return sound / max(float(np.sqrt(np.quantile(np.square(frames).mean(axis=1), 0.9))), 1e-3 * np.abs(sound).max())


def mix(rng: Random, labels: tuple[int, ...], n_samples: int, rate: int) -> np.ndarray:
    """Mix one event a label over coloured background noise; returns (S,) in [-1, 1]."""
    noise = shape_spectrum(rng.standard_normal(n_samples), rate, band_pass(20, log_uniform(rng, 300, 8000), order=1))
    mixture = 10 ** (rng.uniform(-45, -25) / 20) * noise / noise.std()
    for label in labels:
        length = max(
            int(rng.uniform(0.6, 1.0) * n_samples), min(rate, n_samples)
        )  # every class is recognisable in a second
        start = rng.integers(0, n_samples - length + 1)
        level = 10 ** (rng.uniform(-6, 0) / 20)
        mixture[start : start + length] += level * make_event(rng, label, length, rate)
    return mixture * (10 ** (rng.uniform(-18, -1) / 20) / np.abs(mixture).max())


def make_clip(seed: int, split: str, index: int, seconds: float, sample_rate: int) -> tuple[np.ndarray, list[int]]:
    """Return clip `index` of a split: its samples, int16 (S,), and its sorted labels."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    count = rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1])
    # The first label cycles through the classes, so that a small set has every class; the others are random.
    first = (index * 5 + seed) % len(CLASSES)
    others = rng.choice([label for label in range(len(CLASSES)) if label != first], size=count - 1, replace=False)
    labels = (first, *(int(label) for label in others))
    waveform = mix(rng, labels, round(seconds * sample_rate), sample_rate)
    return np.rint(waveform * 32767).astype(np.int16), sorted(labels)


def make_folder_to_tag(folder: Path, seed: int) -> None:
    """Write the named sounds, in several formats and sample rates (the .ogg bytes differ each time, not the sound)."""
    for number, (name, (labels, seconds, rate, subtype)) in enumerate(FOLDER_TO_TAG.items()):
        rng = np.random.default_rng([seed, len(SPLITS), number])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, mix(rng, labels, round(seconds * rate), rate), rate, subtype=subtype)


def is_complete(folder: Path, settings: dict) -> bool:
    """Return whether `folder` has all clips and tables of these settings."""
    try:
        if json.loads((folder / "settings.json").read_text(encoding="utf-8")) != settings:
            return False
    except (OSError, ValueError):
        return False
    return all(
        sum(1 for _ in (folder / "audio" / split).glob("*.wav")) == settings[f"n_{split}"]
        and (folder / f"{split}.tsv").is_file()
        for split in SPLITS
    )


def write_clip(folder: Path, settings: dict, split: str, index: int) -> str:
    """Write one clip of a split and return its row of the table."""
    name = f"audio/{split}/{index:04d}.wav"
    clip, labels = make_clip(settings["seed"], split, index, settings["seconds"], settings["sample_rate"])
    content = io.BytesIO()  # not a path: libsndfile hides the errors of a disk
    soundfile.write(content, clip, settings["sample_rate"], subtype="PCM_16", format="WAV")
    with explain_write_errors(folder / name):
        (folder / name).write_bytes(content.getvalue())
    return f"{name}\t{';'.join(map(str, labels))}\n"


def make_demo_sounds(folder: Path, settings: dict) -> None:
    """Write the whole set; `settings` has seed, seconds, sample_rate and a count n_SPLIT a split."""
    (folder / "settings.json").unlink(missing_ok=True)  # the folder is incomplete from here on
    for split in SPLITS:
        (folder / "audio" / split).mkdir(parents=True, exist_ok=True)
        indices = range(settings[f"n_{split}"])
        rows = thread_map(partial(write_clip, folder, settings, split), indices, desc=f"{split} sounds", unit="clip")
        for path in (folder / "audio" / split).glob("[0-9]*.wav"):
            if int(path.stem) >= len(rows):  # of an earlier, larger set
                path.unlink()
        write_text(folder / f"{split}.tsv", "filename\tlabels\n" + "".join(rows))
    lines = [f'{index},{kind.mid},"{kind.display_name}"\n' for index, kind in enumerate(CLASSES)]
    write_text(folder / "class_labels_indices.csv", "index,mid,display_name\n" + "".join(lines))
    make_folder_to_tag(folder / "folder_to_tag", settings["seed"])
    write_json(folder / "settings.json", settings)


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Make the sounds, unless the folder has them already."""
    options = parse_arguments(SoundOptions, __doc__, arguments)
    folder = Path(options.outdir)
    settings = {"recipe": RECIPE} | options.model_dump(exclude={"outdir"})
    if is_complete(folder, settings):
        print(f"{folder} already has these sounds")
        return
    make_demo_sounds(folder, settings)
    print(f"made {sum(settings[f'n_{split}'] for split in SPLITS)} clips of {len(CLASSES)} classes in {folder}")


if __name__ == "__main__":
    main()
