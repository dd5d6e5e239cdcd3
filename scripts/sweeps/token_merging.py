"""What merging tokens costs and gains: the measurements of `scripts/sweep_token_merging.py`.

A point is one checkpoint that merges so many tokens, judged on one pack; a row is what the points of a group with the
same r have in common.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from audio.dataset import ClipDataset, Pack
from common.errors import Faults, UserError, did_you_mean, some
from models import AudioTagger, load_model
from models.vit import SpectrogramTransformer
from scripts.benchmarks.timing import time_steps
from training.evaluate import evaluate
from training.labelled import LabelledPack, open_labelled
from training.precision import Precision

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "mAP"]


@dataclass(frozen=True)
class Point:
    """A checkpoint, what it merges, and what it is judged on.

    Attributes:
        group: its name.
        r: tokens merged away in a block, the mean over blocks.
        schedule: tokens merged away in each block, empty for a network that merges none.
        source: the checkpoint, as `models.load_model` takes it.
        test_data: TSV of the pack.
        network: all that its speed depends on beside the merging.
    """

    group: str
    r: float
    schedule: tuple[int, ...]
    source: str
    test_data: str
    network: str


@dataclass
class Sweep:
    """All points to measure, checked.

    Attributes:
        points: in the order in which their groups were given.
        metric: what they are judged by: top-1 accuracy over all classes, or mAP over those that occur.
        data: the packs, by (TSV, labels).
    """

    points: list[Point] = field(default_factory=list)
    metric: Metric = "mAP"
    data: dict[tuple[str, tuple[str, ...]], LabelledPack | None] = field(default_factory=dict)

    def pack(self, point: Point, model: AudioTagger) -> LabelledPack:
        """Return the pack of a point, whose model is given."""
        data = self.data[point.test_data, tuple(model.labels)]
        assert data is not None
        return data


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation of a sample; None of a single value."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """What a group is worth at one r.

    Attributes:
        group: its name.
        r: tokens merged away in a block.
        n_checkpoints: how many were judged.
        value: accuracy or mAP in percent; of several packs the mean over them, the spread that of the checkpoints for
            one pack, or of the packs where there is one checkpoint for each.
        drop: against r = 0, in points, negative where something is lost; None where the group has no r = 0.
        clips_per_second: of the network, one number for each pass.
        network: as in `Point`.
    """

    group: str
    r: float
    n_checkpoints: int
    value: Spread
    drop: Spread | None
    clips_per_second: tuple[float, ...]
    network: str


def plan(
    groups: Mapping[str, Sequence[str]],
    over_all: Sequence[str],
    rs: Sequence[int],
    packs: Sequence[str],
    metric: str,
    options: Sequence[str],
) -> Sweep:
    """Check everything that will be measured, before hours go into it.

    Args:
        groups: name → checkpoints.
        over_all: the groups whose checkpoints are judged at every one of `rs`; those of the others are judged at the r
            that they say themselves.
        rs: tokens merged away in a block.
        packs: TSVs; several go with the checkpoints of each r in turn.
        metric: "accuracy", "mAP", or "auto": accuracy where all models give exactly one class.
        options: what else the command line knows, to be suggested in place of a group that is none.

    Raises:
        UserError: all that is wrong.
    """
    faults = Faults("the sweep")
    sweep = Sweep()
    activations: set[str] = set()
    for group, sources in groups.items():
        met: dict[float, int] = {}  # checkpoints so far at each r
        for source in sources:
            try:
                model = load_model(source)
            except UserError as error:
                faults.add(f"--{group}{did_you_mean(group, options)}: {error}")
                continue
            activations.add(model.activation)
            for r, schedule in _settings(model, rs if group in over_all else None, f"--{group}: {source}", faults):
                number = met[r] = met.get(r, 0) + 1
                pack = packs[(number - 1) % len(packs)]
                sweep.points.append(Point(group, r, schedule, source, pack, _network(model)))
                if (pack, tuple(model.labels)) not in sweep.data:
                    sweep.data[pack, tuple(model.labels)] = open_labelled(pack, model.labels, faults)
        uneven = [f"{n} at r = {r:g}" for r, n in met.items() if n % len(packs)]
        if uneven:
            faults.add(
                f"--{group}: {len(packs)} packs go with the checkpoints of each r in turn, so these must be "
                f"{len(packs)}, or a multiple of it; there are {some(uneven)}"
            )
    kinds: dict[tuple[str, float], set[tuple[str, tuple[int, ...]]]] = {}
    for point in sweep.points:
        kinds.setdefault((point.group, point.r), set()).add((point.network, point.schedule))
    for (group, r), kind in kinds.items():
        if len(kind) > 1:
            faults.add(
                f"--{group}: the checkpoints at r = {r:g} are {len(kind)} different networks or schedules, of which no "
                "mean can be taken; give each kind a group of its own"
            )
    sweep.metric = _metric(metric, activations, [data for data in sweep.data.values() if data], faults)
    faults.raise_if_any()
    return sweep


def _settings(
    model: AudioTagger, rs: Sequence[int] | None, who: str, faults: Faults
) -> list[tuple[float, tuple[int, ...]]]:
    """Return r and the schedule of every point of a model: at each of `rs`, or as the model is."""
    if isinstance(model, SpectrogramTransformer):
        if rs is None:
            return [(statistics.fmean(model.merged_tokens), tuple(model.merged_tokens))]
        return [(float(r), (r,) * len(model.blocks)) for r in rs]
    if rs is None:
        return [(0.0, ())]
    faults.add(
        f"{who} is a {model.name}, which has no tokens to merge; give vision transformers (ced_*, ast_*), or put it "
        "into a group of another name, which is judged as it is"
    )
    return []


def _network(model: AudioTagger) -> str:
    shape = {key: value for key, value in model.arguments.items() if not key.startswith("token_merging")}
    attention = "" if getattr(model, "proportional_attention", True) else " plain attention"
    return f"{model.name} {sorted(shape.items())} {model.num_classes}{attention}"


def _metric(wanted: str, activations: set[str], packs: list[LabelledPack], faults: Faults) -> Metric:
    if wanted == "mAP" or (wanted == "auto" and "softmax" not in activations):
        return "mAP"
    if wanted == "auto" and len(activations) > 1:
        faults.add("some models give exactly one class and some any number: say --metric accuracy or --metric mAP")
    elif wanted not in ("auto", "accuracy"):
        faults.add(f"--metric is {wanted!r}; use accuracy, mAP or auto")
    for data in packs:
        n_others = sum(len(labels) != 1 for labels in data.labels)
        if n_others:
            faults.add(
                f"{data.pack.manifest}: {n_others} of its {len(data.pack)} clips have no label, or several, and "
                "accuracy wants one for each; give --metric mAP"
            )
    return "accuracy"


def judge(sweep: Sweep, *, batch_size: int, num_workers: int, precision: Precision) -> list[float]:
    """Return the accuracy or mAP of every point, in percent."""
    values: list[float] = []
    model, loaded = None, None
    for number, point in enumerate(sweep.points, 1):
        if model is None or loaded != point.source:
            model, loaded = load_model(point.source, device=precision.device), point.source
        if isinstance(model, SpectrogramTransformer):
            model.merge_tokens({"r": point.schedule, "proportional": model.proportional_attention})
        data = sweep.pack(point, model)
        metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
        value = metrics.top1 if sweep.metric == "accuracy" else metrics.mAP
        assert value is not None
        values.append(100 * value)
        where = f"{number} of {len(sweep.points)}: {point.group}, r = {point.r:g}, {point.source}"
        logger.info("%s: %s %.2f %%", where, sweep.metric, values[-1])
    return values


@torch.inference_mode()
def clock(
    sweep: Sweep, *, batch_size: int, rounds: int, precision: Precision
) -> dict[tuple[str, tuple[int, ...]], list[float]]:
    """Time every network with every setting of merging: clips/s, one number for each pass.

    A pass is the network alone, on a batch of spectrograms of the clips in the middle when sorted by length, cut to
    the shortest of them. All settings of all networks take turns. Checkpoints of one network share their figures: how
    long it takes does not depend on its weights.

    Args:
        sweep: says which.
        batch_size: clips of a pass.
        rounds: passes of each.
        precision: mode and device.
    """
    loaded: dict[str, tuple[AudioTagger, torch.Tensor]] = {}
    for point in sweep.points:
        if point.network not in loaded:
            model = load_model(point.source, device=precision.device)
            sounds = batch_of(sweep.pack(point, model).pack, model.sample_rate, batch_size)
            loaded[point.network] = model, model.front_end(sounds.to(precision.device))

    def passing(network: str, schedule: tuple[int, ...]) -> None:
        model, mel = loaded[network]
        if isinstance(model, SpectrogramTransformer):
            model.merge_tokens({"r": schedule, "proportional": model.proportional_attention})
        with precision.context():
            model.forward_spectrogram(mel)

    which = list(dict.fromkeys((point.network, point.schedule) for point in sweep.points))
    contenders = {str(number): lambda _, pair=pair: passing(*pair) for number, pair in enumerate(which)}
    seconds = time_steps(contenders, {}, rounds, 1, precision.device)
    return {pair: [batch_size / t for t in seconds[str(number)]] for number, pair in enumerate(which)}


def batch_of(pack: Pack, sample_rate: int, batch_size: int) -> torch.Tensor:
    """Return waveforms (B,S) of the clips in the middle by length, cut to the shortest; over again where too few."""
    order = np.argsort(pack.n_samples, kind="stable")
    first = max(len(order) - batch_size, 0) // 2
    rows = np.resize(order[first : first + batch_size], batch_size)
    clips = ClipDataset(pack, [sample_rate])
    waveforms = [clips[int(row)]["waveforms"][sample_rate] for row in rows]
    return torch.stack([waveform[: min(map(len, waveforms))] for waveform in waveforms])


def rows_of(
    sweep: Sweep,
    values: Sequence[float],
    speeds: Mapping[tuple[str, tuple[int, ...]], Sequence[float]],
    n_packs: int,
) -> list[Row]:
    """Bring the points together by group and r.

    Args:
        sweep: the points.
        values: accuracy or mAP of each, in percent.
        speeds: clips/s of each network with each schedule, one number for each pass.
        n_packs: how many test packs there are.
    """
    found: dict[tuple[str, float], list[int]] = {}
    for index, point in enumerate(sweep.points):
        found.setdefault((point.group, point.r), []).append(index)
    groups = list(dict.fromkeys(point.group for point in sweep.points))
    rows = []
    for group, r in sorted(found, key=lambda key: (groups.index(key[0]), key[1])):
        members = found[group, r]
        own, first = [values[index] for index in members], sweep.points[members[0]]
        plain = [values[index] for index in found.get((group, 0.0), [])]
        drop = None
        if len(plain) == len(own):  # each checkpoint against the one at the same place among those of r = 0
            drop = _over_packs([value - base for value, base in zip(own, plain, strict=True)], n_packs)
        elif plain:
            drop = Spread(statistics.fmean(own) - statistics.fmean(plain), None)
        speed = tuple(speeds[first.network, first.schedule])
        rows.append(Row(group, r, len(own), _over_packs(own, n_packs), drop, speed, first.network))
    return rows


def _over_packs(values: Sequence[float], n_packs: int) -> Spread:
    """Spread of the checkpoints, each a mean over its packs; of the packs where there is one checkpoint for each."""
    if len(values) > n_packs > 1:
        return Spread.of(np.reshape(values, (-1, n_packs)).mean(1).tolist())
    return Spread.of(values)
