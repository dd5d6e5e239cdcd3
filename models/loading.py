"""Weights in and out: published ones, our own checkpoints, runs' folders and Hugging Face folders.

A checkpoint of ours is a `torch.save` of {"model": state dict, "config": dict} that holds nothing but tensors and plain
values; the keys "model" and "model_args" of its config are those of published configurations.
"""

import hashlib
import logging
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
from common.files import whole_file
from models.base import Activation, AudioTagger
from models.headed import HEAD, Head, HeadedTagger, restore_head
from models.huggingface import is_huggingface_folder, read_huggingface
from models.parametrizations import fit_plain_weights
from models.registry import create_model, list_models, model_entry
from models.sources import ONNX, describe_folder, describe_kind, describe_missing, describe_onnx
from models.ssondo_checkpoints import is_ssondo, read_ssondo

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TIMM = "timm:"  # before the name of a network that timm has weights for
_PRE_TRAINING_PARTS = ("decoder", "mask_token")  # of a masked auto-encoder; tagging has no use for them


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
    """Build a model with its weights, and the head that it may have been saved with; `load_tagger` puts one onto it.

    Args:
        source: a name from `list_models` (its published weights are fetched once and kept), or a file, URL, run's
            folder or Hugging Face folder that says itself which model it holds.
        weights: what to read instead of the published weights of the name.
        num_classes: C where it must differ from that of the weights; the last layer then starts anew, with a notice.
            0 leaves it out: such a model embeds, and does not tag.
        labels: names of the classes, by default those of the checkpoint.
        activation: "sigmoid" or "softmax", by default that of the checkpoint.
        device: where the model goes.
        **arguments: settings that override those of the checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: nothing of that name, weights that cannot be fetched or read, or that do not fit.
    """
    if weights is not None and not _is_remote(str(weights)) and not Path(weights).exists():
        raise UserError(f"{weights}: there is no such file; `weights` wants a checkpoint's path or address")
    named = str(source) in list_models()
    origin = weights or (_weights_of(str(source)) if named else source)
    state, config = read_weights(origin)
    head = None
    if config.get("head"):
        tensors, state = _part_from_head(state)
        if num_classes is None and labels is None:  # else its last layer starts anew, and there is no use for a head
            head = restore_head(
                config["head"] | ({"activation": activation} if activation else {}), tensors, str(origin)
            )
    name = str(source) if named else config.get("model") or _published_as(str(origin))
    if name not in list_models():
        what = f"names {name!r}, which is no model here" if name else "does not say which model it holds"
        raise UserError(f"{origin} {what}: give `-m NAME --weights {origin}`, NAME one of {some(list_models(), 99)}")

    stored = {key: value for key, value in (config.get("model_args") or {}).items() if key != "outputdim"}
    if (
        config.get("model") != name
    ):  # the weights of a relative; settings that are none here show as tensors that misfit
        stored = {key: value for key, value in stored.items() if key in model_entry(name).arguments}
    settings: dict[str, Any] = {**stored, **arguments}
    if activation or config.get("activation"):
        settings["activation"] = activation or config["activation"]
    wanted = num_classes if num_classes is not None else len(labels) if labels else config.get("num_classes")
    if labels is None and config.get("labels") and wanted == len(config["labels"]):
        labels = list(config["labels"])
    model = create_model(name, num_classes=wanted, labels=labels, **settings)
    last = state.get(f"{model.last_layer}.weight")
    if wanted is None and last is not None and len(last) != model.num_classes:
        model = create_model(name, num_classes=len(last), **settings)
    _fit(model, state, str(origin))
    tagger = model if head is None else HeadedTagger(model, head)
    return tagger.to(device).eval()


def load_weights(model: AudioTagger, source: str | Path, *, pre_training: bool = False) -> None:
    """Read weights into a model that exists.

    Args:
        model: takes the weights.
        source: a file, URL or folder, the name of a model with published weights, or "timm:NAME" for a network of
            timm's.
        pre_training: the weights come from masked pre-training: they may lack the last layers, and parts that only
            pre-training needs are left out, both with a notice.

    Raises:
        UserError: the weights cannot be fetched or read, or do not fit.
    """
    origin = _weights_of(str(source)) if str(source) in list_models() else source
    state, config = read_weights(origin)
    _fit(model, _part_from_head(state)[1] if config.get("head") else state, str(origin), pre_training)


