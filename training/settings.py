"""Reading a configuration: a YAML file, command-line values over it, and every fault as a sentence."""

import logging
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common.errors import Faults, did_you_mean, some
from models.registry import list_models, model_entry
from training.config import AUTO, SoftTargetConfig, TrainConfig

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", TrainConfig, SoftTargetConfig)


def read_config(kind: type[ConfigT], path: str | Path, overrides: dict[str, Any], faults: Faults) -> ConfigT | None:
    """Read a YAML configuration and lay command-line values over it: `read_settings`, then `check_settings`."""
    settings = read_settings(path, overrides, faults)
    return None if settings is None else check_settings(kind, settings, faults)


def read_settings(path: str | Path, overrides: dict[str, Any], faults: Faults) -> dict[str, Any] | None:
    """Read the keys and values of a YAML configuration and lay command-line values over them, unchecked.

    Args:
        path: the YAML file.
        overrides: key → value; a dotted key (`optimizer_args.lr`) reaches into a mapping.
        faults: gets what is wrong with the file, and dotted keys that reach into what is no mapping.

    Returns:
        The settings; None if the file holds none. Arguments of the file's own `model` that another one, named in
        `overrides`, does not take are left out, with a logged line.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        faults.add(f"it cannot be read: {error}")
        return None
    if not isinstance(settings, dict):
        faults.add(f"it holds {type(settings).__name__}, not a mapping of keys to values")
        return None
    settings = {str(key): value for key, value in settings.items()}  # YAML reads a key such as `on` as true
    _drop_arguments_of_another_model(settings, overrides.get("model"))
    for key, value in overrides.items():
        if not _override(settings, key, value):
            faults.add(f"--{key} reaches into {key.split('.')[0]!r}, which is not a mapping")
    return settings


def check_settings(kind: type[ConfigT], settings: dict[str, Any], faults: Faults) -> ConfigT | None:
    """Turn settings into a typed configuration.

    Args:
        kind: `TrainConfig` or `SoftTargetConfig`.
        settings: key → value.
        faults: gets every fault: an unknown key with the nearest valid one, a value of the wrong type, a missing key.

    Returns:
        The configuration. Where there were faults: the configuration with the faulty keys at their defaults, so that
        the data it names can be checked in the same go; None if that is not possible.
    """
    settings = dict(settings)
    try:
        return kind(**settings)
    except ValidationError as error:
        for fault in error.errors():
            faults.add(_sentence(kind, fault))
            if fault["loc"]:
                settings.pop(str(fault["loc"][0]), None)
    try:
        return kind(**settings)
    except ValidationError:
        return None


def _drop_arguments_of_another_model(settings: dict[str, Any], model: Any) -> None:
    """Leave out what the file's `model_args` say of its own model, where the command line names another one."""
    arguments, own = settings.get("model_args"), settings.get("model")
    if model in (None, own) or not isinstance(arguments, dict) or model not in list_models():
        return
    foreign = [name for name in arguments if name not in model_entry(str(model)).arguments]
    if foreign:
        logger.info("model_args of %s that %s does not take are left out: %s", own, model, some(foreign, 20))
        settings["model_args"] = {name: value for name, value in arguments.items() if name not in foreign}


def _override(settings: dict[str, Any], key: str, value: Any) -> bool:
    """Set a value; a dotted key reaches into mappings, and the answer is whether it could."""
    *parents, last = key.split(".")
    for parent in parents:
        if settings.get(parent) == AUTO:  # the rest of the mapping stays automatic
            settings[parent] = {AUTO: True}
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            return False
    settings[last] = _parsed(value)
    return True


def _parsed(value: Any) -> Any:
    """Read text from the command line as YAML would, so that `--mixup null` means what it says."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _sentence(kind: type[BaseModel], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if not key:  # of the configuration as a whole
        return fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden" and key == "head":
        return (
            "unknown key 'head': a run trains the student's own last layer. teacher_head is the head of its teacher; "
            "`run.py probe` trains a head on a finished model"
        )
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(key, kind.model_fields)}"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing; add `{key}: ...` or give --{key}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key} is {fault['input']!r}: {message[0].lower()}{message[1:]}"
