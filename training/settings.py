"""Reading a configuration: a YAML file, and command-line values over it."""

import difflib
import logging
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common.errors import Faults, some
from common.options import parse_value, read_options
from common.parsing import MAX_YAML_BYTES, parse_yaml, read_bounded
from common.places import PROJECT, describe_elsewhere, find_in_project
from models.registry import get_model_entry, list_models
from training.config import AUTO, Config, find_other_command

logger = logging.getLogger(__name__)

_EXAMPLE = "trainconfig/own_teacher.yaml"
# Keys that take one name or path, or several with commas between.
_NAMES = ("embeddingspath", "teacher", "teacher_weights", "teacher_head")

ConfigT = TypeVar("ConfigT", bound=Config)


def read_config(kind: type[ConfigT], path: str | Path, overrides: dict[str, Any], faults: Faults) -> ConfigT | None:
    """Read a YAML configuration with command-line values over it: `read_settings`, then `check_settings`."""
    settings = read_settings(path, overrides, faults)
    return None if settings is None else check_settings(kind, settings, faults)


def read_settings(path: str | Path, overrides: dict[str, Any], faults: Faults) -> dict[str, Any] | None:
    """Read the keys and values of a YAML configuration with command-line values over them, unchecked.

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
        settings = parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except (OSError, yaml.YAMLError, ValueError) as error:
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
    command, foreign = find_other_command(kind, settings)
    if len(foreign) > 2:  # it is a file of the other command
        faults.add(f"it holds keys of `{command}`: {some(foreign)}; give it to that command")
        settings = {key: value for key, value in settings.items() if key not in foreign}
    return read_options(kind, settings, faults, parse=False)


def _drop_arguments_of_another_model(settings: dict[str, Any], model: Any) -> None:
    """Drop those of the file's `model_args` that a model named on the command line does not take."""
    arguments, of_file = settings.get("model_args"), settings.get("model")
    if model in (None, of_file) or not isinstance(arguments, dict) or model not in list_models():
        return
    foreign = [name for name in arguments if name not in get_model_entry(str(model)).arguments]
    if foreign:
        logger.info("model_args of %s that %s does not take are left out: %s", of_file, model, some(foreign, 20))
        settings["model_args"] = {name: value for name, value in arguments.items() if name not in foreign}


def _override(settings: dict[str, Any], key: str, value: Any) -> bool:
    """Set a value; a dotted key reaches into mappings. Return whether it could be set."""
    *parents, last = key.split(".")
    for parent in parents:
        if settings.get(parent) == AUTO:  # the rest of the mapping stays automatic
            settings[parent] = {AUTO: True}
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            return False
    settings[last] = parse_value(value, str | list[str | None] | None) if key in _NAMES else parse_value(value)
    return True


def _describe_unreadable(path: Path, error: Exception) -> str:
    """Return why a configuration cannot be read, in a sentence."""
    if path.is_dir():
        files = sorted(each.name for each in path.glob("*.yaml"))
        return "it is a folder; expected a file" + (f" of it: {some(files, 40)}" if files else f" such as {_EXAMPLE}")
    if not path.exists():
        known = [
            each
            for folder in ("trainconfig", "logitconfig", "probeconfig")
            for each in (PROJECT / folder).glob("*.yaml")
        ]
        near = difflib.get_close_matches(path.stem, {each.stem for each in known}, n=1)
        meant = [str(each.relative_to(PROJECT)) for each in known if each.stem in near]
        hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
        return f"it does not exist{describe_elsewhere(path)}{hint}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = "is a list of sounds" if path.suffix in (".tsv", ".csv") else "is no YAML"
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        return f"it {what}: {place}: {error.problem}; expected a file such as {_EXAMPLE}"
    return f"it cannot be read: {error}"
