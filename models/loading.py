"""Loading and saving of models: their weights, and the description that they are built from.

A checkpoint is a `torch.save` of {"model": state dict, "config": dict} that contains only tensors and plain values; the
keys "model" and "model_args" of its config are those of published configurations.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Faults, UserError, some
from common.files import whole_file
from models.argument_checks import find_argument_faults
from models.base import Activation, AudioTagger
from models.creation import count_weights, create_model, quantize_tagger
from models.description import FORMAT_VERSION, restore_head
from models.headed import HEAD, Head, HeadedTagger
from models.parametrizations import bake_parametrizations, fit_plain_weights, plain_state
from models.quantization_recipe import Quantization
from models.quantizers import FakeQuantize
from models.registry import AUDIOSET_CLASSES, get_model_entry, list_models
from models.source_errors import describe_network
from models.tensor_files import read_tensors
from models.weight_sources import find_model_by_url, find_published_weights, is_remote, read_weights

logger = logging.getLogger(__name__)

_SPARE_WEIGHTS = 16 << 20  # that a network may have beyond those of its file: positions are stretched
_PRE_TRAINING_PARTS = ("decoder", "mask_token")  # of a masked auto-encoder, unused in tagging


def load_model(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    labels: list[str] | None = None,
    activation: Activation | None = None,
    device: str | torch.device = "cpu",
    **arguments: Any,
) -> AudioTagger:
    """Build a model with its weights and the head that it was saved with; `load_tagger` attaches another head.

    Args:
        source: a name from `list_models` (its published weights are downloaded once and cached), or a file, URL, run's
            folder or Hugging Face folder that contains the name of its model.
        weights: source of the weights in place of the published ones.
        num_classes: C where it differs from that of the weights; the last layer is then initialised anew, with a
            warning. 0 drops it: such a model only embeds.
        labels: names of the classes, by default those of the checkpoint.
        activation: "sigmoid" or "softmax", by default that of the checkpoint.
        device: of the model.
        **arguments: settings that override those of the checkpoint; `quantize` quantizes float weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: an unknown name, weights that cannot be downloaded or read, or that do not fit.
    """
    if weights is not None and not is_remote(str(weights)) and not Path(weights).exists():
        raise UserError(f"{weights}: no such file; `weights` must be the path or URL of a checkpoint")
    is_name = str(source) in list_models()
    origin = weights or (find_published_weights(str(source)) if is_name else source)
    state, config = read_weights(origin)
    given = {"activation": activation} if activation else {}
    head = None
    if config.get("head"):
        tensors, state = _split_head(state)
        if num_classes is None and labels is None:  # else the last layer is initialised anew and replaces the head
            head = restore_head(config["head"] | given, tensors, str(origin))
    name = str(source) if is_name else config.get("model") or find_model_by_url(str(origin))
    if name not in list_models():
        what = f"names {name!r}, which is no model here" if name else "does not name its model"
        raise UserError(f"{origin} {what}: give `-m NAME --weights {origin}`, NAME one of {some(list_models(), 99)}")

    quantize = arguments.pop("quantize", None)
    model = _build(name, state, config, num_classes, labels, arguments | given, str(origin))
    _fit(model, state, str(origin))
    if quantize is not None:
        quantize_tagger(model, quantize)
    if model.arguments.get("quantize"):
        bake_parametrizations(model)
    tagger = model if head is None else HeadedTagger(model, head)
    return tagger.to(device).eval()


def _build(
    name: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    num_classes: int | None,
    labels: list[str] | None,
    given: Mapping[str, Any],
    origin: str,
) -> AudioTagger:
    """Build the model that a config describes, with fresh weights; arguments as in `load_model` override it.

    Raises:
        UserError: the description and the tensors contradict each other.
    """
    stored, own_labels = _stored_settings(config, name), config.get("labels")
    settings = stored | ({"activation": config["activation"]} if config.get("activation") else {}) | dict(given)
    n_stored = len(own_labels) if config.get("num_classes") is None and own_labels else config.get("num_classes")
    _check_size(name, stored, n_stored, state, origin)
    is_given = num_classes is not None or labels is not None
    n_wanted = num_classes if num_classes is not None else len(labels) if labels else n_stored
    if labels is None and own_labels and n_wanted == len(own_labels):
        labels = list(own_labels)
    model = create_model(name, num_classes=n_wanted, labels=labels, **settings)
    last = state.get(f"{model.last_layer}.weight")
    if last is None or not last.ndim or len(last) == model.num_classes:
        return model
    if n_wanted is None:
        return create_model(name, num_classes=len(last), **settings)
    if n_stored and not is_given:
        raise UserError(
            f"{origin}: it describes {n_stored} classes, and its last layer has {len(last)}; give `num_classes` to "
            "start the last layer anew"
        )
    return model


def _check_size(
    name: str, stored: Mapping[str, Any], n_classes: int | None, state: Mapping[str, Tensor], origin: str
) -> None:
    """Check that a network as a file describes it is about as large as the tensors in the file, before it is built.

    Raises:
        UserError: it is much larger.
    """
    n_found = sum(value.numel() for value in state.values())
    if (n_classes or 0) > max(n_found, AUDIOSET_CLASSES):
        raise UserError(f"{origin}: it describes {n_classes} classes, and has {n_found} weights")
    if not stored:
        return
    plain = {key: value for key, value in stored.items() if key not in ("parametrize", "quantize")}
    entry, faults = get_model_entry(name), Faults(f"{origin}: the description of {name!r}")
    for key in stored:
        if key not in entry.arguments:
            faults.add(f"unknown argument {key!r:.80}; it takes {some(entry.arguments, 99)}")
    for sentence in find_argument_faults(entry.factory, plain):
        faults.add(sentence)
    faults.raise_if_any()
    n_expected = count_weights(name, 1, plain)
    if n_expected > 2 * n_found + _SPARE_WEIGHTS:
        raise UserError(
            f"{origin}: it describes a network of {n_expected} weights, and has {n_found}; its config is damaged, or "
            "that of another model"
        )


def _stored_settings(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments of a checkpoint's config for the model called `name`."""
    stored = {key: value for key, value in (config.get("model_args") or {}).items() if key != "outputdim"}
    if config.get("model") == name:
        return stored
    # Arguments of another model that this one lacks are dropped; tensors that then do not fit are reported.
    return {key: value for key, value in stored.items() if key in get_model_entry(name).arguments}


