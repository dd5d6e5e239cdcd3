"""Why a run may learn nothing: what stands out in its settings and data, most telling first."""

from typing import TYPE_CHECKING

import numpy as np

from distill.mask_check import masked_shares
from distill.replay import REFERENCE_RATE
from distill.sources import LabelTargets
from training.averaging import find_trained_norms
from training.student import starts_at_random

if TYPE_CHECKING:
    from training.loop import Run

LOOKED_AT = 32  # items whose sound is looked at
MUCH_MASKED = 0.15  # of the frames, on average
LONG_WARMUP = 0.3  # of the run
FEW_STEPS, FEW_CLIPS_A_CLASS, FEW_TOKENS, SMALL_SET = 300, 20, 16, 2000
LARGE_NETWORK, PARAMETERS_A_CLIP = 3e6, 3000  # that starts from random weights
HIGH_RATE = {"Adam": 5e-3, "Adam8bit": 5e-3, "AdamW": 5e-3, "SGD": 1.0}
LOW_RATE = {"Adam": 1e-5, "Adam8bit": 1e-5, "AdamW": 1e-5, "SGD": 1e-4}
LAGGING = 0.1  # of the batch-norm statistics, still those of the start


def find_likely_causes(run: "Run", constant: bool) -> list[str]:
    """Return the likely causes as sentences; the settings that matter most come last, whether they stand out or not.

    Args:
        run: under way.
        constant: whether the loss, too, is that of constant answers; otherwise only its validation is bad.
    """
    found = [] if constant else _of_validation(run)
    found += [*_of_data(run), *_of_rate_and_length(run), *_of_augmentation(run), *_of_network(run)]
    return [*found, _settings(run)]


def _of_data(run: "Run") -> list[str]:
    data, found = run.data, []
    looked_at = data.items[np.unique(np.linspace(0, len(data.items) - 1, LOOKED_AT).astype(int))]
    sounds = [data.pack.read(*data.source.chunks[item]) for item in looked_at]
    if all(float(np.ptp(sound)) == 0 if len(sound) else True for sound in sounds):
        found.append(f"sounds: {len(sounds)} clips were looked at, and all are silent; look at how they were packed")
    elif len(sounds) > 1 and all(np.array_equal(sounds[0], sound) for sound in sounds[1:]):
        found.append(f"sounds: {len(sounds)} clips were looked at, and all are the same sound")
    labels = data.item_labels or data.source
    if isinstance(labels, LabelTargets):
        rows = [labels.labels[labels.chunks.clip[item]] for item in data.items]
        if len({tuple(sorted(row.tolist())) for row in rows}) == 1:
            found.append(f"labels: all {len(rows)} clips have the same ones, so there is nothing to tell apart")
        counts = np.bincount(np.concatenate(rows), minlength=labels.num_classes)
        if np.median(counts) < FEW_CLIPS_A_CLASS:
            found.append(
                f"few clips: {len(rows)} for {labels.num_classes} classes, {np.median(counts):g} a class in the median "
                f"and {counts.min()} of the rarest; start from trained weights (trainconfig/own_finetune.yaml)"
            )
    return found


def _of_rate_and_length(run: "Run") -> list[str]:
    config, found = run.config, []
    rates = [group["lr"] for group in run.trainer.optimizer.param_groups]
    rate, now = float(config.optimizer_args.get("lr", max(rates))), max(rates)
    if rate == 0:
        found.append("learning rate: it is 0, so no weight changes; set optimizer_args.lr")
    elif rate > HIGH_RATE[config.optimizer]:
        found.append(f"learning rate: {rate:g} is high for {config.optimizer}; try a tenth")
    elif rate < LOW_RATE[config.optimizer]:
        found.append(f"learning rate: {rate:g} is low for {config.optimizer}; try ten times as much")
    if run.warmup > LONG_WARMUP * run.total_steps:
        found.append(
            f"warm-up: it takes {run.warmup} of {run.total_steps} steps, and the learning rate is {now:.1e} so far; "
            "set a smaller warmup_iters or warmup_epochs"
        )
    if run.total_steps < FEW_STEPS:
        found.append(
            f"few steps: {run.total_steps} in all, of {config.batch_size} of {len(run.data.items)} clips each; give "
            "more epochs, or a smaller batch_size"
        )
    return found