def save_checkpoint(path: str | Path, model: AudioTagger, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint, whole or not at all, from which `load_model` builds the same model again.

    Args:
        path: the file; its folder is made.
        model: what to save, with a head on it or without.
        extra: more entries of the file, of tensors and plain values; an entry "config" adds to the model's own.

    Raises:
        UserError: `extra` would replace what describes the model, or holds what cannot be read back safely.
    """
    extra = dict(extra or {})
    head: Head | None = None
    if isinstance(model, HeadedTagger):
        head, model = model.head, model.model
    state = model.state_dict()
    own = {
        "format_version": FORMAT_VERSION,
        "model": model.name,
        "model_args": model.arguments,
        "num_classes": model.num_classes,
        "labels": list(model.labels),
        "activation": model.activation,
        "sample_rate": model.sample_rate,
    }
    if head is not None:
        own["head"] = head.config()
        state |= {f"{HEAD}{key}": value for key, value in head.state_dict().items()}
    more = dict(extra.pop("config", None) or {})
    taken = [key for key in more if key in own] + [key for key in extra if key == "model"]
    if taken:
        raise UserError(f"{path}: the entries {some(taken)} describe the model and cannot be given")
    with whole_file(path) as partial:
        torch.save({"model": state, "config": {**more, **own}, **extra}, partial)
        read_tensors(partial)


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict and what the checkpoint says about it.

    Args:
        source: a file, a URL, a run's folder, a Hugging Face folder, or "timm:NAME".

    Returns:
        The state dict, and the config, empty where there is none. Where the config has an entry "head", which is what
        `Head.config` returns, the state dict has that head's tensors under `HEAD`.

    Raises:
        UserError: it does not exist, cannot be fetched or read, or holds no state dict.
    """
    if str(source).startswith(_TIMM):
        return _weights_of_timm(str(source).removeprefix(_TIMM)), {}
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
        path = _best_of_run(path)
    content = read_tensors(path)
    if is_ssondo(content):
        return read_ssondo(content, str(path))
    config = content.get("config")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: found entries {some(map(str, content))}; wanted a state dict, or one under 'model'")
    if all(key.startswith("module.") for key in content):  # saved from within torch.nn.DataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content), dict(config) if isinstance(config, Mapping) else {}


def _part_from_head(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part a state dict into that of its head and that of the model below."""
    tensors = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    return tensors, {key: value for key, value in state.items() if not key.startswith(HEAD)}


def weights_hash(module: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of a network's weights, names and values in order, but those whose names begin so."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not name.startswith(leave_out):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fetch(url: str, name: str | None = None) -> Path:
    """Return the local copy of a URL in torch.hub's folder; fetch it first where there is none.

    Args:
        url: of a file of tensors.
        name: of the copy, by default as in the URL.

    Raises:
        UserError: it cannot be fetched; the text says where to put the file by hand.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or Path(urlparse(url).path).name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s to %s", url, path)
    try:
        with whole_file(path) as partial:
            torch.hub.download_url_to_file(url, str(partial))
            read_tensors(partial)  # a connection that broke off must not leave half a file for the next time
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(
            f"the weights {url} cannot be fetched ({error}): fetch that file by hand and put it at {path}, "
            "or give a file with `--weights PATH`"
        ) from error
    return path


def _is_remote(origin: str) -> bool:
    return origin.startswith(("http://", "https://", _TIMM))


def _weights_of_timm(name: str) -> dict[str, Tensor]:
    """Weights of a network for pictures; a copy in Hugging Face's cache is used."""
    import timm  # takes seconds, which starts without it need not wait for
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no weights of {name!r}: give a checkpoint of it")
    repository = str(config.hf_hub_id)
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if not isinstance(cached, str):
        url = hf_hub_url(repository, "model.safetensors")
        cached = str(fetch(url, f"{repository.rpartition('/')[2]}.safetensors"))
    return dict(timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}).state_dict())


