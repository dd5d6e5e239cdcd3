"""The same sound at another sample rate, by the resamplers that people use."""

import numpy as np
import scipy.signal
import soxr
import torch
import torchaudio.functional


def _torchaudio(**settings):
    return lambda sound, rate, wanted: torchaudio.functional.resample(
        torch.from_numpy(sound), rate, wanted, **settings
    ).numpy()


# librosa's default, `soxr_hq`, is "soxr"; its former one, `kaiser_best`, has these settings in torchaudio's manual.
KAISER_BEST = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}
RESAMPLERS = {
    "soxr": lambda sound, rate, wanted: soxr.resample(sound, rate, wanted, "HQ"),
    "torchaudio": _torchaudio(),
    "librosa kaiser_best": _torchaudio(**KAISER_BEST),
    "SciPy": lambda sound, rate, wanted: scipy.signal.resample_poly(sound, wanted, rate),  # whole multiples only
}


def resample_by(name: str, sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Resample float32 (S,) by one of `RESAMPLERS`."""
    return RESAMPLERS[name](sound.astype(np.float32), rate, wanted).astype(np.float32)
