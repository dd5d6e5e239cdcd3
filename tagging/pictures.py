"""A picture of a sound file: its spectrogram, and below it, on the same time axis, the probabilities of its labels."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from audio.errors import AudioReadError
from audio.isolation import IsolatedBlocks
from audio.limits import DEFAULT_LIMITS, SoundLimits
from common.files import whole_file
from tagging.files import TaggedFile
from tagging.outputs import FilePerSound
from tagging.parts import Share
from tagging.rows import escape_name

MAX_COLUMNS = 1200  # of the spectrogram; fewer than twice as many, for any length
MAX_LABELS = 10  # in a picture
RANGE_DB = 80.0
QUIET_DB = -20.0  # lowest top of the colour scale, so that noise in silence does not look loud
MAX_TITLE = 80  # characters
_RATE = 16000
_N_FFT = 512


class Pictures(FilePerSound):
    """Draws NAME.png for each sound into a folder.

    Args:
        folder: where they go, see `FilePerSound`, as the next three.
        paths: all sounds.
        settings: the provenance of the files.
        share: this process's share of the work.
        limits: of a sound file, which is decoded again.
    """

    extension = ".png"

    def __init__(
        self,
        folder: Path,
        paths: Iterable[Path],
        settings: Mapping[str, Any],
        share: Share,
        limits: SoundLimits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(folder, paths, settings, share)
        self.limits = limits

    def make(self, file: TaggedFile, target: Path) -> None:
        """Draw a sound's picture."""
        try:
            with whole_file(target) as partial:
                draw(file, partial, limits=self.limits)
        except AudioReadError as error:  # removed since it was tagged
            self.faults[str(file.path)] = error.reason


def compute_spectrogram(
    path: Path, n_columns: int = MAX_COLUMNS, limits: SoundLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, float]:
    """Compute a spectrogram block by block, with a limited number of columns for any length.

    Args:
        path: the sound.
        n_columns: the spectrogram has fewer than twice as many.
        limits: of the sound file.

    Returns:
        Decibels (n_fft/2 + 1, columns) up to 8 kHz, each column the mean power of its frames, and the sound's seconds.

    Raises:
        AudioReadError: the sound cannot be read.
    """
    window = np.hanning(_N_FFT).astype(np.float32)
    per_column = 1  # spectra summed in a column; doubled whenever there are too many columns
    columns: list[np.ndarray] = []
    power, n_summed, n_samples = np.zeros(_N_FFT // 2 + 1), 0, 0
    rest = np.zeros(0, np.float32)
    for block in IsolatedBlocks(path, _RATE, limits=limits):
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


def draw(
    file: TaggedFile,
    target: str | Path | BinaryIO,
    waveform: np.ndarray | None = None,
    limits: SoundLimits = DEFAULT_LIMITS,
) -> None:
    """Draw a tagged file.

    Args:
        file: its tags are drawn, of the labels with the highest probabilities; where windows overlap, the higher one.
        target: the PNG.
        waveform: samples (S,), drawn above the spectrogram.
        limits: of the sound file.

    Raises:
        AudioReadError: the sound cannot be read again.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decibels, seconds = compute_spectrogram(file.path, limits=limits)
    best: dict[str, float] = {}
    for window in file.windows:
        for label, value in window.tags:
            best[label] = max(best.get(label, 0.0), value)
    labels = sorted(best, key=lambda label: -best[label])[:MAX_LABELS]
    heights = [*([] if waveform is None else [1.0]), 3.0, 0.28 * max(len(labels), 1) + 0.3]
    figure = Figure(figsize=(12, sum(heights) - 0.1), layout="constrained")
    FigureCanvasAgg(figure)
    *top, above, below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    if waveform is not None:
        times = np.linspace(0, seconds, min(MAX_COLUMNS, len(waveform)), endpoint=False)
        firsts = np.linspace(0, len(waveform), len(times), endpoint=False).astype(int)
        lowest, highest = np.minimum.reduceat(waveform, firsts), np.maximum.reduceat(waveform, firsts)
        top[0].fill_between(times, lowest, highest, color=(0.12, 0.3, 0.6), linewidth=0.5)
        top[0].set_ylabel("amplitude")
    peak = max(float(decibels.max()), QUIET_DB)
    extent = (0.0, seconds, 0.0, _RATE / 2000)
    above.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=peak - RANGE_DB, vmax=peak)
    above.set_ylabel("kHz")
    figure.suptitle(_format_title(file.path), fontsize="large", parse_math=False)
    edges = np.unique([(window.start, window.end) for window in file.windows])
    for row, values in enumerate(_compute_maxima(edges, file, labels)):
        bars = [*zip(edges[:-1], np.diff(edges), strict=True)]
        colors = [(0.12, 0.3, 0.6, value) for value in values]
        below.broken_barh(bars, (row - 0.4, 0.8), facecolors=colors, linewidth=0)
    below.set(xlim=(0, seconds), xlabel="seconds", ylim=(max(len(labels), 1) - 0.5, -0.5), yticks=range(len(labels)))
    below.set_yticklabels([f"{label}  {best[label]:.2f}" for label in labels], parse_math=False)
    below.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks are drawn as boxes
        figure.savefig(target, dpi=110, format="png")


def _format_title(path: Path) -> str:
    name = "".join(letter if letter.isprintable() else " " for letter in escape_name(path.name))
    return name if len(name) <= MAX_TITLE else f"{name[: MAX_TITLE - 31]} … {name[-28:]}"


def _compute_maxima(edges: np.ndarray, file: TaggedFile, labels: list[str]) -> np.ndarray:
    """Compute the highest probability of each label between neighbouring edges of windows: (labels, len(edges) - 1)."""
    rows = {label: row for row, label in enumerate(labels)}
    highest = np.zeros((len(labels), max(len(edges) - 1, 0)))
    for window in file.windows:
        first, last = np.searchsorted(edges, (window.start, window.end))
        for label, value in window.tags:
            if label in rows:
                row = highest[rows[label], first:last]
                np.maximum(row, value, out=row)
    return highest