def _weights_of(name: str) -> str:
    weights = model_entry(name).weights
    if weights is None:
        twin = name.replace("audiotransformer_", "ced_")
        hint = f" ({twin!r} has)" if twin != name and twin in list_models() else ""
        raise UserError(f"model {name!r} has no published weights{hint}: give a checkpoint with `--weights PATH`")
    return weights


def _published_as(url: str) -> str | None:
    return next((name for name in list_models() if model_entry(name).weights == url), None)


def _best_of_run(folder: Path) -> Path:
    """The averaged checkpoint of a run, else the best one, else the only one."""
    files = sorted(folder.glob("*.pt"))
    for name in ("averaged.pt", "best.pt"):
        if folder / name in files:
            return folder / name
    scored = []
    for file in files:
        if match := re.search(r"mAP=(\d*\.\d+)$", file.stem):
            scored.append((float(match[1]), file))
        elif match := re.fullmatch(r"best_epoch=\d+_-?\w+=(-?\d[\d.e+-]*)", file.stem):  # of what else the smallest
            scored.append((-float(match[1]), file))
    if scored:
        return max(scored)[1]
    if len(files) == 1:
        return files[0]
    raise UserError(describe_folder(folder, [file.name for file in files]))


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values; never runs code from it."""
    try:
        if ".safetensors" in path.suffixes:
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a file of another kind makes PyTorch's reader fail in any way
        if kind := describe_kind(path):
            raise UserError(
                f"{path} is {kind}, and no checkpoint; give a name, a .pt or .safetensors file, or a run's folder"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: holds more than tensors and plain values{f' ({foreign[1]})' if foreign else ''}, or is no "
                "checkpoint; only what can be read without running code of it is read: save the state dict alone, with "
                "torch.save(model.state_dict(), PATH), where the model was made"
            ) from error
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as a checkpoint ({first[0]}); is the file whole?") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: found a {type(content).__name__}; wanted a state dict, or one under 'model'")
    return dict(content)


def _fit(model: AudioTagger, state: Mapping[str, Tensor], origin: str, pre_training: bool = False) -> None:
    """Load strictly. Only the last layer may differ in its number of classes, and that is told."""
    own = model.state_dict()
    if pre_training:
        state = _without_pre_training_parts(state, origin)
    state = fit_plain_weights(model, model.adapt_weights(state))
    constants = {key for key in own if key.startswith("front_end.")}  # follow from the settings, so they may be absent
    missing = [key for key in own if key not in state and key not in constants]
    unexpected = [key for key in state if key not in own]
    differing = [key for key in state if key in own and state[key].shape != own[key].shape]

    head = [key for key in own if key.startswith(f"{model.last_layer}.")]
    weight = f"{model.last_layer}.weight"
    if weight in differing and state[weight].shape[1:] == own[weight].shape[1:]:
        if model.num_classes:
            what = "%s: its last layer is for %d classes, the model has %d: the last layer starts anew"
        else:
            what = "%s: its last layer, which gives %d numbers, is left out: the model has %d classes, and embeds"
        logger.warning(what, origin, len(state[weight]), model.num_classes)
        state = {key: value for key, value in state.items() if key not in head}
        differing = [key for key in differing if key not in head]
    elif pre_training and weight in missing:
        layers = model.last_layer.split(".")[0] + "."
        head = [key for key in missing if key.startswith(layers)]
        logger.warning("%s: has no last layers (%s): they start anew", origin, some(head))
        missing = [key for key in missing if key not in head]

    faults = Faults(f"{origin}: it does not fit {model.name!r} and")
    if missing:
        faults.add(f"{len(missing)} tensors are missing: {some(missing)}")
    if unexpected:
        faults.add(f"{len(unexpected)} tensors are unexpected: {some(unexpected)}")
    if differing:
        shapes = [f"{key} is {tuple(state[key].shape)}, wanted {tuple(own[key].shape)}" for key in differing]
        faults.add(f"{len(differing)} tensors have another shape: {some(shapes)}")
    faults.raise_if_any()
    model.load_state_dict({**own, **state}, strict=True)


def _without_pre_training_parts(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    left_out = [key for key in state if key.startswith(_PRE_TRAINING_PARTS)]
    if left_out:
        logger.warning("%s: %d tensors of its decoder are left out", origin, len(left_out))
    return {key.removeprefix("encoder."): value for key, value in state.items() if key not in set(left_out)}
