"""Up to which frequency the clips of a pack reach, and what a model does with mel bands that lie above.

Sounds of 8 kHz that were resampled to 16 kHz end at 4 kHz. What a resampler leaves above (mirror images 10 dB below the
sound, or nothing), how soon it falls off below, and the rounding of 16-bit samples all stand clearly in decibels. A
network that learnt them gives another resampler's version of a sound other tags: see docs/results.md. So bands
that reach above `usable_limit` are left out (`f_max`, for networks that start from random weights) or kept silent
(`band_limit`, for those whose weights know a front-end): in the checkpoint, and so in tags, figures and exports alike.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from audio.dataset import Pack
from models import AudioTagger

MOST_READ = 256  # clips whose spectrum is looked at
READ_SECONDS = 10.0  # of each
# Of them, which may reach above a limit: 3 % of clips that were cut while loud, or clipped, were measured to.
FULL_BAND_SHARE = 0.1
MIXED_SHARE = 0.2  # of the clips, which end below the others and are worth a warning
# Upper edges in Hz of sounds that were recorded or coded at usual rates; a limit that was measured is one of them.
USUAL_LIMITS = (4000, 5512, 6000, 8000, 11025, 12000, 16000, 22050, 24000)
# In units of a limit: up to here soxr, torchaudio, librosa and SciPy agree within 4 dB; at 0.98 they are 30 dB apart.
USABLE_SHARE = 0.9
N_FFT = 1024
# From this factor above a limit on, sounds that torchaudio or SciPy had upsampled have at most that power, beside what
# lies just below the limit, in nine clips of ten. Speech and ESC-10 have five times as much above each usual limit.
IMAGES_REACH = 1.15
IMAGE_POWER = 10**-1.2


@dataclass(frozen=True)
class BandLimits:
    """Where the clips of a pack end.

    Attributes:
        limit: frequency in Hz above which all but a tenth of the clips hold nothing, or mirror images; half the pack's
            sample rate where there is none.
        shares: frequency in Hz of `USUAL_LIMITS` → the share of the clips that hold nothing above it but rounding.
    """

    limit: float
    shares: dict[float, float]


def measure_band_limits(pack: Pack) -> BandLimits:
    """Measure where the clips of a pack end, from their samples: files need not be what their sample rate says.

    A clip holds nothing above a limit where the power there is within 10 dB of that of rounding (a uniform error of one
    step: 1/12 of its square). It holds mirror images where the power is far below that just under the limit
    (`IMAGE_POWER`): some speech looks like that, too, but not nine clips of ten.
    """
    rows = np.unique(np.linspace(0, len(pack) - 1, min(MOST_READ, len(pack))).round().astype(int))
    window = np.hanning(N_FFT)
    rounding = 10 * (1 / 32768) ** 2 / 12 * (window**2).sum()
    powers = []
    for row in rows:
        sound = pack.read(int(row), 0, round(READ_SECONDS * pack.sample_rate))
        sound = np.pad(sound, (0, max(N_FFT - len(sound), 0)))
        frames = np.lib.stride_tricks.sliding_window_view(sound, N_FFT)[:: N_FFT // 2]
        power = (np.abs(np.fft.rfft(frames * window)) ** 2).mean(axis=0)
        if power.max() > rounding:  # else it is silent and says nothing
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
    """Power above and just below a limit, (N,) each, of spectra (N, bins); 0 below it where images cannot be told."""
    if IMAGES_REACH * limit < 0.97 * hertz[-1]:
        edges = [*(factor * limit for factor in (IMAGES_REACH, 1.3, 1.5, 2.0)), np.inf]
        parts = [powers[:, (hertz > low) & (hertz <= high)] for low, high in itertools.pairwise(edges)]
        above = np.max([part.mean(axis=1) for part in parts if part.size], axis=0)
        return above, powers[:, (hertz > 0.7 * limit) & (hertz < 0.85 * limit)].mean(axis=1)
    return powers[:, hertz > limit / 0.97].max(axis=1), np.zeros(len(powers))


def usable_limit(limit: float) -> float:
    """Return the frequency in Hz up to which sounds that end at `limit` are the same, however they were resampled."""
    return USABLE_SHARE * limit


def describe_unusable_bands(limits: BandLimits, model: AudioTagger, data: object) -> str | None:
    """Say where a model learns from mel bands in which clips hold nothing; None where it does not.

    Args:
        limits: of the clips to learn from.
        model: the student.
        data: what the clips are called.
    """
    highest = model.front_end.highest_hz
    whose, limit = "its clips hold", limits.limit
    if limit >= highest:
        mixed = (limit for limit, share in limits.shares.items() if share >= MIXED_SHARE)
        limit = next(mixed, highest)
        if limit >= highest:
            return None
        whose = f"{limits.shares[limit]:.0%} of its clips hold"
    return (
        f"{data}: {whose} nothing above {limit:g} Hz, but {model.name} takes mel bands up to {highest:g} Hz. What it "
        "learns from the empty ones depends on the resampler, and so will its tags of files that were resampled "
        f"otherwise, or hold more; `--model_args.band_limit {usable_limit(limit):g}` ignores what lies above"
    )
