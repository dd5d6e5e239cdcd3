"""Reading a configuration: a YAML file, command-line values over it, and every fault as a sentence."""

import difflib
import inspect
import logging
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError

from common.errors import Faults, did_you_mean, some
from common.places import PROJECT, describe_elsewhere, find_in_project
from models.registry import get_model_entry, list_models
from training.config import AUTO, SoftTargetConfig, TrainConfig

logger = logging.getLogger(__name__)

_EXAMPLE = "trainconfig/own_teacher.yaml"
_COMMANDS: dict[type[BaseModel], str] = {TrainConfig: "run.py train", SoftTargetConfig: "save_logits.py"}
# What other programs call a key.
_OTHER_WORDS = {
    "learning_rate": "optimizer_args.lr",
    "lr": "optimizer_args.lr",
    "wd": "optimizer_args.weight_decay",
    "gpu": "device",
    "gpus": "device",
    "cuda": "device",
    "cpu": "device",
    "data": "train_data",
    "val_data": "valid_data",
    "test_data": "eval_data",
    "workers": "num_workers",
    "output": "outputpath",
    "patch_out": "model_args.time_patch_out",
    "k": "topk",
    "token_merging": "model_args.token_merging",
}
_PLAIN = {
    "dict_type": "wanted a mapping of names to values, {NAME: VALUE}, or null for none",
    "list_type": "wanted a list, [A, B], or null for none",
    "string_type": "wanted text",
}

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
    path = find_in_project(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        faults.add(_describe_unreadable(path, error))
        return None
    if not isinstance(settings, dict):
        faults.add(f"it holds {type(settings).__name__}, not a mapping of keys to values, such as {_EXAMPLE} has")
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
        of_other = _keys_of_other_command(kind, settings)
        if len(of_other) > 2:
            command = _COMMANDS[SoftTargetConfig if kind is TrainConfig else TrainConfig]
            faults.add(f"it holds keys of `{command}`: {some(of_other)}; give it to that command")
        for fault in error.errors():
            if len(of_other) <= 2 or fault["type"] != "extra_forbidden":
                faults.add(_sentence(kind, fault, settings))
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
    foreign = [name for name in arguments if name not in get_model_entry(str(model)).arguments]
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


def _describe_unreadable(path: Path, error: Exception) -> str:
    """Return why a configuration cannot be read, in a sentence."""
    if path.is_dir():
        files = sorted(each.name for each in path.glob("*.yaml"))
        return "it is a folder; wanted a file" + (f" of it: {some(files, 40)}" if files else f" such as {_EXAMPLE}")
    if not path.exists():
        known = [each for folder in ("trainconfig", "logitconfig") for each in (PROJECT / folder).glob("*.yaml")]
        near = difflib.get_close_matches(path.stem, {each.stem for each in known}, n=1)
        meant = [str(each.relative_to(PROJECT)) for each in known if each.stem in near]
        hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
        return f"it does not exist{describe_elsewhere(path)}{hint}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = "is a list of sounds" if path.suffix in (".tsv", ".csv") else "is no YAML"
        return (
            f"it {what}: line {mark.line + 1}, column {mark.column + 1}: {error.problem}; wanted one such as {_EXAMPLE}"
        )
    return f"it cannot be read: {error}"


def _keys_of_other_command(kind: type[BaseModel], settings: dict[str, Any]) -> list[str]:
    """Return the keys that only the configuration of the other command has."""
    other = SoftTargetConfig if kind is TrainConfig else TrainConfig
    return [key for key in settings if key not in kind.model_fields and key in other.model_fields]


def _describe_unknown(kind: type[BaseModel], key: str, settings: dict[str, Any]) -> str:
    """Return a hint at the key that is meant: one of a mapping, of the other command, or the nearest."""
    nested: dict[str, str] = {}
    if kind is TrainConfig:
        optimizer = getattr(torch.optim, str(settings.get("optimizer", "Adam")).removesuffix("8bit"), torch.optim.Adam)
        nested |= {name: f"optimizer_args.{name}" for name in list(inspect.signature(optimizer).parameters)[1:]}
    if settings.get("model") in list_models():
        nested |= {name: f"model_args.{name}" for name in get_model_entry(str(settings["model"])).arguments}
    meant = nested.get(key) or _OTHER_WORDS.get(key)
    if meant is not None and meant.partition(".")[0] in kind.model_fields:
        return f" (did you mean {meant!r}?)"
    if _keys_of_other_command(kind, {key: None}):
        return f", which `{_COMMANDS[SoftTargetConfig if kind is TrainConfig else TrainConfig]}` takes"
    return did_you_mean(key, [*kind.model_fields, *nested])


def _sentence(kind: type[BaseModel], fault: Any, settings: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if not key:  # of the configuration as a whole
        return fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden" and key == "head":
        return (
            "unknown key 'head': a run trains the student's own last layer. teacher_head is the head of its teacher; "
            "`run.py probe` trains a head on a finished model"
        )
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_describe_unknown(kind, key, settings)}"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing; add `{key}: ...` or give --{key}"
    message = _PLAIN.get(fault["type"]) or re.sub("^Input ", "input ", fault["msg"].removeprefix("Value error, "))
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        message += did_you_mean(fault["input"], re.findall("'([^']+)'", fault["ctx"]["expected"]))
    return f"{key} is {fault['input']!r}: {message}"