def load_weights(model: AudioTagger, source: str | Path, *, pre_training: bool = False) -> None:
    """Load weights into an existing model.

    Args:
        model: to load into.
        source: a file, URL or folder, the name of a model with published weights, or "timm:NAME". Grids of
            quantized weights are taken where the model has the same, see `models.quantization`.
        pre_training: the weights come from masked pre-training: the last layers may be missing, and parts that only
            pre-training uses are dropped, both with a warning.

    Raises:
        UserError: the weights cannot be downloaded or read, or do not fit.
    """
    origin = find_published_weights(str(source)) if str(source) in list_models() else source
    state, config = read_weights(origin)
    if config.get("head"):
        state = _split_head(state)[1]
    stored, own = _stored_settings(config, model.name).get("quantize"), model.arguments.get("quantize")
    if (stored or {}).get("fold_batch_norm") and not (own or {}).get("fold_batch_norm"):
        raise UserError(
            f"{origin}: its batch norms are folded into its convolutions (fold_batch_norm), so that it can be trained "
            "no further; give the checkpoint that it was made of"
        )
    if not _have_same_grids(stored, own):
        state = {key: value for key, value in state.items() if f"_{FakeQuantize.kept_as}." not in key}
    _fit(model, state, str(origin), pre_training)


def _have_same_grids(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether the grids of weights that were quantized with some settings suit others; None for float weights."""
    if not one or not other:
        return not one and not other
    names = ("weights", "scope", "scheme", "range", "bucket_size")
    a, b = Quantization.parse(one), Quantization.parse(other)
    return all(getattr(a, name) == getattr(b, name) for name in names)


def save_checkpoint(path: str | Path, model: AudioTagger, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint atomically, from which `load_model` rebuilds the model.

    Args:
        path: the file; its folder is created.
        model: to save, with or without a head.
        extra: further entries, of tensors and plain values; "config" is merged into the config of the model.

    Raises:
        UserError: `extra` would overwrite entries that describe the model, or cannot be read back safely.
    """
    extra = dict(extra or {})
    state, config = describe_checkpoint(model)
    extra_config = dict(extra.pop("config", None) or {})
    reserved = [key for key in extra_config if key in config] + [key for key in extra if key == "model"]
    if reserved:
        raise UserError(f"{path}: the entries {some(reserved)} describe the model and cannot be given")
    with whole_file(path) as file:
        torch.save({"model": state, "config": {**extra_config, **config}, **extra}, file)
        file.finish()
        read_tensors(file.path)  # raises where an entry of `extra` could not be loaded again


def describe_checkpoint(model: AudioTagger) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the config of a model's checkpoint; it may have a head."""
    head: Head | None = None
    if isinstance(model, HeadedTagger):
        head, model = model.head, model.model
    state = plain_state(model)
    config = {
        "format_version": FORMAT_VERSION,
        "model": model.name,
        "model_args": model.arguments,
        "num_classes": model.num_classes,
        "labels": list(model.labels),
        "activation": model.activation,
        "sample_rate": model.sample_rate,
    }
    if head is not None:
        config["head"] = head.config()
        state |= {f"{HEAD}{key}": value for key, value in head.state_dict().items()}
    return state, config


def _split_head(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into those of the head and of the model."""
    tensors = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    return tensors, {key: value for key, value in state.items() if not key.startswith(HEAD)}


def weights_hash(module: nn.Module, excluded: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of the names and values of a state dict, without names that start with one of `excluded`.

    Grids of quantized weights, whose values they determine, are left out.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not name.startswith(excluded) and f"_{FakeQuantize.kept_as}." not in name:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fit(model: AudioTagger, state: Mapping[str, Tensor], origin: str, pre_training: bool = False) -> None:
    """Load a state dict strictly; only the last layer may have another number of classes, with a warning."""
    expected = model.state_dict()
    if pre_training:
        state = _drop_pre_training_parts(state, origin)
    _check_values(state, origin)
    try:
        state = fit_plain_weights(model, model.adapt_weights(state))
    except (IndexError, RuntimeError, ValueError) as error:  # positions of another shape cannot be stretched
        raise UserError(f"{origin}: its weights do not fit {model.name!r} ({str(error).splitlines()[0]})") from error
    # Constants of the front-end follow from its settings, so they may be absent.
    missing = [key for key in expected if key not in state and not key.startswith("front_end.")]
    unexpected = [key for key in state if key not in expected]
    differing = [key for key in state if key in expected and state[key].shape != expected[key].shape]

    last = f"{model.last_layer}."
    names = [f"{last}weight", f"{last}parametrizations.weight.original"]
    weight = next((name for name in names if name in expected), names[0])
    if weight in differing and state[weight].shape[1:] == expected[weight].shape[1:]:
        if model.num_classes:
            what = "%s: its last layer has %d classes, the model has %d: the last layer is initialised anew"
        else:
            what = "%s: its last layer of %d outputs is dropped: the model has %d classes and only embeds"
        logger.warning(what, origin, len(state[weight]), model.num_classes)
        state = {key: value for key, value in state.items() if not key.startswith(last)}
        differing = [key for key in differing if not key.startswith(last)]
        unexpected = [key for key in unexpected if not key.startswith(last)]  # the quantizer of a layer without classes
    elif pre_training and weight in missing:
        layers = model.last_layer.split(".")[0] + "."
        head = [key for key in missing if key.startswith(layers)]
        logger.warning("%s: the last layers (%s) are missing and initialised anew", origin, some(head))
        missing = [key for key in missing if key not in head]

    found = describe_network(state)
    if (missing or differing) and found and found != describe_network(expected):
        raise UserError(
            f"{origin} holds the weights of {found}, not of {model.name!r}: found {some(unexpected or state, 2)}, "
            f"expected {some(missing or differing, 2)}; give `-m NAME` of the network that it was made with"
        )
    faults = Faults(f"{origin}: it does not fit {model.name!r} and")
    if missing:
        faults.add(f"{len(missing)} tensors are missing: {some(missing)}")
    if unexpected:
        faults.add(f"{len(unexpected)} tensors are unexpected: {some(unexpected)}")
    if differing:
        shapes = [f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}" for key in differing]
        faults.add(f"{len(differing)} tensors have another shape: {some(shapes)}")
    kinds = [
        f"{key} is {str(state[key].dtype).removeprefix('torch.')}, expected {str(value.dtype).removeprefix('torch.')}"
        for key, value in expected.items()
        if key in state and state[key].is_floating_point() != value.is_floating_point()
    ]
    if kinds:
        faults.add(f"{len(kinds)} tensors are of another type: {some(kinds)}")
    faults.raise_if_any()
    model.load_state_dict({**expected, **state}, strict=True)


def _check_values(state: Mapping[str, Tensor], origin: str) -> None:
    """Check that all weights are finite real numbers.

    Raises:
        UserError: one is NaN or infinite, or complex.
    """
    for key, value in state.items():
        if value.is_complex():
            raise UserError(f"{origin}: the tensor {key} is complex; expected real numbers")
        # the smallest and the largest are NaN where any value is; float8 has no order
        if value.is_floating_point() and value.numel() and not torch.stack(_range(value)).isfinite().all():
            raise UserError(
                f"{origin}: the tensor {key} holds NaN or infinite values: the training diverged, or the file is "
                "damaged; give another checkpoint"
            )


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.aminmax(values.float() if values.itemsize == 1 else values)


def _drop_pre_training_parts(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if not key.startswith(_PRE_TRAINING_PARTS)}
    if n_dropped := len(state) - len(kept):
        logger.warning("%s: %d tensors of its decoder are dropped", origin, n_dropped)
    return {key.removeprefix("encoder."): value for key, value in kept.items()}
