"""Cost and gain of token merging: the measurements of `scripts/sweep_token_merging.py`.

A point is one checkpoint with one setting of merging, evaluated on one pack; a row summarises the points of a group
with the same r.
"""

import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audio.dataset import ClipDataset, Pack
from common.errors import Faults, UserError, did_you_mean, some
from models import AudioTagger, load_model
from models.vit import SpectrogramTransformer
from scripts.benchmarks.timing import time_steps
from training.baseline import Metric, get_value
from training.evaluate import evaluate
from training.labelled import LabelledPack, open_labelled
from training.precision import Precision

logger = logging.getLogger(__name__)

Schedule = tuple[int, ...]  # tokens merged in each block


@dataclass(frozen=True)
class Point:
    """A checkpoint, its merging, and the pack that it is evaluated on.

    Attributes:
        group: of checkpoints.
        r: tokens merged in a block, the mean over blocks.
        schedule: tokens merged in each block, empty for a network without merging.
        source: the checkpoint, as `models.load_model` accepts it.
        test_data: TSV of the pack.
        network: everything that its speed depends on except the merging.
    """

    group: str
    r: float
    schedule: Schedule
    source: str
    test_data: str
    network: str


@dataclass
class Sweep:
    """All points to measure, checked.

    Attributes:
        points: in the order of their groups on the command line.
        metric: top-1 accuracy over all classes, or mAP over the classes that occur.
        data: the packs, by (TSV, labels).
    """

    points: list[Point] = field(default_factory=list)
    metric: Metric = "mAP"
    data: dict[tuple[str, tuple[str, ...]], LabelledPack | None] = field(default_factory=dict)

    def pack(self, point: Point, model: AudioTagger) -> LabelledPack:
        """Return the pack of a point with the given model."""
        data = self.data[point.test_data, tuple(model.labels)]
        assert data is not None
        return data


@dataclass(frozen=True)
class Spread:
    """A mean and a sample standard deviation, which is None for a single value."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return mean and deviation of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, form: str) -> str:
        """Format the mean, with its deviation where there is one: "91.2 ± 0.4"."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{round(self.mean, 1) + 0.0:{form}}{deviation}"  # adding 0.0 turns -0.0 into 0.0


@dataclass(frozen=True)
class Row:
    """The results of a group at one r.

    Attributes:
        group: of checkpoints.
        r: tokens merged in a block.
        n_checkpoints: that were evaluated.
        value: accuracy or mAP in percent. With several packs: the mean over them, and the deviation of checkpoints on
            one pack, or of packs if there is one checkpoint for each.
        drop: difference to r = 0, in points, negative for a loss; None if the group has no r = 0.
        clips_per_second: of the network, one value for each pass.
        network: as in `Point`.
    """

    group: str
    r: float
    n_checkpoints: int
    value: Spread
    drop: Spread | None
    clips_per_second: tuple[float, ...]
    network: str


