"""The project's training step and a plain one, to be timed: see `scripts/benchmark.py train`.

Letters: B batch, S samples, F mel bands, T frames, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from distill.batch import Batch
from distill.objectives import ObjectivePlan, plan_objective
from distill.replay import REFERENCE_RATE, Replay
from models import create_model
from models.audiotransformer import AudioTransformer
from models.base import AudioTagger
from models.ced_mel import CedMel
from scripts.benchmarks.plain import FREQUENCY_MASK, TIME_MASK, plain_logits, plain_masks, plain_mel, plain_mixup
from training.loss_module import LossModule
from training.optim import create_optimizer, parameter_groups
from training.precision import Precision
from training.trainer import Trainer

Step = Callable[[Batch], Tensor | float]  # updates the weights, returns the loss

LEARNING_RATE = 1e-3


def create_transformer(name: str, num_classes: int) -> AudioTransformer:
    """Build the audio transformer `name` with logits as output.

    Raises:
        UserError: `name` is another kind of model, which the plain step does not implement.
    """
    if not name.startswith(("ced_", "audiotransformer_")):
        raise UserError(f"the plain step requires an audio transformer, and {name!r} is none; try ced_tiny")
    return cast(AudioTransformer, create_model(name, num_classes=num_classes, pooling="logit"))


def make_batch(model: AudioTagger, batch_size: int, seconds: float, device: torch.device, seed: int) -> Batch:
    """Return a batch of noise with random targets, on its device.

    Args:
        model: whose sample rate and number of classes are used.
        batch_size: B.
        seconds: length of the clips.
        device: of the batch.
        seed: of all values.
    """
    generator = torch.Generator().manual_seed(seed)
    n_samples = round(seconds * model.sample_rate)
    value, min_value, mixup_weight = (torch.rand(batch_size, generator=generator) for _ in range(3))
    target = (torch.rand(batch_size, model.num_classes, generator=generator) < 0.01).float()
    waveform = 0.1 * torch.randn(batch_size, n_samples, generator=generator)
    return Batch(
        item=torch.arange(batch_size),
        epoch=torch.ones(batch_size, dtype=torch.int64),
        waveforms={model.sample_rate: waveform},
        lengths={model.sample_rate: None},  # nothing is padded
        value=value,
        min_value=min_value,
        n_reference=torch.full((batch_size,), round(seconds * REFERENCE_RATE)),
        target=target,
        mixup_weight=mixup_weight,
    ).to(device)


def make_project_step(model: AudioTagger, mode: str, device: torch.device, compiled: bool) -> Step:
    """Return the project's training step of `model` on labels."""
    replay = Replay(
        spectransforms=[
            {"TimeMasking": {"time_mask_param": TIME_MASK}},
            {"FrequencyMasking": {"freq_mask_param": FREQUENCY_MASK}},
        ]
    )
    plan = plan_objective("target", loss="BCEWithLogitsLoss")
    return _make_step(model, plan, replay, "spectrogram", mode, device, compiled)


def make_pre_training_step(
    model: AudioTagger, objective: str, arguments: Mapping[str, Any], mode: str, device: torch.device, compiled: bool
) -> Step:
    """Return the project's training step of `model` with a self-supervised objective and its settings."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(1)  # for timing, any statistics will do
    return _make_step(model, plan_objective(objective, **arguments), Replay(), None, mode, device, compiled)


def _make_step(
    model: AudioTagger,
    plan: ObjectivePlan,
    replay: Replay,
    mixup_on: str | None,
    mode: str,
    device: torch.device,
    compiled: bool,
) -> Step:
    objective = plan.build(model).to(device)
    losses = LossModule(model, objective, plan.needs, replay, mixup_on, compiled=compiled)
    optimizer = create_optimizer("Adam", parameter_groups(model, objective), {"lr": LEARNING_RATE}, device)
    trainer = Trainer(losses, optimizer, None, Precision(mode, device), seed=0, total_steps=1)
    trainer.train_mode()
    return lambda batch: trainer.step([batch], [1.0], 0)["loss"]


def make_plain_step(model: AudioTransformer, mode: str, device: torch.device) -> Step:
    """Return the plain training step of `model`, whose forward pass is `plain_logits`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, foreach=False)
    precision = Precision(mode, device)
    model.train()

    def step(batch: Batch) -> float:
        mel = plain_masks(plain_mel(cast(CedMel, model.front_end), batch.waveforms[model.sample_rate]), batch)
        mel, target = plain_mixup(mel, batch.mixup_weight), plain_mixup(batch.target, batch.mixup_weight)
        with precision.context():
            loss = F.binary_cross_entropy_with_logits(plain_logits(model, mel), target)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        return loss.item()

    return step


def count_flops(model: AudioTransformer, batch: Batch) -> int:
    """Return the floating-point operations of one training step: matrix products only, forward and backward."""
    mel = plain_mel(cast(CedMel, model.front_end), batch.waveforms[model.sample_rate])
    with FlopCounterMode(display=False) as counter:
        plain_logits(model, mel).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()
