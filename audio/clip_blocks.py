"""The 16-bit samples of a clip for packing, block by block, and whether it is silent or clipped.

S samples.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from audio.errors import AudioReadError
from audio.io import AudioBlocks, describe_long, to_int16
from audio.limits import DEFAULT_LIMITS, SoundLimits

_CLIPPED_RUN = 3  # neighbouring samples at full scale
_CLIPPED_PEAK = 1.01  # 0.1 dB above full scale: resampling exceeds it by less


class ClipBlocks:
    """Blocks of int16 (S,), or (S, 2) in stereo, of a sound file.

    Args:
        path: a sound file of any kind.
        sample_rate: of the blocks, in Hz.
        stereo: two channels; mono is duplicated, more than two are averaged.
        limits: of the file and of the clip.

    Attributes:
        source_rate: of the file, in Hz, set with the first block.
        warnings: see `AudioBlocks`; complete at the end, as the next two.
        silent: every sample is zero.
        clipped: the sound exceeds full scale by more than resampling does, or stays at it.

    Raises:
        AudioReadError: while iterating: see `AudioBlocks`; and where the clip exceeds its limit.
    """

    def __init__(
        self, path: str | Path, sample_rate: int, *, stereo: bool = False, limits: SoundLimits = DEFAULT_LIMITS
    ) -> None:
        self.path, self.rate, self.limits = path, sample_rate, limits
        self.source_rate = 0
        self.warnings: dict[str, str] = {}
        self.silent, self.clipped = True, False
        self._stereo = stereo
        self._blocks = AudioBlocks(path, sample_rate, mix_down=not stereo, limits=limits)
        self._last = np.zeros((0,), bool)  # whether the last samples are at full scale

    def __iter__(self) -> Iterator[np.ndarray]:
        n_samples = 0
        for waveform in self._blocks:
            if self._stereo and waveform.shape[1] != 2:
                waveform = waveform.mean(axis=1, keepdims=True).repeat(2, axis=1)
            n_samples += waveform.size
            if n_samples > self.limits.clip_samples:
                raise AudioReadError(self.path, describe_long(self.limits, self.rate, 2 if self._stereo else 1))
            samples = to_int16(waveform)
            self.silent = self.silent and not samples.any()
            self.clipped = self.clipped or self._is_clipped(waveform, samples)
            yield samples
        self.source_rate, self.warnings = self._blocks.source_rate, self._blocks.warnings

    def _is_clipped(self, waveform: np.ndarray, samples: np.ndarray) -> bool:
        """Whether a block exceeds full scale, or stays at it together with the end of the last one."""
        if np.abs(waveform).max() > _CLIPPED_PEAK:
            return True
        full = (samples >= 32767) | (samples <= -32767)
        if len(self._last):
            full = np.concatenate([self._last, full])
        self._last = full[1 - _CLIPPED_RUN :]
        if np.count_nonzero(full) < _CLIPPED_RUN:
            return False
        run = full[: 1 - _CLIPPED_RUN or None]
        for shift in range(1, _CLIPPED_RUN):
            run = run[: len(full) - _CLIPPED_RUN + 1] & full[shift : len(full) - _CLIPPED_RUN + 1 + shift]
        return bool(run.any())
