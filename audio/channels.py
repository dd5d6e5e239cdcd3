"""Channels to one: their mean, and what is to be done where it would be near silence.

S samples.
"""

import numpy as np

SECTION_SECONDS = 1  # whether channels cancel each other is decided for each second alone
_CANCELLED = 0.01  # of the channels' energy is left in their mean: 20 dB less
_FAINT = 1e-8  # mean square of a section in which no sound is looked for: -80 dB


class Downmixer:
    """Averages channels block by block.

    Stereo whose channels are of opposite polarity (a cable or a plug-in turned one round) has a mean near silence. In
    each second in which the mean has less than a hundredth of the channels' energy, half their difference is taken
    instead, which is what the mean would be with the second channel turned round: no sound is lost, and where a channel
    is the exact opposite of the other, the result is the first one. What comes out does not depend on how the samples
    are cut into blocks.

    Args:
        sample_rate: in Hz.

    Attributes:
        n_samples: given out so far.
        n_opposite: of them, in seconds of opposite polarity.
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
            is_last: nothing follows, so hold nothing back.

        Returns:
            float32 (S',): of stereo, whole seconds, and what remains at the end.
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
            if product >= 0:  # nearly always: then the mean has at least half of the energy
                continue
            energy = float(np.dot(a, a)) + float(np.dot(b, b))
            if energy > 2 * _FAINT * len(a) and energy + 2 * product < 2 * _CANCELLED * energy:
                mixed[start : start + self.n_section] = a - b
                self.n_opposite += len(a)
        mixed *= np.float32(0.5)
        self.n_samples += len(mixed)
        return mixed
