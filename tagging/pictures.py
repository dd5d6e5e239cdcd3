"""A picture of a sound file: its spectrogram, and below it, over the same time, what was heard when."""

import warnings
from pathlib import Path

import numpy as np

from audio.io import AudioBlocks, AudioReadError
from common.files import whole_file
from tagging.files import TaggedFile
from tagging.outputs import FileEach
from tagging.rows import as_text

MOST_COLUMNS = 1200  # of the spectrogram; there are twice as many at most, whatever the length
LABELS = 10  # most of them in a picture
RANGE_DB = 80.0
QUIET_DB = -20.0  # what is at most so loud, silence say, is not made to look loud
TITLE = 80  # characters, at most
_RATE = 16000
_N_FFT = 512


class Pictures(FileEach):
    """Draws NAME.png for each sound into a folder."""

    extension = ".png"

    def make(self, file: TaggedFile, target: Path) -> None:
        """Draw a file."""
        try:
            with whole_file(target) as partial:
                draw(file, partial)
        except AudioReadError as error:  # gone since it was tagged
            self.faults[str(file.path)] = error.reason


def spectrogram(path: Path, n_columns: int = MOST_COLUMNS) -> tuple[np.ndarray, float]:
    """Compute a spectrogram of few columns, whatever the length of the sound, block by block.

    Args:
        path: the sound.
        n_columns: there are fewer than twice as many.

    Returns:
        Decibels (n_fft/2 + 1, columns) up to 8 kHz, each column the mean power over its time, and the seconds in all.

    Raises:
        AudioReadError: it cannot be read.
    """
    window = np.hanning(_N_FFT).astype(np.float32)
    per_column = 1  # spectra summed in a column; doubled whenever there are too many columns
    columns: list[np.ndarray] = []
    power, n_summed, n_samples = np.zeros(_N_FFT // 2 + 1), 0, 0
    rest = np.zeros(0, np.float32)
    for block in AudioBlocks(path, _RATE):
        n_samples += len(block)
        samples = np.concatenate([rest, block])
        n_frames = len(samples) // _N_FFT
        rest = samples[n_frames * _N_FFT :]
        frames = samples[: n_frames * _N_FFT].reshape(n_frames, _N_FFT)
        for spectrum in np.abs(np.fft.rfft(frames * window, axis=1)) ** 2:
            power += spectrum
            n_summed += 1
            if n_summed == per_column:
                columns.append(power / per_column)
                power, n_summed = np.zeros(_N_FFT // 2 + 1), 0
                if len(columns) == 2 * n_columns:
                    columns = [(a + b) / 2 for a, b in zip(columns[::2], columns[1::2], strict=True)]
                    per_column *= 2
    if n_summed or not columns:
        filled = np.zeros(_N_FFT, np.float32)
        filled[: len(rest)] = rest
        columns.append((power + np.abs(np.fft.rfft(filled * window)) ** 2) / (n_summed + 1))
    return 10 * np.log10(np.maximum(np.array(columns).T, 1e-10)), n_samples / _RATE


def draw(file: TaggedFile, target: str | Path, waveform: np.ndarray | None = None) -> None:
    """Draw a tagged file.

    Args:
        file: its windows carry the tags to show; of each label its best windows count for being shown. Where windows
            overlap, the highest probability shows.
        target: the PNG.
        waveform: the sound's samples (S,), to be drawn above its spectrogram.

    Raises:
        AudioReadError: the sound cannot be read again.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decibels, seconds = spectrogram(file.path)
    best: dict[str, float] = {}
    for window in file.windows:
        for label, value in window.tags:
            best[label] = max(best.get(label, 0.0), value)
    labels = sorted(best, key=lambda label: -best[label])[:LABELS]
    heights = [*([] if waveform is None else [1.0]), 3.0, 0.28 * max(len(labels), 1) + 0.3]
    figure = Figure(figsize=(12, sum(heights) - 0.1), layout="constrained")
    FigureCanvasAgg(figure)
    *top, above, below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    if waveform is not None:
        times = np.linspace(0, seconds, min(MOST_COLUMNS, len(waveform)), endpoint=False)
        firsts = np.linspace(0, len(waveform), len(times), endpoint=False).astype(int)
        lowest, highest = np.minimum.reduceat(waveform, firsts), np.maximum.reduceat(waveform, firsts)
        top[0].fill_between(times, lowest, highest, color=(0.12, 0.3, 0.6), linewidth=0.5)
        top[0].set_ylabel("amplitude")
    peak = max(float(decibels.max()), QUIET_DB)
    extent = (0.0, seconds, 0.0, _RATE / 2000)
    above.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=peak - RANGE_DB, vmax=peak)
    above.set_ylabel("kHz")
    figure.suptitle(_title(file.path), fontsize="large", parse_math=False)
    edges = np.unique([(window.start, window.end) for window in file.windows])
    for row, values in enumerate(_between(edges, file, labels)):
        bars = [*zip(edges[:-1], np.diff(edges), strict=True)]
        colors = [(0.12, 0.3, 0.6, value) for value in values]
        below.broken_barh(bars, (row - 0.4, 0.8), facecolors=colors, linewidth=0)
    below.set(xlim=(0, seconds), xlabel="seconds", ylim=(max(len(labels), 1) - 0.5, -0.5), yticks=range(len(labels)))
    below.set_yticklabels([f"{label}  {best[label]:.2f}" for label in labels], parse_math=False)
    below.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a box stands for a letter that the font has not
        figure.savefig(target, dpi=110, format="png")


def _title(path: Path) -> str:
    name = "".join(letter if letter.isprintable() else " " for letter in as_text(path.name))
    return name if len(name) <= TITLE else f"{name[: TITLE - 31]} … {name[-28:]}"


def _between(edges: np.ndarray, file: TaggedFile, labels: list[str]) -> np.ndarray:
    """Highest probability of each label (labels, len(edges) - 1) between neighbouring starts and ends of windows."""
    rows = {label: row for row, label in enumerate(labels)}
    highest = np.zeros((len(labels), max(len(edges) - 1, 0)))
    for window in file.windows:
        first, last = np.searchsorted(edges, (window.start, window.end))
        for label, value in window.tags:
            if label in rows:
                row = highest[rows[label], first:last]
                np.maximum(row, value, out=row)
    return highest
