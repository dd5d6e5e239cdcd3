"""The bandwidth of clips: the frequency above which a pack has no content, and mel bands of a model above it.

Sounds of 8 kHz that were resampled to 16 kHz end at 4 kHz. The content above (mirror images 10 dB below the sound, or
nothing), the roll-off below, and the rounding of 16-bit samples depend on the resampler and are clearly visible in
decibels. A network that was trained on them predicts other tags for the output of another resampler: see
docs/results.md. So bands above `usable_limit` are left out (`f_max`, for networks that start from random weights) or
set to silence (`band_limit`, for trained weights, whose front-end is fixed): in the checkpoint, and so in tags and
exports.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from audio.dataset import Pack
from models import AudioTagger

MAX_CLIPS_READ = 256  # clips whose spectrum is computed
READ_SECONDS = 10.0  # of each
# Share of the clips that may have content above a limit: measured were 3 %, clips that are clipped or cut while loud.
FULL_BAND_SHARE = 0.1
MIXED_SHARE = 0.2  # share of clips with a lower limit than the others that causes a warning
# Upper limits in Hz of sounds that were recorded or coded at usual rates; the measured limit is one of them.
USUAL_LIMITS = (4000, 5512, 6000, 8000, 11025, 12000, 16000, 22050, 24000)
# Factor of a limit up to which soxr, torchaudio, librosa and SciPy agree within 4 dB; at 0.98 they differ by 30 dB.
USABLE_SHARE = 0.9
N_FFT = 1024
# Above this factor of a limit, the power of sounds that torchaudio or SciPy upsampled is at most IMAGE_POWER times the
# power just below the limit, in nine clips of ten. Speech and ESC-10 have five times as much above each usual limit.
IMAGES_REACH = 1.15
IMAGE_POWER = 10**-1.2


@dataclass(frozen=True)
class BandLimits:
    """The band limits of the clips of a pack.

    Attributes:
        limit: frequency in Hz above which all but a tenth of the clips have no content, or only mirror images; half the
            pack's sample rate if there is no limit.
        shares: frequency in Hz of `USUAL_LIMITS` → share of the clips with nothing but rounding noise above it.
    """

    limit: float
    shares: dict[float, float]


def measure_band_limits(pack: Pack) -> BandLimits:
    """Measure the band limits of the clips of a pack from their samples.

    A clip has no content above a limit if the power there is within 10 dB of that of rounding (a uniform error of one
    step: 1/12 of its square). It has mirror images if the power is far below that just under the limit (`IMAGE_POWER`):
    that is also true for some speech, but not for nine clips of ten.
    """
    rows = np.unique(np.linspace(0, len(pack) - 1, min(MAX_CLIPS_READ, len(pack))).round().astype(int))
    window = np.hanning(N_FFT)
    rounding = 10 * (1 / 32768) ** 2 / 12 * (window**2).sum()
    powers = []
    for row in rows:
        sound = pack.read(int(row), 0, round(READ_SECONDS * pack.sample_rate))
        sound = np.pad(sound, (0, max(N_FFT - len(sound), 0)))
        frames = np.lib.stride_tricks.sliding_window_view(sound, N_FFT)[:: N_FFT // 2]
        power = (np.abs(np.fft.rfft(frames * window)) ** 2).mean(axis=0)
        if power.max() > rounding:  # otherwise it is silent
            powers.append(power)
    nyquist = pack.sample_rate / 2
    hertz = np.arange(N_FFT // 2 + 1) * pack.sample_rate / N_FFT
    limit, shares = nyquist, {}
    for usual in reversed([usual for usual in USUAL_LIMITS if usual < 0.95 * nyquist] if powers else []):
        above, below = _around(np.array(powers), hertz, usual)
        shares[float(usual)] = float((above <= rounding).mean())
        if (above <= np.maximum(rounding, IMAGE_POWER * below)).mean() >= 1 - FULL_BAND_SHARE:
            limit = float(usual)
    return BandLimits(limit, dict(sorted(shares.items())))


def _around(powers: np.ndarray, hertz: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the power above and just below a limit, (N,) each, of spectra (N, bins); 0 below it if it is too high."""
    if IMAGES_REACH * limit < 0.97 * hertz[-1]:
        edges = [*(factor * limit for factor in (IMAGES_REACH, 1.3, 1.5, 2.0)), np.inf]
        parts = [powers[:, (hertz > low) & (hertz <= high)] for low, high in itertools.pairwise(edges)]
        above = np.max([part.mean(axis=1) for part in parts if part.size], axis=0)
        return above, powers[:, (hertz > 0.7 * limit) & (hertz < 0.85 * limit)].mean(axis=1)
    return powers[:, hertz > limit / 0.97].max(axis=1), np.zeros(len(powers))


def usable_limit(limit: float) -> float:
    """Return the frequency in Hz up to which sounds with a band limit do not depend on the resampler."""
    return USABLE_SHARE * limit


def describe_unusable_bands(limits: BandLimits, model: AudioTagger, data: object) -> str | None:
    """Return a warning if a model has mel bands in which the clips have no content, otherwise None.

    Args:
        limits: band limits of the training clips.
        model: the student.
        data: name of the training data.
    """
    highest = model.front_end.highest_hz
    subject, limit = "its clips have", limits.limit
    if limit >= highest:
        mixed = (limit for limit, share in limits.shares.items() if share >= MIXED_SHARE)
        limit = next(mixed, highest)
        if limit >= highest:
            return None
        subject = f"{limits.shares[limit]:.0%} of its clips have"
    return (
        f"{data}: {subject} no content above {limit:g} Hz, but {model.name} has mel bands up to {highest:g} Hz. The "
        "empty bands depend on the resampler, so tags of files that were resampled otherwise, or have more content, "
        f"will differ; set `--model_args.band_limit {usable_limit(limit):g}` to ignore these bands"
    )
