"""Sources of weights: files, URLs, runs' folders, Hugging Face folders, published models and those of timm."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError, did_you_mean, some
from common.parsing import format_value
from models.dasheng import is_dasheng, read_dasheng
from models.description import ModelDescription, check_description
from models.downloads import download, file_name, find_copy
from models.huggingface import is_huggingface_folder, read_huggingface
from models.matpac_checkpoints import is_matpac, read_matpac
from models.registry import get_model_entry, list_models
from models.source_errors import ONNX, describe_folder, describe_missing, describe_onnx
from models.ssondo_checkpoints import is_ssondo, read_ssondo
from models.tensor_files import read_tensors

_TIMM = "timm:"  # prefix of the name of a timm model


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
    if is_remote(str(source)):
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
    if config is None:
        config = {}
    if not isinstance(config, Mapping):
        raise UserError(f"{path}: its config is {format_value(config)}; expected names and values")
    check_description(ModelDescription, config, f"{path}: its config")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    has_names = all(isinstance(key, str) for key in content)
    if has_names and not config and is_matpac(content):
        return read_matpac(content, str(path))
    if has_names and not config.get("model") and is_dasheng(content):
        return read_dasheng(content, config, str(path))
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise UserError(f"{path}: found entries {some(map(str, content))}; expected a state dict, or one under 'model'")
    if all(key.startswith("module.") for key in content):  # saved from torch.nn.DataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content), dict(config)


def fetch(url: str) -> Path:
    """Return the copy of a URL in torch.hub's cache, see `models.downloads.download`."""
    return download(url, _find_published_file(url))


def needs_download(source: str | Path | None) -> bool:
    """Whether weights are to be fetched first, which may take long: other faults are reported before.

    Args:
        source: see `read_weights`, or the name of a model with published weights; None for no weights.

    Raises:
        UserError: a URL that names no file.
    """
    origin = str(source or "")
    if origin in list_models():
        origin = get_model_entry(origin).weights or ""
    return is_remote(origin) and (origin.startswith(_TIMM) or find_copy(origin, _find_published_file(origin)) is None)


def _find_published_file(url: str) -> str | None:
    """Return the name of a file that the project publishes or links to, None for any other address."""
    entries = map(get_model_entry, list_models())
    published = {address for entry in entries for address in (entry.weights, entry.initialisation)}
    return file_name(url) if url in published else None


def is_remote(origin: str) -> bool:
    """Return whether a source is a URL or a model of timm."""
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
        cached = str(download(url, f"{repository.rpartition('/')[2]}.safetensors"))
    read_tensors(cached)
    return dict(timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}).state_dict())


def find_published_weights(name: str) -> str:
    """Return the URL of the published weights of a registered model.

    Raises:
        UserError: it has none.
    """
    weights = get_model_entry(name).weights
    if weights is None:
        twin = name.replace("audiotransformer_", "ced_")
        hint = f" ({twin!r} has)" if twin != name and twin in list_models() else ""
        raise UserError(f"model {name!r} has no published weights{hint}: give a checkpoint with `--weights PATH`")
    return weights


def find_model_by_url(url: str) -> str | None:
    """Return the registered model whose published weights have this URL; None if there is none."""
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
        elif match := re.fullmatch(
            r"best_epoch=\d+_-?\w+=(-?\d+\.?\d*(?:e[+-]?\d+)?)", file.stem
        ):  # a loss: smallest is best
            scored.append((-float(match[1]), file))
    if scored:
        return max(scored)[1]
    if len(files) == 1:
        return files[0]
    raise UserError(describe_folder(folder, [file.name for file in files]))