def _of_augmentation(run: "Run") -> list[str]:
    config, found = run.config, []
    shares = masked_shares(run.data.source.replay, run.data.source.n_reference[run.data.items])
    if shares.mean > MUCH_MASKED:
        store = config.logitspath or config.embeddingspath
        where = f"save the targets of {store} again with" if store else "give"
        found.append(
            f"masks: TimeMasking hides {shares.mean:.0%} of a clip's frames on average, up to "
            f"{shares.largest.max():.0%}; {where} max_share: 0.2 among its arguments, or a smaller time_mask_param"
        )
    if config.mixup is not None and len(run.data.items) < SMALL_SET:
        found.append(
            f"mixup: with {config.mixup:g} every clip is mixed with another one, which small sets such as these "
            f"{len(run.data.items)} clips may not need; set mixup: null"
        )
    if config.label_smoothing >= 0.3:
        found.append(f"label smoothing: {config.label_smoothing:g} leaves little of the labels; try 0.1")
    return found


def _of_network(run: "Run") -> list[str]:
    config, model, found = run.config, run.model, []
    n_parameters, n_items = sum(p.numel() for p in model.parameters()), len(run.data.items)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = float(np.median(run.data.source.n_reference[run.data.items])) / REFERENCE_RATE
    tokens = _n_tokens(run, seconds)
    if tokens is not None and tokens < FEW_TOKENS:
        found.append(
            f"patches: a clip of {seconds:.2f} s (the median) is {tokens} tokens of {config.model}; smaller "
            "model_args.patch_stride, or hop_size, gives more"
        )
    if n_trained < n_parameters / 2:
        found.append(f"frozen: only {n_trained / n_parameters:.0%} of the parameters are trained; see freeze")
    at_random = starts_at_random(config.model, config.pretrained)
    if at_random and n_parameters > max(LARGE_NETWORK, PARAMETERS_A_CLIP * n_items):
        found.append(
            f"large network: {n_parameters / 1e6:.1f} M parameters from random weights, and {n_items} clips; give "
            "pretrained weights, or a smaller model"
        )
    return found


def _n_tokens(run: "Run", seconds: float) -> int | None:
    """Return the patches of a clip of so many seconds; None for networks without patches."""
    stride = getattr(run.model, "patch_stride", None)
    if stride is None:
        return None
    size = getattr(run.model, "patch_size", stride)
    n_rows = (run.model.front_end.n_mels - size) // stride + 1
    return n_rows * run.model.n_steps(max(1, round(seconds * run.model.sample_rate)))


def _of_validation(run: "Run") -> list[str]:
    """Causes of a bad validation beside a loss that falls."""
    found = []
    momenta = [norm.momentum for norm in find_trained_norms(run.model) if norm.momentum]
    at_random = starts_at_random(run.config.model, run.config.pretrained)
    lagging = (1 - min(momenta)) ** run.step if momenta and at_random else 0.0
    if lagging > LAGGING:
        found.append(
            f"batch norm: with a momentum of {min(momenta):g}, {lagging:.0%} of the statistics that validation uses "
            f"are still those of the start after {run.step} steps, so that it may see less than was learnt; at the end "
            "they are recomputed. Give more steps" + ("" if run.config.init_from_data else ", or init_from_data: true")
        )
    found.append(
        "validation clips: are their labels in the same order as their sounds, and do they come from the same kind of "
        f"recordings as the training clips? Few clips ({len(run.data.items)}) can also be learnt by heart"
    )
    return found


def _settings(run: "Run") -> str:
    config = run.config
    parts = [f"learning rate {config.optimizer_args.get('lr', 'by default')}", f"warm-up {run.warmup} steps"]
    parts += [f"{run.total_steps} steps of {config.batch_size} clips", f"mixup {config.mixup or 'none'}"]
    return f"otherwise: look at {', '.join(parts)}, and whether the labels belong to the clips"
