"""Making a student ready: architecture, starting weights, and a head start from its data."""

import logging
from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from distill.batch import Batch
from distill.objectives import Needs
from models import AudioTagger, create_model, get_model_entry, list_models, load_weights
from training.config import TrainConfig

logger = logging.getLogger(__name__)


def create_student(config: TrainConfig, labels: list[str] | None, needs: Needs) -> AudioTagger:
    """Build the model of a configuration with its starting weights.

    Args:
        config: names the model, its arguments and where its weights start.
        labels: the class names, or None where the data did not say (its faults are told anyway).
        needs: of what it will be trained towards; they say whether it must give logits or probabilities.

    Raises:
        UserError: unknown model or argument; weights that cannot be had or do not fit; output that does not suit the
            objective.
    """
    arguments = dict(config.model_args)
    arguments.pop("outputdim", None)  # published files may repeat the number of classes
    if needs.activation:
        arguments.setdefault("activation", needs.activation)
    num_classes = None if labels is None else len(labels)  # 0 where embeddings alone are learnt
    model = create_model(config.model, num_classes=num_classes, labels=labels, **arguments)
    if needs.output and model.outputs != needs.output:
        loss = "BCELoss" if model.outputs == "probabilities" else "BCEWithLogitsLoss"
        pooling = {"logits": "logit", "probabilities": "mean"}[needs.output]
        other = f" or model_args: {{pooling: {pooling}}}" if hasattr(model, "pooling") else ""
        raise UserError(
            f"loss {config.loss} wants {needs.output}, but {config.model} gives {model.outputs}; set loss: {loss}"
            f"{other}"
        )
    _start(model, config)
    return model


def starts_at_random(model: str, pretrained: bool | str | None) -> bool:
    """Whether a model has no weights to start from: none are wanted, or none were published for it.

    Args:
        model: its name.
        pretrained: as in `TrainConfig`.
    """
    return pretrained is False or (
        pretrained is None and model in list_models() and get_model_entry(model).initialisation is None
    )


def _start(model: AudioTagger, config: TrainConfig) -> None:
    if config.pretrained is False:
        logger.info("%s starts from random weights", config.model)
    elif isinstance(config.pretrained, str):
        load_weights(model, config.pretrained, pre_training=True)
        logger.info("%s starts from %s", config.model, config.pretrained)
    else:
        url = get_model_entry(config.model).initialisation
        if url is None:
            if config.pretrained:
                raise UserError(
                    f"{config.model} has no published initialisation; give `pretrained: PATH`, or false for "
                    "random weights"
                )
            logger.info("%s starts from random weights", config.model)
            return
        try:
            load_weights(model, url, pre_training=True)
            logger.info("%s starts from its published initialisation, %s", config.model, url)
        except UserError as error:
            if config.pretrained:
                raise
            logger.warning(
                "%s STARTS FROM RANDOM WEIGHTS: its published initialisation cannot be had (%s). Published figures "
                "start there. Give `pretrained: PATH` to use it, or false to say that you mean it.",
                config.model,
                error,
            )


def check_lengths(model: AudioTagger, lengths: np.ndarray, world_size: int) -> None:
    """See that a model can learn well from clips of several lengths.

    Args:
        model: the student.
        lengths: (M,) of the clips.
        world_size: processes that train together.

    Raises:
        UserError: several processes, and a model that runs each length on its own.
    """
    if model.masks_padding or len(lengths) == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if world_size > 1 and longest > shortest:
        raise UserError(
            f"{model.name} runs every length of clip on its own, which several processes cannot do in step; give clips "
            "of one length (chunk_length), give fill_chunks: true, or train in one process"
        )
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if norms and longest > 1.1 * shortest:  # a few samples more or less are all the same to it
        logger.warning(
            "%s runs every length of clip on its own, so that its batch norm learns with other statistics than it is "
            "used with; cut the clips into chunks of one length (chunk_length, here or where the targets are saved), "
            "or give fill_chunks: true",
            model.name,
        )


@torch.no_grad()
def start_from_data(model: AudioTagger, batches: Iterable[Batch], classes: str | None = "target") -> None:
    """Set what the first thousands of iterations would otherwise find out.

    Batch-norm statistics become those of the batches, and the last layer's bias becomes the log-odds of each class's
    mean target, so that the untrained model already answers with the prior. What was loaded from elsewhere (statistics
    that have seen batches, a bias that is not zero) stays as it is.

    Args:
        model: on its device; left in training mode.
        batches: on the model's device.
        classes: the field of a batch that holds the targets of the classes (B, C); None where there are none.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.num_batches_tracked]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    model.train()
    for other in model.modules():
        if isinstance(other, nn.modules.batchnorm._BatchNorm) and other not in norms:
            other.eval()  # knows its statistics
    targets = []
    rate = model.sample_rate
    for batch in batches:
        model(batch.waveforms[rate], batch.lengths[rate])
        targets += [] if classes is None else [getattr(batch, classes)]
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train()
    if not targets:
        return
    mean = torch.cat(targets).mean(dim=0).clamp(1e-4, 1 - 1e-4)
    head = cast(nn.Linear, model.get_submodule(model.last_layer))
    if head.bias.any():
        return
    prior = mean.log() if model.activation == "softmax" else torch.logit(mean)
    head.bias.copy_(prior)
