"""Loading and saving of weights: published ones, checkpoints, runs' folders and Hugging Face folders.

A checkpoint is a `torch.save` of {"model": state dict, "config": dict} that contains only tensors and plain values; the
keys "model" and "model_args" of its config are those of published configurations.
"""

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import Faults, UserError, did_you_mean, some
from common.files import reserve_partial, whole_file
from models.base import Activation, AudioTagger
from models.headed import HEAD, Head, HeadedTagger, restore_head
from models.huggingface import is_huggingface_folder, read_huggingface
from models.parametrizations import fit_plain_weights
from models.registry import create_model, get_model_entry, list_models
from models.source_errors import ONNX, describe_folder, describe_kind, describe_missing, describe_onnx
from models.ssondo_checkpoints import is_ssondo, read_ssondo

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TIMM = "timm:"  # prefix of the name of a timm model
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
        **arguments: settings that override those of the checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: an unknown name, weights that cannot be downloaded or read, or that do not fit.
    """
    if weights is not None and not _is_remote(str(weights)) and not Path(weights).exists():
        raise UserError(f"{weights}: no such file; `weights` must be the path or URL of a checkpoint")
    is_name = str(source) in list_models()
    origin = weights or (_find_published_weights(str(source)) if is_name else source)
    state, config = read_weights(origin)
    head = None
    if config.get("head"):
        tensors, state = _split_head(state)
        if num_classes is None and labels is None:  # else the last layer is initialised anew and replaces the head
            given = {"activation": activation} if activation else {}
            head = restore_head(config["head"] | given, tensors, str(origin))
    name = str(source) if is_name else config.get("model") or _find_model_by_url(str(origin))
    if name not in list_models():
        what = f"names {name!r}, which is no model here" if name else "does not name its model"
        raise UserError(f"{origin} {what}: give `-m NAME --weights {origin}`, NAME one of {some(list_models(), 99)}")

    settings: dict[str, Any] = _stored_settings(config, name) | arguments
    if activation or config.get("activation"):
        settings["activation"] = activation or config["activation"]
    n_wanted = num_classes if num_classes is not None else len(labels) if labels else config.get("num_classes")
    if labels is None and config.get("labels") and n_wanted == len(config["labels"]):
        labels = list(config["labels"])
    model = create_model(name, num_classes=n_wanted, labels=labels, **settings)
    last = state.get(f"{model.last_layer}.weight")
    if n_wanted is None and last is not None and len(last) != model.num_classes:
        model = create_model(name, num_classes=len(last), **settings)
    _fit(model, state, str(origin))
    tagger = model if head is None else HeadedTagger(model, head)
    return tagger.to(device).eval()


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
        source: a file, URL or folder, the name of a model with published weights, or "timm:NAME".
        pre_training: the weights come from masked pre-training: the last layers may be missing, and parts that only
            pre-training uses are dropped, both with a warning.

    Raises:
        UserError: the weights cannot be downloaded or read, or do not fit.
    """
    origin = _find_published_weights(str(source)) if str(source) in list_models() else source
    state, config = read_weights(origin)
    _fit(model, _split_head(state)[1] if config.get("head") else state, str(origin), pre_training)


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
    head: Head | None = None
    if isinstance(model, HeadedTagger):
        head, model = model.head, model.model
    state = model.state_dict()
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
    extra_config = dict(extra.pop("config", None) or {})
    reserved = [key for key in extra_config if key in config] + [key for key in extra if key == "model"]
    if reserved:
        raise UserError(f"{path}: the entries {some(reserved)} describe the model and cannot be given")
    with whole_file(path) as file:
        torch.save({"model": state, "config": {**extra_config, **config}, **extra}, file)
        file.finish()
        read_tensors(file.path)  # raises where an entry of `extra` could not be loaded again


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict and the config of a checkpoint.

    Args:
        source: a file, a URL, a run's folder, a Hugging Face folder, or "timm:NAME".

    Returns:
        The state dict, and the config, empty where there is none. Where the config has an entry "head" (see
        `Head.config`), the state dict contains the tensors of that head with the prefix `HEAD`.

    Raises:
        UserError: it does not exist, cannot be downloaded or read, or contains no state dict.
    """
    if str(source).startswith(_TIMM):
        return _fetch_timm_weights(str(source).removeprefix(_TIMM)), {}
    if _is_remote(str(source)):
        path = fetch(str(source))
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(describe_missing(str(source)))
    if path.suffix.lower() == ONNX:
        raise UserError(describe_onnx(path))
    if path.is_dir():
        if is_huggingface_folder(path):
            return read_huggingface(path)
        path = _choose_checkpoint(path)
    content = read_tensors(path)
    if is_ssondo(content):
        return read_ssondo(content, str(path))
    config = content.get("config")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: found entries {some(map(str, content))}; expected a state dict, or one under 'model'")
    if all(key.startswith("module.") for key in content):  # saved from torch.nn.DataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content), dict(config) if isinstance(config, Mapping) else {}


def _split_head(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into those of the head and of the model."""
    tensors = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    return tensors, {key: value for key, value in state.items() if not key.startswith(HEAD)}