def plan_sweep(
    groups: Mapping[str, Sequence[str]],
    inference_groups: Sequence[str],
    rs: Sequence[int],
    packs: Sequence[str],
    metric: str,
    options: Sequence[str],
) -> Sweep:
    """Load and check everything that will be measured, before any measurement.

    Args:
        groups: name → checkpoints.
        inference_groups: groups whose checkpoints are evaluated at every one of `rs`; those of the others are evaluated
            at the r that they were trained with.
        rs: tokens merged in a block.
        packs: TSVs; several are assigned to the checkpoints of each r in turn.
        metric: "accuracy", "mAP", or "auto": accuracy if the classes of all models exclude each other.
        options: names of other options, to be suggested for a group that does not exist.

    Raises:
        UserError: with every fault.
    """
    faults = Faults("the sweep")
    sweep = Sweep()
    activations: set[str] = set()
    networks: defaultdict[tuple[str, float], set[tuple[str, Schedule]]] = defaultdict(set)
    for group, sources in groups.items():
        counts: Counter[float] = Counter()  # checkpoints at each r
        for source in sources:
            try:
                model = load_model(source)
            except UserError as error:
                faults.add(f"--{group}{did_you_mean(group, options)}: {error}")
                continue
            activations.add(model.activation)
            network = _describe_network(model)
            for r, schedule in _list_settings(model, rs if group in inference_groups else None, group, source, faults):
                pack = packs[counts[r] % len(packs)]
                counts[r] += 1
                sweep.points.append(Point(group, r, schedule, source, pack, network))
                networks[group, r].add((network, schedule))
                if (pack, tuple(model.labels)) not in sweep.data:
                    sweep.data[pack, tuple(model.labels)] = open_labelled(pack, model.labels, faults)
        uneven = [f"{n} at r = {r:g}" for r, n in counts.items() if n % len(packs)]
        if uneven:
            faults.add(
                f"--{group}: {len(packs)} packs are assigned to the checkpoints of each r in turn; expected "
                f"{len(packs)} checkpoints, or a multiple of it, found {some(uneven)}"
            )
    for (group, r), kinds in networks.items():
        if len(kinds) > 1:
            faults.add(
                f"--{group}: the checkpoints at r = {r:g} are {len(kinds)} different networks or schedules, which "
                "cannot be averaged; give each kind a group of its own"
            )
    sweep.metric = _choose_metric(metric, activations, [data for data in sweep.data.values() if data], faults)
    faults.raise_if_any()
    return sweep


def _list_settings(
    model: AudioTagger, rs: Sequence[int] | None, group: str, source: str, faults: Faults
) -> list[tuple[float, Schedule]]:
    """Return r and schedule of every point of a model: for each of `rs`, or as it was trained."""
    if isinstance(model, SpectrogramTransformer):
        if rs is None:
            return [(statistics.fmean(model.merged_tokens), tuple(model.merged_tokens))]
        return [(float(r), (r,) * len(model.blocks)) for r in rs]
    if rs is None:
        return [(0.0, ())]
    faults.add(
        f"--{group}: {source} is a {model.name}, which has no tokens to merge; use vision transformers (ced_*, ast_*), "
        "or a group of another name, whose checkpoints are evaluated as they are"
    )
    return []


def _describe_network(model: AudioTagger) -> str:
    shape = {key: value for key, value in model.arguments.items() if not key.startswith("token_merging")}
    attention = "" if getattr(model, "proportional_attention", True) else " plain attention"
    return f"{model.name} {sorted(shape.items())} {model.num_classes}{attention}"


def _choose_metric(metric: str, activations: set[str], packs: list[LabelledPack], faults: Faults) -> Metric:
    if metric == "mAP" or (metric == "auto" and "softmax" not in activations):
        return "mAP"
    if metric == "auto" and len(activations) > 1:
        faults.add("some models have exclusive classes (softmax), some do not: add --metric accuracy or --metric mAP")
    elif metric not in ("auto", "accuracy"):
        faults.add(f"--metric is {metric!r}; use accuracy, mAP or auto")
    for data in packs:
        n_others = sum(len(labels) != 1 for labels in data.labels)
        if n_others:
            faults.add(
                f"{data.pack.manifest}: {n_others} of its {len(data.pack)} clips have no label, or several; accuracy "
                "requires one for each: use --metric mAP"
            )
    return "accuracy"


def _set_schedule(model: AudioTagger, schedule: Schedule) -> None:
    if isinstance(model, SpectrogramTransformer):
        model.merge_tokens({"r": schedule, "proportional": model.proportional_attention})


def evaluate_points(sweep: Sweep, *, batch_size: int, num_workers: int, precision: Precision) -> list[float]:
    """Return the accuracy or mAP of every point, in percent."""
    values: list[float] = []
    model, loaded = None, None
    for number, point in enumerate(sweep.points, 1):
        if model is None or loaded != point.source:
            model, loaded = load_model(point.source, device=precision.device), point.source
        _set_schedule(model, point.schedule)
        data = sweep.pack(point, model)
        metrics = evaluate(model, data, batch_size=batch_size, num_workers=num_workers, precision=precision)
        values.append(100 * get_value(metrics, sweep.metric))
        setting = f"{number} of {len(sweep.points)}: {point.group}, r = {point.r:g}, {point.source}"
        logger.info("%s: %s %.2f %%", setting, sweep.metric, values[-1])
    return values


