"""Mix channels down to one, also channels of opposite polarity.

S samples.
"""

import numpy as np

SECTION_SECONDS = 1  # polarity is detected for each second alone
_CANCELLED = 0.01  # share of the channels' energy in their mean: 20 dB less
_FAINT = 1e-8  # mean square of a section that counts as silent: -80 dB


class Downmixer:
    """Averages channels block by block.

    Stereo with channels of opposite polarity (an inverted cable or plug-in) has a mean near silence. In each second in
    which the mean has less than a hundredth of the channels' energy, half their difference is taken instead, which is
    the mean with the second channel inverted: no sound is lost, and where one channel is the exact opposite of the
    other, the result is the first one. The output does not depend on the size of the blocks.

    Args:
        sample_rate: in Hz.

    Attributes:
        n_samples: returned so far.
        n_opposite: of these, in seconds of opposite polarity.
    """

    def __init__(self, sample_rate: int) -> None:
        self.n_section = SECTION_SECONDS * sample_rate
        self.n_samples = self.n_opposite = 0
        self._held: list[np.ndarray] = []
        self._n_held = 0

    def push(self, block: np.ndarray, is_last: bool = False) -> np.ndarray:
        """Mix a block.

        Args:
            block: float32 (S, channels).
            is_last: no block follows, so nothing is held back.

        Returns:
            float32 (S',): of stereo, whole seconds, and the rest at the end.
        """
        if block.shape[1] != 2:
            self.n_samples += len(block)
            return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        self._held.append(block)
        self._n_held += len(block)
        n_given = self._n_held if is_last else self._n_held // self.n_section * self.n_section
        if n_given == 0:
            return np.zeros(0, np.float32)
        joined = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        self._n_held -= n_given
        self._held = [joined[n_given:]] if self._n_held else []
        return self._mix(joined[:n_given])

    def _mix(self, block: np.ndarray) -> np.ndarray:
        left, right = block[:, 0], block[:, 1]
        mixed = left + right
        for start in range(0, len(block), self.n_section):
            a, b = left[start : start + self.n_section], right[start : start + self.n_section]
            product = float(np.dot(a, b))
            if product >= 0:  # nearly always; the mean then has at least half of the energy
                continue
            energy = float(np.dot(a, a)) + float(np.dot(b, b))
            if energy > 2 * _FAINT * len(a) and energy + 2 * product < 2 * _CANCELLED * energy:
                mixed[start : start + self.n_section] = a - b
                self.n_opposite += len(a)
        mixed *= np.float32(0.5)
        self.n_samples += len(mixed)
        return mixed
