"""Items of training: a chunk of a clip, augmented as its seed says, with its target.

The epoch travels with the index, `dataset[(epoch, item)]`, so that it is right with any number of loader workers, also
with workers that outlive an epoch or read ahead into the next.
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
        sample_rates: the rates that the models to be fed want, in hertz.
        labels: of the same items, which then come beside the targets.
        clusters: (M,) the cluster of each item, which then comes beside the targets.
        consistent: replay the augmentation that the stored seed says. False is the published `disable_consistency`: the
            waveform stays as it is, without any transform of the store, and the masks are drawn anew.
        mixup: alpha of the Beta distribution that each clip's weight in mixup is drawn from, or None for no mixup.
        seed: of the masks drawn anew and the mixup weights, pure functions of (seed, epoch, item).
        fill_seconds: shorter items are brought to this length; None leaves them as they are.
        fill_by: "silence", or "repeat": the item itself, over and over.
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
        """Return item `key[1]` as epoch `key[0]` shows it; see `Batch` for the fields."""
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
        if self.sample_rates:  # else nobody listens
            waveform = self.pack.read(clip, start, stop)
            if self.consistent:
                waveform = replay.transform_waveform(waveform, draw, rate)
        shown = {
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
            shown["labels"] = torch.from_numpy(self.labels.target(epoch, item))
        if self.hash_sounds:
            shown["sound_hash"] = self.pack.hash_sound(clip, start, stop)
        if self.clusters is not None:
            shown["cluster"] = int(self.clusters[item])
        return shown

    def _fit_length(self, waveform: np.ndarray, rate: int) -> Tensor:
        wave = torch.from_numpy(waveform)
        if self.fill_seconds is None:
            return wave
        wanted = round(self.fill_seconds * rate)  # what resampling rounds otherwise, by a sample, is cut
        if self.fill_by == "repeat" and len(wave):
            return wave.repeat(-(-wanted // len(wave)))[:wanted]
        return torch.nn.functional.pad(wave[:wanted], (0, max(wanted - len(wave), 0)))

    def name(self, item: int) -> str:
        """Return the name of the clip that `item` is a chunk of."""
        return self.pack.names[self.source.chunks.clip[item]]


def collate(items: list[dict[str, Any]]) -> Batch:
    """Put items of a `ReplayDataset` together."""
    padded = {rate: pad_batch([item["waveforms"][rate] for item in items]) for rate in items[0]["waveforms"]}
    others: dict[str, Any] = {key: [item[key] for item in items] for key in items[0] if key != "waveforms"}
    return Batch(
        waveforms={rate: waveform for rate, (waveform, _) in padded.items()},
        lengths={rate: lengths for rate, (_, lengths) in padded.items()},
        **{k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in others.items()},  # type: ignore[arg-type]
    )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, item) over one pass after another, without end.

    Pass p is a permutation that is a pure function of (seed, p): every item once. With `weights`, items are drawn with
    replacement instead, each as often as its weight says. So is batch number `step`: a run that goes on asks for the
    batches from there.

    Args:
        items: (M,) the items to show.
        batch_size: B; with `cut_passes` the last batch of a pass may be smaller, otherwise batches run on into the
            next pass.
        seed: of the order.
        weights: (M,) relative frequencies, or None for permutations.
        cut_passes: end a batch where a pass ends.
        start: the batch to begin with.
        split: size of a batch → the positions of each part of it that is wanted here, given one after the other; the
            whole batch where None.
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
            passes, within = divmod(step, self.batches_a_pass)
            first = within * self.batch_size
            return [(passes + 1, item) for item in self._order(passes + 1)[first : first + self.batch_size].tolist()]
        places = (divmod(place, n_items) for place in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [(passes + 1, int(self._order(passes + 1)[within])) for passes, within in places]

    def size(self, step: int) -> int:
        """Return how many items batch number `step` has."""
        if not self.cut_passes:
            return self.batch_size
        within = step % self.batches_a_pass
        return min(self.batch_size, len(self.items) - within * self.batch_size)

    @property
    def batches_a_pass(self) -> int:
        """How many batches show every item once."""
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
