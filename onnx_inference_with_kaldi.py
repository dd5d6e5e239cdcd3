"""Tag sound files with an exported CED model and Kaldi's filter banks, as sherpa-onnx and other programs in C++ do.

    python3 onnx_inference_with_kaldi.py SOUND.wav -m ced_tiny.onnx --chunk 5

Kaldi's bands are triangles on the mel axis, and it pads the edges in another way: probabilities differ from PyTorch's,
by at most 0.03 with clips of 5 s and more, and by more with shorter ones.
"""

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

from collections.abc import Mapping, Sequence
from typing import Any

import kaldi_native_fbank
import numpy as np

from models.ced_mel import CedMel
from tagging.mel_files import run


def kaldi_features(waveform: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Compute mel bands in decibels as sherpa-onnx does for CED.

    Args:
        waveform: float32 (S,) in [-1, 1]; padded with silence to one window.
        settings: of CED's front-end.

    Returns:
        float32 (F,T).
    """
    rate = settings["sample_rate"]
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms = 1000 * settings["win_size"] / rate
    options.frame_opts.frame_shift_ms = 1000 * settings["hop_size"] / rate
    options.frame_opts.window_type = "hann"
    options.frame_opts.dither = 0
    options.frame_opts.preemph_coeff = 0
    options.frame_opts.remove_dc_offset = False
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = settings["n_mels"]
    options.mel_opts.low_freq = settings["f_min"]
    options.mel_opts.high_freq = settings["f_max"]
    options.use_log_fbank = False
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(rate, np.pad(waveform, (0, max(settings["win_size"] - len(waveform), 0))))
    bank.input_finished()
    power = np.stack([bank.get_frame(frame) for frame in range(bank.num_frames_ready)], axis=1)
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    return np.maximum(decibels, decibels.max() - CedMel.TOP_DB)


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Tag the files of the command line."""
    run("Tag sound files with an exported CED model and Kaldi's filter banks.", kaldi_features, arguments)


if __name__ == "__main__":
    main()
