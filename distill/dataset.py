"""Items of training: a chunk of a clip, augmented according to its seed, with its target.

The epoch is part of the index, `dataset[(epoch, item)]`, so that it is correct with any number of loader workers, also
if they persist over epochs or read ahead into the next.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from audio.dataset import Pack, pad_batch
from audio.io import resample
from distill.batch import Batch
from distill.random_streams import Stream
from distill.sources import LabelTargets, TargetSource


class ReplayDataset(Dataset[dict[str, Any]]):
    """The items of a target source, read from its pack.

    Args:
        pack: the clips.
        source: items, seeds and targets.
        sample_rates: of the models' inputs, in hertz.
        labels: of the same items, to be added to the targets.
        clusters: (M,) the cluster of each item, to be added to the targets.
        consistent: replay the augmentation of the stored seed. False is the published `disable_consistency`: the
            waveform is not transformed, and the masks are drawn with `seed`.
        mixup: alpha of the Beta distribution that each clip's weight in mixup is drawn from, or None for no mixup.
        seed: of new masks and mixup weights, functions of (seed, epoch, item).
        fill_seconds: length to which shorter items are filled; None: not at all.
        fill_by: "silence", or "repeat": repetitions of the item.
        hash_sounds: add `sound_hash`, see `distill.sound_check`.
    """

    def __init__(
        self,
        pack: Pack,
        source: TargetSource,
        sample_rates: Sequence[int],
        *,
        labels: LabelTargets | None = None,
        clusters: np.ndarray | None = None,
        consistent: bool = True,
        mixup: float | None = None,
        seed: int = 0,
        fill_seconds: float | None = None,
        fill_by: Literal["silence", "repeat"] = "silence",
        hash_sounds: bool = False,
    ) -> None:
        self.pack, self.source, self.sample_rates, self.labels = pack, source, tuple(sample_rates), labels
        self.clusters = clusters
        self.consistent, self.mixup, self.seed = consistent, mixup, seed
        self.fill_seconds, self.fill_by = fill_seconds, fill_by
        self.hash_sounds = hash_sounds

    def __len__(self) -> int:
        return len(self.source.chunks)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return item `key[1]` in epoch `key[0]`; see `Batch` for the fields."""
        epoch, item = key
        clip, start, stop = self.source.chunks[item]
        n_reference = int(self.source.n_reference[item])
        replay = self.source.replay
        draw = replay.draw(self.source.seed(epoch, item), n_reference)
        value, min_value = draw.value, draw.min_value
        if not self.consistent:
            stream = np.random.default_rng([self.seed, Stream.FRESH_MASKS, epoch, item])
            value, min_value = stream.random(2, dtype=np.float32).tolist()
        weight = 1.0
        if self.mixup is not None:
            stream = np.random.default_rng([self.seed, Stream.MIXUP, epoch, item])
            weight = float(stream.beta(self.mixup, self.mixup))
        rate = self.pack.sample_rate
        waveform = np.empty(0, np.float32)
        if self.sample_rates:  # empty if no model needs waveforms
            waveform = self.pack.read(clip, start, stop)
            if self.consistent:
                waveform = replay.transform_waveform(waveform, draw, rate)
        fields = {
            "item": item,
            "epoch": epoch,
            "waveforms": {r: self._fit_length(resample(waveform, rate, r).copy(), r) for r in self.sample_rates},
            "value": value,
            "min_value": min_value,
            "n_reference": n_reference,
            "target": torch.from_numpy(self.source.target(epoch, item)),
            "mixup_weight": weight,
        }
        if self.labels is not None:
            fields["labels"] = torch.from_numpy(self.labels.target(epoch, item))
        if self.hash_sounds:
            fields["sound_hash"] = self.pack.hash_sound(clip, start, stop)
        if self.clusters is not None:
            fields["cluster"] = int(self.clusters[item])
        return fields

    def _fit_length(self, waveform: np.ndarray, rate: int) -> Tensor:
        wave = torch.from_numpy(waveform)
        if self.fill_seconds is None:
            return wave
        n_samples = round(self.fill_seconds * rate)  # resampling may round up to one more sample, which is cut
        if self.fill_by == "repeat" and len(wave):
            return wave.repeat(-(-n_samples // len(wave)))[:n_samples]
        return torch.nn.functional.pad(wave[:n_samples], (0, max(n_samples - len(wave), 0)))

    def name(self, item: int) -> str:
        """Return the name of the clip that `item` is a chunk of."""
        return self.pack.names[self.source.chunks.clip[item]]


def collate(items: list[dict[str, Any]]) -> Batch:
    """Join items of a `ReplayDataset` to a batch."""
    padded = {rate: pad_batch([item["waveforms"][rate] for item in items]) for rate in items[0]["waveforms"]}
    others: dict[str, Any] = {key: [item[key] for item in items] for key in items[0] if key != "waveforms"}
    return Batch(
        waveforms={rate: waveform for rate, (waveform, _) in padded.items()},
        lengths={rate: lengths for rate, (_, lengths) in padded.items()},
        **{k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in others.items()},  # type: ignore[arg-type]
    )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Infinite batches of (epoch, item), one pass after another.

    Pass p is a permutation of all items that is a function of (seed, p). With `weights`, items are drawn with
    replacement instead, in proportion to their weights. Batch number `step` is a function of (seed, step).

    Args:
        items: (M,) the items.
        batch_size: B; with `cut_passes` the last batch of a pass may be smaller, otherwise it continues with the
            next pass.
        seed: of the order.
        weights: (M,) relative frequencies, or None for permutations.
        cut_passes: end a batch where a pass ends.
        start: number of the first batch.
        split: size of a batch → positions of each part of it for this process, yielded one after the other; None: the
            whole batch.
    """

    def __init__(
        self,
        items: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        weights: np.ndarray | None = None,
        cut_passes: bool = True,
        start: int = 0,
        split: Callable[[int], Sequence[np.ndarray]] | None = None,
    ) -> None:
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.probabilities = None if weights is None else weights / weights.sum()
        self.cut_passes, self.start, self.split = cut_passes, start, split
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.start):
            batch = self.batch(step)
            for share in self.split(len(batch)) if self.split else [range(len(batch))]:
                yield [batch[position] for position in share]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return batch number `step`, from 0."""
        n_items = len(self.items)
        if self.cut_passes:
            passes, within = divmod(step, self.batches_per_pass)
            first = within * self.batch_size
            return [(passes + 1, item) for item in self._order(passes + 1)[first : first + self.batch_size].tolist()]
        places = (divmod(place, n_items) for place in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [(passes + 1, int(self._order(passes + 1)[within])) for passes, within in places]

    def size(self, step: int) -> int:
        """Return the number of items of batch number `step`."""
        if not self.cut_passes:
            return self.batch_size
        within = step % self.batches_per_pass
        return min(self.batch_size, len(self.items) - within * self.batch_size)

    @property
    def batches_per_pass(self) -> int:
        """Number of batches of one pass."""
        return -(-len(self.items) // self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            stream = np.random.default_rng([self.seed, epoch])
            if self.probabilities is None:
                order = stream.permutation(len(self.items))
            else:
                order = stream.choice(len(self.items), len(self.items), p=self.probabilities)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: self.items[order]}
        return self._orders[epoch]
