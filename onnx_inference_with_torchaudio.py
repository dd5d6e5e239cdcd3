"""Tag sound files with an exported CED model and the features of torchaudio, those of CED's training.

python3 onnx_inference_with_torchaudio.py SOUND.wav -m ced_tiny.onnx --chunk 5
"""

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from models.ced_mel import CedMel
from tagging.mel_files import run


def torchaudio_features(waveform: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Compute mel bands in decibels as in the model's training.

    Args:
        waveform: float32 (S,) in [-1, 1]; padded with silence to `min_frames` frames.
        settings: of CED's front-end.

    Returns:
        float32 (F,T).
    """
    spectrogram = MelSpectrogram(
        sample_rate=settings["sample_rate"],
        n_fft=settings["n_fft"],
        win_length=settings["win_size"],
        hop_length=settings["hop_size"],
        f_min=settings["f_min"],
        f_max=settings["f_max"],
        n_mels=settings["n_mels"],
        center=settings["center"],
    )
    reach = 0 if settings["center"] else settings["n_fft"]
    shortest = max((settings["min_frames"] - 1) * settings["hop_size"] + reach, settings["n_fft"] // 2 + 1)
    padded = np.pad(waveform, (0, max(shortest - len(waveform), 0)))
    with torch.inference_mode():
        return AmplitudeToDB("power", top_db=CedMel.TOP_DB)(spectrogram(torch.from_numpy(padded))).numpy()


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Tag the files of the command line."""
    run("Tag sound files with an exported CED model and torchaudio's features.", torchaudio_features, arguments)


if __name__ == "__main__":
    main()
