"""Likely causes of a run that learns nothing, from its settings and data, the most likely first."""

from typing import TYPE_CHECKING

import numpy as np

from distill.mask_check import compute_masked_shares
from distill.replay import REFERENCE_RATE
from distill.sources import LabelTargets
from training.averaging import find_trained_norms
from training.student import starts_at_random

if TYPE_CHECKING:
    from training.loop import Run

N_CHECKED = 32  # items whose sound is read
MUCH_MASKED = 0.15  # of the frames, on average
LONG_WARMUP = 0.3  # of the run
FEW_SOUNDS = 500  # without labels
FEW_STEPS, FEW_CLIPS_A_CLASS, FEW_TOKENS, SMALL_SET = 300, 20, 16, 2000
LARGE_NETWORK, PARAMETERS_A_CLIP = 3e6, 3000  # for networks that start from random weights
HIGH_RATE = {"Adam": 5e-3, "Adam8bit": 5e-3, "AdamW": 5e-3, "SGD": 1.0}
LOW_RATE = {"Adam": 1e-5, "Adam8bit": 1e-5, "AdamW": 1e-5, "SGD": 1e-4}
LAGGING = 0.1  # weight of the initial values in batch-norm statistics


def find_likely_causes(run: "Run", constant: bool) -> list[str]:
    """Return the likely causes as sentences; the last one lists the most important settings.

    Args:
        run: the run.
        constant: whether the loss is that of a constant output; otherwise only the validation is at chance level.
    """
    config = run.config
    causes = [] if constant else _check_validation(run)
    causes += [*_check_data(run), *_check_schedule(run), *_check_augmentation(run), *_check_network(run)]
    settings = [f"learning rate {config.optimizer_args.get('lr', 'by default')}", f"warm-up {run.warmup} steps"]
    settings += [f"{run.total_steps} steps of {config.batch_size} clips", f"mixup {config.mixup or 'none'}"]
    return [*causes, f"otherwise: check {', '.join(settings)}, and that the labels belong to the clips"]


def check_sounds(run: "Run") -> list[str]:
    """Return what is wrong with the sounds themselves, from some of them; few sounds matter in pre-training."""
    data, causes = run.data, []
    checked = data.items[np.unique(np.linspace(0, len(data.items) - 1, N_CHECKED).astype(int))]
    sounds = [data.pack.read(*data.source.chunks[item]) for item in checked]
    if all(float(np.ptp(sound)) == 0 if len(sound) else True for sound in sounds):
        causes.append(f"sounds: the {len(sounds)} clips that were checked are silent; check how they were packed")
    elif len(sounds) > 1 and all(np.array_equal(sounds[0], sound) for sound in sounds[1:]):
        causes.append(f"sounds: the {len(sounds)} clips that were checked are all the same sound")
    if run.needs.targets == "none" and len(data.items) < FEW_SOUNDS:
        causes.append(
            f"few sounds: {len(data.items)} chunks of at most {data.chunk_seconds:g} s; learning without labels needs "
            "thousands"
        )
    return causes


def _check_data(run: "Run") -> list[str]:
    data, causes = run.data, check_sounds(run)
    labels = data.item_labels or data.source
    if isinstance(labels, LabelTargets):
        rows = [labels.labels[labels.chunks.clip[item]] for item in data.items]
        if len({tuple(sorted(row.tolist())) for row in rows}) == 1:
            causes.append(f"labels: all {len(rows)} clips have the same labels")
        counts = np.bincount(np.concatenate(rows), minlength=labels.num_classes)
        if np.median(counts) < FEW_CLIPS_A_CLASS:
            causes.append(
                f"few clips: {len(rows)} for {labels.num_classes} classes, a median of {np.median(counts):g} a class "
                f"and {counts.min()} of the rarest; start from trained weights (trainconfig/own_finetune.yaml)"
            )
    return causes