def weights_hash(module: nn.Module, excluded: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of the names and values of a state dict, without names that start with one of `excluded`."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not name.startswith(excluded):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fetch(url: str, name: str | None = None) -> Path:
    """Return the copy of a URL in torch.hub's cache; download it first where there is none.

    Args:
        url: of a file of tensors.
        name: of the copy, by default that in the URL.

    Raises:
        UserError: it cannot be downloaded; the message names the path for a manual download.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or Path(urlparse(url).path).name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, path)
    try:
        with reserve_partial(path) as partial:
            torch.hub.download_url_to_file(url, str(partial))
            read_tensors(partial)  # raises for a truncated download, which is then not cached
            os.replace(partial, path)
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(
            f"the weights {url} cannot be downloaded ({error}): download the file to {path}, or give a file with "
            "`--weights PATH`"
        ) from error
    return path


def _is_remote(origin: str) -> bool:
    return origin.startswith(("http://", "https://", _TIMM))


def _fetch_timm_weights(name: str) -> dict[str, Tensor]:
    """Return the weights of a timm model, from Hugging Face's cache where they are there."""
    import timm  # here, since the import takes seconds
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no weights for {name!r}: give a checkpoint")
    repository = str(config.hf_hub_id)
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if not isinstance(cached, str):
        url = hf_hub_url(repository, "model.safetensors")
        cached = str(fetch(url, f"{repository.rpartition('/')[2]}.safetensors"))
    return dict(timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}).state_dict())


def _find_published_weights(name: str) -> str:
    weights = get_model_entry(name).weights
    if weights is None:
        twin = name.replace("audiotransformer_", "ced_")
        hint = f" ({twin!r} has)" if twin != name and twin in list_models() else ""
        raise UserError(f"model {name!r} has no published weights{hint}: give a checkpoint with `--weights PATH`")
    return weights


def _find_model_by_url(url: str) -> str | None:
    return next((name for name in list_models() if get_model_entry(name).weights == url), None)


def _choose_checkpoint(folder: Path) -> Path:
    """Return the averaged checkpoint of a run, else the best one, else the only one."""
    files = sorted(folder.glob("*.pt"))
    for name in ("averaged.pt", "best.pt"):
        if folder / name in files:
            return folder / name
    scored = []
    for file in files:
        if match := re.search(r"mAP=(\d*\.\d+)$", file.stem):
            scored.append((float(match[1]), file))
        elif match := re.fullmatch(r"best_epoch=\d+_-?\w+=(-?\d[\d.e+-]*)", file.stem):  # a loss: smallest is best
            scored.append((-float(match[1]), file))
    if scored:
        return max(scored)[1]
    if len(files) == 1:
        return files[0]
    raise UserError(describe_folder(folder, [file.name for file in files]))


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values, without executing pickled code.

    Raises:
        UserError: it cannot be read, or contains other objects.
    """
    try:
        if ".safetensors" in path.suffixes:
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load raises many types for files of another kind
        if kind := describe_kind(path):
            raise UserError(
                f"{path} is {kind}, not a checkpoint; give a name, a .pt or .safetensors file, or a run's folder"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: contains more than tensors and plain values{f' ({foreign[1]})' if foreign else ''}, or is no "
                "checkpoint. Pickled code is never executed: save the state dict alone, with "
                "torch.save(model.state_dict(), PATH), where the model was trained"
            ) from error
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as a checkpoint ({first[0]}); is the file complete?") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: found a {type(content).__name__}; expected a state dict, or one under 'model'")
    return dict(content)


def _fit(model: AudioTagger, state: Mapping[str, Tensor], origin: str, pre_training: bool = False) -> None:
    """Load a state dict strictly; only the last layer may have another number of classes, with a warning."""
    expected = model.state_dict()
    if pre_training:
        state = _drop_pre_training_parts(state, origin)
    state = fit_plain_weights(model, model.adapt_weights(state))
    # Constants of the front-end follow from its settings, so they may be absent.
    missing = [key for key in expected if key not in state and not key.startswith("front_end.")]
    unexpected = [key for key in state if key not in expected]
    differing = [key for key in state if key in expected and state[key].shape != expected[key].shape]

    head = [key for key in expected if key.startswith(f"{model.last_layer}.")]
    weight = f"{model.last_layer}.weight"
    if weight in differing and state[weight].shape[1:] == expected[weight].shape[1:]:
        if model.num_classes:
            what = "%s: its last layer has %d classes, the model has %d: the last layer is initialised anew"
        else:
            what = "%s: its last layer of %d outputs is dropped: the model has %d classes and only embeds"
        logger.warning(what, origin, len(state[weight]), model.num_classes)
        state = {key: value for key, value in state.items() if key not in head}
        differing = [key for key in differing if key not in head]
    elif pre_training and weight in missing:
        layers = model.last_layer.split(".")[0] + "."
        head = [key for key in missing if key.startswith(layers)]
        logger.warning("%s: the last layers (%s) are missing and initialised anew", origin, some(head))
        missing = [key for key in missing if key not in head]

    faults = Faults(f"{origin}: it does not fit {model.name!r} and")
    if missing:
        faults.add(f"{len(missing)} tensors are missing: {some(missing)}")
    if unexpected:
        faults.add(f"{len(unexpected)} tensors are unexpected: {some(unexpected)}")
    if differing:
        shapes = [f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}" for key in differing]
        faults.add(f"{len(differing)} tensors have another shape: {some(shapes)}")
    faults.raise_if_any()
    model.load_state_dict({**expected, **state}, strict=True)


def _drop_pre_training_parts(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if not key.startswith(_PRE_TRAINING_PARTS)}
    if n_dropped := len(state) - len(kept):
        logger.warning("%s: %d tensors of its decoder are dropped", origin, n_dropped)
    return {key.removeprefix("encoder."): value for key, value in kept.items()}
