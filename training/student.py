"""The student: architecture, initial weights, and initialisation from data."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from distill.batch import Batch
from distill.objectives import Needs
from models import AudioTagger, create_model, get_model_entry, list_models, load_weights
from models.quantization_recipe import Quantization
from models.weight_sources import needs_download, read_weights
from training.averaging import cumulative_statistics
from training.config import TrainConfig

logger = logging.getLogger(__name__)


def create_student(config: TrainConfig, labels: list[str] | None, needs: Needs) -> AudioTagger:
    """Build the model of a configuration with its initial weights.

    Args:
        config: names the model, its arguments and its initial weights.
        labels: the class names, or None if the data could not be opened.
        needs: requirements of the objective, such as logits or probabilities.

    Raises:
        UserError: unknown model or argument; weights that cannot be loaded or do not fit; an output that the objective
            does not support.
    """
    arguments = dict(config.model_args)
    arguments.pop("outputdim", None)  # published files may repeat the number of classes
    if needs.activation:
        arguments.setdefault("activation", needs.activation)
    if arguments.get("quantize") is not None and Quantization.parse(arguments["quantize"]).fold_batch_norm:
        raise UserError(
            "model_args: quantize: fold_batch_norm is for quantization after training (scripts/quantize.py); in "
            "training, batch norms are needed"
        )
    num_classes = None if labels is None else len(labels)  # 0 if there are only embeddings
    model = create_model(config.model, num_classes=num_classes, labels=labels, **arguments)
    if needs.output and model.outputs != needs.output:
        loss = "BCELoss" if model.outputs == "probabilities" else "BCEWithLogitsLoss"
        pooling = {"logits": "logit", "probabilities": "mean"}[needs.output]
        other = f" or model_args: {{pooling: {pooling}}}" if hasattr(model, "pooling") else ""
        raise UserError(
            f"loss {config.loss} expects {needs.output}, but {config.model} returns {model.outputs}; set loss: {loss}"
            f"{other}"
        )
    _start(model, config)
    return model


def starts_at_random(model: str, pretrained: bool | str | None) -> bool:
    """Return whether a model starts from random weights: as configured, or because none are published.

    Args:
        model: name of the model.
        pretrained: as in `TrainConfig`.
    """
    return pretrained is False or (
        pretrained is None and model in list_models() and get_model_entry(model).initialisation is None
    )


def starts_without_classes(model: str, pretrained: bool | str | None) -> bool:
    """Return whether a model starts from random weights, or from a file of this project without classes.

    The latter is the start that pre-training without labels gives: it has learned no classes, and is trained on with
    the learning rate and for the time of random weights.

    Args:
        model: name of the model.
        pretrained: as in `TrainConfig`.
    """
    if starts_at_random(model, pretrained):
        return True
    if not isinstance(pretrained, str) or pretrained in list_models() or not Path(pretrained).exists():
        return False
    try:
        return read_weights(pretrained)[1].get("num_classes") == 0
    except UserError:  # it is reported when the student is created
        return False


def downloads_start(config: TrainConfig) -> bool:
    """Whether the initial weights of a configuration's model are to be downloaded.

    Raises:
        UserError: an unknown model, or a URL that names no file.
    """
    if config.pretrained is False or isinstance(config.pretrained, str):
        return needs_download(config.pretrained or None)
    return needs_download(get_model_entry(config.model).initialisation)


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
                "%s STARTS FROM RANDOM WEIGHTS: its published initialisation, which published results start from, "
                "cannot be loaded (%s). Set `pretrained: PATH`, or false for random weights.",
                config.model,
                error,
            )


def check_lengths(model: AudioTagger, lengths: np.ndarray, world_size: int) -> None:
    """Check that a model can be trained on clips of several lengths.

    Args:
        model: the student.
        lengths: (M,) lengths of the items.
        world_size: number of processes.

    Raises:
        UserError: several processes, and a model that computes each length separately.
    """
    if model.masks_padding or len(lengths) == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if world_size > 1 and longest > shortest:
        raise UserError(
            f"{model.name} computes each length of clip separately, which is not supported with several processes; "
            "use clips of one length (chunk_length), set fill_chunks: true, or train in one process"
        )
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if norms and longest > 1.1 * shortest:  # differences of a few samples do not matter
        logger.warning(
            "%s computes each length of clip separately, so its batch norm is trained with other statistics than it "
            "uses in evaluation; cut the clips into chunks of one length (chunk_length, here or in the configuration "
            "of the stored targets), or set fill_chunks: true",
            model.name,
        )


@torch.no_grad()
def start_from_data(model: AudioTagger, batches: Iterable[Batch], classes: str | None = "target") -> None:
    """Initialise batch-norm statistics and the bias of the last layer from data, which saves thousands of iterations.

    Batch-norm statistics become those of the batches, and the last layer's bias becomes the log-odds of each class's
    mean target, so that the untrained model predicts the prior. Loaded statistics, and a bias that is not zero, are
    not changed.

    Args:
        model: on its device; left in training mode.
        batches: on the model's device.
        classes: the field of a batch with the targets of the classes (B, C); None if there are none.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.num_batches_tracked]
    model.train()
    for other in model.modules():
        if isinstance(other, nn.modules.batchnorm._BatchNorm) and other not in norms:
            other.eval()  # has loaded statistics
    targets = []
    rate = model.sample_rate
    with cumulative_statistics(norms):
        for batch in batches:
            model(batch.waveforms[rate], batch.lengths[rate])
            targets += [] if classes is None else [getattr(batch, classes)]
    model.train()
    if not targets:
        return
    mean = torch.cat(targets).mean(dim=0).clamp(1e-4, 1 - 1e-4)
    head = cast(nn.Linear, model.get_submodule(model.last_layer))
    if head.bias.any():
        return
    prior = mean.log() if model.activation == "softmax" else torch.logit(mean)
    head.bias.copy_(prior)