def _check_schedule(run: "Run") -> list[str]:
    config, causes = run.config, []
    rates = [group["lr"] for group in run.trainer.optimizer.param_groups]
    rate, now = float(config.optimizer_args.get("lr", max(rates))), max(rates)
    if rate == 0:
        causes.append("learning rate: it is 0, so the weights do not change; set optimizer_args.lr")
    elif rate > HIGH_RATE[config.optimizer]:
        causes.append(f"learning rate: {rate:g} is high for {config.optimizer}; try a tenth")
    elif rate < LOW_RATE[config.optimizer]:
        causes.append(f"learning rate: {rate:g} is low for {config.optimizer}; try ten times as much")
    if run.warmup > LONG_WARMUP * run.total_steps:
        causes.append(
            f"warm-up: {run.warmup} of {run.total_steps} steps, and the learning rate is {now:.1e} so far; set a "
            "smaller warmup_iters or warmup_epochs"
        )
    if run.total_steps < FEW_STEPS:
        causes.append(
            f"few steps: {run.total_steps} in total, of {config.batch_size} of {len(run.data.items)} clips each; set "
            "more epochs, or a smaller batch_size"
        )
    return causes


def _check_augmentation(run: "Run") -> list[str]:
    config, causes = run.config, []
    shares = compute_masked_shares(run.data.source.replay, run.data.source.n_reference[run.data.items])
    if shares.mean > MUCH_MASKED:
        stores = " and ".join(config.stores)
        where = f"save the targets of {stores} again with" if stores else "set"
        causes.append(
            f"masks: TimeMasking hides {shares.mean:.0%} of a clip's frames on average, up to "
            f"{shares.largest.max():.0%}; {where} max_share: 0.2 among its arguments, or a smaller time_mask_param"
        )
    if config.mixup is not None and len(run.data.items) < SMALL_SET:
        causes.append(
            f"mixup: with {config.mixup:g} every clip is mixed with another one; for a small set "
            f"({len(run.data.items)} clips), try mixup: null"
        )
    if config.label_smoothing >= 0.3:
        causes.append(f"label smoothing: {config.label_smoothing:g} is a large part of the labels; try 0.1")
    return causes


def _check_network(run: "Run") -> list[str]:
    config, model, causes = run.config, run.model, []
    n_parameters, n_items = sum(p.numel() for p in model.parameters()), len(run.data.items)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = float(np.median(run.data.source.n_reference[run.data.items])) / REFERENCE_RATE
    if (n_rows := getattr(model, "n_rows", None)) is not None:
        n_tokens = n_rows * model.n_steps(max(1, round(seconds * model.sample_rate)))
        if n_tokens < FEW_TOKENS:
            causes.append(
                f"patches: a clip of {seconds:.2f} s (the median) has {n_tokens} tokens in {config.model}; set a "
                "smaller model_args.patch_stride or hop_size"
            )
    if n_trained < n_parameters / 2:
        causes.append(f"frozen: only {n_trained / n_parameters:.0%} of the parameters are trained; check freeze")
    at_random = starts_at_random(config.model, config.pretrained)
    if at_random and n_parameters > max(LARGE_NETWORK, PARAMETERS_A_CLIP * n_items):
        causes.append(
            f"large network: {n_parameters / 1e6:.1f} M parameters from random weights, and {n_items} clips; use "
            "pretrained weights, or a smaller model"
        )
    return causes


def _check_validation(run: "Run") -> list[str]:
    """Return causes of a validation at chance level with a falling loss."""
    causes = []
    momenta = [norm.momentum for norm in find_trained_norms(run.model) if norm.momentum]
    at_random = starts_at_random(run.config.model, run.config.pretrained)
    lagging = (1 - min(momenta)) ** run.step if momenta and at_random else 0.0
    if lagging > LAGGING:
        causes.append(
            f"batch norm: with a momentum of {min(momenta):g}, the initial values are still {lagging:.0%} of the "
            f"statistics for validation after {run.step} steps; they are recomputed at the end. Set more steps"
            + ("" if run.config.init_from_data else ", or init_from_data: true")
        )
    causes.append(
        "validation clips: check that their labels are in the order of their sounds, and that they are the same kind "
        f"of recordings as the training clips; with few clips ({len(run.data.items)}), the model may also overfit"
    )
    return causes
