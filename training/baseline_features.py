"""Features of the baseline: statistics of the spectrogram of a clip over time.

Letters: N clips, S samples, F mel bands, K cepstral coefficients, T frames, P parts.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from audio.dataset import Pack
from common.progress import create_progress
from models.ced_mel import CedMel

N_MELS = 40
N_MFCCS = 20
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.01  # at 16 kHz: 512 and 160 samples
BLOCK_FRAMES = 1024  # computed at once, which bounds the memory for long clips
STRETCH_FRAMES = 100  # of a segment of clips that are read in part: a second
FLOOR = 1e-6  # added to mel power: digital silence becomes -60 dB, near the noise of recordings, and no outlier
SPECTRA = ("log-mel", "MFCC")
PARTS = (1, 4)
FeatureTable = dict[tuple[str, int], np.ndarray]


class LogMel(CedMel):
    """Log-mel power in absolute decibels: unlike in CED's front-end, the peak of the clip has no effect.

    Windows are 32 ms and hops 10 ms at any rate; a Fourier transform has the next power of two of samples.

    Args:
        sample_rate: hertz.
    """

    def __init__(self, sample_rate: int) -> None:
        window = max(2, round(WINDOW_SECONDS * sample_rate))
        super().__init__(
            sample_rate=sample_rate,
            n_mels=N_MELS,
            n_fft=1 << (window - 1).bit_length(),
            win_size=window,
            hop_size=max(1, round(HOP_SECONDS * sample_rate)),
            f_max=None,
            center=False,  # blocks of a clip are framed by `compute_log_mel`, which centres them
        )

    def compress(self, mel: Tensor, is_padding: Tensor | None) -> Tensor:
        """Bring mel power (B,F,T) to decibels."""
        return 10 * (mel + FLOOR).log10()


def frame_ranges(n_frames: int, most_frames: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of frames that are read of a clip, (first, end): all, or segments spread evenly over it.

    Args:
        n_frames: T of the whole clip.
        most_frames: number of frames read of a longer clip, in segments of `STRETCH_FRAMES`.
    """
    if n_frames <= max(most_frames, STRETCH_FRAMES):
        for first in range(0, n_frames, BLOCK_FRAMES):
            yield first, min(first + BLOCK_FRAMES, n_frames)
        return
    n_stretches = max(1, most_frames // STRETCH_FRAMES)
    for first in np.linspace(0, n_frames - STRETCH_FRAMES, n_stretches).round().astype(int).tolist():
        yield first, first + STRETCH_FRAMES


@torch.inference_mode()
def compute_log_mel(pack: Pack, clip: int, front_end: LogMel, most_seconds: float) -> np.ndarray:
    """Return the log-mel spectrogram of a clip, (T, F) float64 in decibels.

    Frames are centred on multiples of the hop and the clip is reflected at its ends, as in `CedMel`; shorter clips
    than half a Fourier transform are extended with zeros.

    Args:
        pack: the pack.
        clip: index of the clip.
        front_end: front-end for the pack's sample rate.
        most_seconds: of longer clips about so much is read, in segments spread over them.
    """
    n_samples = int(pack.n_samples[clip])
    reach = front_end.n_fft // 2
    n_extended = max(n_samples, reach + 1)
    n_frames = n_extended // front_end.hop_size + 1
    blocks = []
    for first, end in frame_ranges(n_frames, round(most_seconds / HOP_SECONDS)):
        start = first * front_end.hop_size - reach
        stop = (end - 1) * front_end.hop_size - reach + front_end.n_fft
        position = np.abs(np.arange(start, stop))  # reflected at the beginning, then at the end
        position = np.where(position >= n_extended, 2 * (n_extended - 1) - position, position)
        low, high = int(position.min()), int(position.max()) + 1
        samples = np.zeros(high - low, np.float32)
        stored = pack.read(clip, low, min(high, n_samples)) if low < n_samples else samples[:0]
        samples[: len(stored)] = stored
        blocks.append(front_end(torch.from_numpy(samples[position - low])[None])[0])  # (F, T of the block)
    return torch.cat(blocks, dim=1).T.double().numpy()


def compute_cepstra(spectrogram: np.ndarray) -> np.ndarray:
    """Return the first K coefficients of the orthonormal DCT-II over the mel bands: (T,F) -> (T,K)."""
    from scipy.fft import dct

    coefficients: np.ndarray = dct(spectrogram, axis=1, norm="ortho")[:, :N_MFCCS]
    return coefficients


def compute_statistics(frames: np.ndarray, n_parts: int) -> np.ndarray:
    """Return mean and standard deviation over time of each of P equal parts, one part after the other.

    Args:
        frames: (T,F), T at least 1.
        n_parts: P; with fewer frames than parts, some are in two parts.

    Returns:
        (P * 2F,) float64.
    """
    n_frames = len(frames)
    statistics = []
    for index in range(n_parts):
        first = index * n_frames // n_parts
        part = frames[first : max(first + 1, (index + 1) * n_frames // n_parts)]
        statistics += [part.mean(axis=0), part.std(axis=0)]
    return np.concatenate(statistics)


def compute_features(pack: Pack, most_seconds: float, description: str = "baseline") -> FeatureTable:
    """Compute all features of all clips.

    Args:
        pack: N clips of any sample rate and any lengths.
        most_seconds: see `compute_log_mel`.
        description: title of the progress bar, for large packs.

    Returns:
        (spectrum, P) → float64 (N, width), for each spectrum of `SPECTRA` and P of `PARTS`. A feature of a clip depends
        on that clip alone.
    """
    front_end = LogMel(pack.sample_rate)
    rows: dict[tuple[str, int], list[np.ndarray]] = {(spectrum, parts): [] for spectrum in SPECTRA for parts in PARTS}
    for clip in create_progress(range(len(pack)), desc=description, unit="clip", disable=len(pack) < 2000):
        spectrogram = compute_log_mel(pack, clip, front_end, most_seconds)
        for spectrum, frames in zip(SPECTRA, (spectrogram, compute_cepstra(spectrogram)), strict=True):
            for parts in PARTS:
                rows[spectrum, parts].append(compute_statistics(frames, parts))
    return {key: np.stack(values) for key, values in rows.items()}