@torch.inference_mode()
def measure_speeds(
    sweep: Sweep, *, batch_size: int, rounds: int, precision: Precision
) -> dict[tuple[str, Schedule], list[float]]:
    """Time every network with every schedule, in alternation: clips/s, one value for each pass.

    A pass is the network alone, on a batch of spectrograms of the clips of median length, cut to the shortest of them.
    Checkpoints of one network share their values, since its speed does not depend on its weights.

    Args:
        sweep: the points.
        batch_size: clips of a pass.
        rounds: passes of each.
        precision: mode and device.
    """
    loaded: dict[str, tuple[AudioTagger, torch.Tensor]] = {}
    for point in sweep.points:
        if point.network not in loaded:
            model = load_model(point.source, device=precision.device)
            waveforms = make_batch(sweep.pack(point, model).pack, model.sample_rate, batch_size)
            loaded[point.network] = model, model.front_end(waveforms.to(precision.device))

    def run_forward(network: str, schedule: Schedule) -> None:
        model, mel = loaded[network]
        _set_schedule(model, schedule)
        with precision.context():
            model.forward_spectrogram(mel)

    settings = list(dict.fromkeys((point.network, point.schedule) for point in sweep.points))
    candidates = {str(number): lambda _, pair=pair: run_forward(*pair) for number, pair in enumerate(settings)}
    seconds = time_steps(candidates, {}, rounds, 1, precision.device)
    return {pair: [batch_size / t for t in seconds[str(number)]] for number, pair in enumerate(settings)}


def make_batch(pack: Pack, sample_rate: int, batch_size: int) -> torch.Tensor:
    """Return waveforms (B,S) of the clips of median length, cut to the shortest; repeated if there are too few."""
    order = np.argsort(pack.n_samples, kind="stable")
    first = max(len(order) - batch_size, 0) // 2
    rows = np.resize(order[first : first + batch_size], batch_size)
    clips = ClipDataset(pack, [sample_rate])
    waveforms = [clips[int(row)]["waveforms"][sample_rate] for row in rows]
    return torch.stack([waveform[: min(map(len, waveforms))] for waveform in waveforms])


def summarise_points(
    sweep: Sweep,
    values: Sequence[float],
    speeds: Mapping[tuple[str, Schedule], Sequence[float]],
    n_packs: int,
) -> list[Row]:
    """Summarise the points of each group and r.

    Args:
        sweep: the points.
        values: accuracy or mAP of each, in percent.
        speeds: clips/s of each network with each schedule, one value for each pass.
        n_packs: number of test packs.
    """
    members: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
    for index, point in enumerate(sweep.points):
        members[point.group, point.r].append(index)
    groups = list(dict.fromkeys(point.group for point in sweep.points))
    rows = []
    for group, r in sorted(members, key=lambda key: (groups.index(key[0]), key[1])):
        merged, first = [values[index] for index in members[group, r]], sweep.points[members[group, r][0]]
        plain = [values[index] for index in members.get((group, 0.0), [])]
        drop = None
        if len(plain) == len(merged):  # each checkpoint minus the one at the same place among those of r = 0
            drop = _average_packs([value - base for value, base in zip(merged, plain, strict=True)], n_packs)
        elif plain:
            drop = Spread(statistics.fmean(merged) - statistics.fmean(plain), None)
        speed = tuple(speeds[first.network, first.schedule])
        rows.append(Row(group, r, len(merged), _average_packs(merged, n_packs), drop, speed, first.network))
    return rows


def _average_packs(values: Sequence[float], n_packs: int) -> Spread:
    """Average over the packs of each checkpoint first; with one checkpoint for each pack, the deviation is of packs."""
    if len(values) > n_packs > 1:
        return Spread.of(np.reshape(values, (-1, n_packs)).mean(1).tolist())
    return Spread.of(values)
