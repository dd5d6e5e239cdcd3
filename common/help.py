"""Help of commands that are functions, from their signatures, docstrings and options."""

import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from fire import docstrings
from pydantic import BaseModel

from common.keys import describe_keys

WIDTH = 110
_MOST_OPTIONAL = 3  # arguments with a default that a synopsis shows
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def describe_commands(group: type, program: str) -> str:
    """Return the help of a class whose methods are commands: the summary of each, and their common options."""
    commands = list_commands(group)
    width = max(map(len, commands))
    listed = [f"    {name:<{width}}  {_summary(function)}" for name, function in commands.items()]
    return "\n".join(
        [
            f"SYNOPSIS\n    python {program} COMMAND ... [--option VALUE ...]\n",
            "COMMANDS",
            *listed,
            f"\n    python {program} COMMAND --help describes each.\n",
            "OPTIONS of every command",
            *_describe_options(group),
        ]
    )


def describe_command(
    function: Callable[..., Any], program: str, *, keys: type[BaseModel] | None = None, group: type | None = None
) -> str:
    """Return the help of a command.

    Args:
        function: the command.
        program: the program and the name of the command.
        keys: the class whose fields are options of the command as well.
        group: the class whose method it is, if any; its arguments are options of every command.
    """
    parameters = _parameters(function)
    about = docstrings.parse(inspect.getdoc(function) or "")
    meanings = _meanings(function.__doc__ or "")
    positional = [name for name, each in parameters.items() if is_positional(each)]
    rest = next((name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD), None)
    more = " [--KEY VALUE ...]" if keys is not None else ""
    words = "".join(f" {word}" for word in list_positional(parameters))
    lines = [f"SYNOPSIS\n    python {program}{words} [--option VALUE ...]{more}\n", *_fill(about.summary or "", 4)]
    if about.description:
        lines += ["", *_fill(about.description, 4)]
    if positional:
        lines += ["", "ARGUMENTS"]
        for name in positional:
            lines += [f"    {name.upper()} or --{name} ({_value(parameters[name])})", *_fill(meanings.get(name, ""), 8)]
    options = _describe_options(function)
    lines += ["", "OPTIONS", *options] if options else []
    if group is not None and (common := _describe_options(group)):
        lines += ["", "OPTIONS of every command", *common]
    if keys is not None:
        lines += ["", "KEYS", *_fill(meanings.get(rest or "", ""), 4), "", describe_keys(keys, WIDTH)]
    return "\n".join(lines)


def list_commands(group: type) -> Mapping[str, Callable[..., Any]]:
    """Return the public methods of a class, in their order."""
    return {name: each for name, each in vars(group).items() if inspect.isfunction(each) and not name.startswith("_")}


def list_positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the positional arguments as a synopsis shows them; of many with defaults, only the others."""
    positional = {name: each.default is each.empty for name, each in parameters.items() if is_positional(each)}
    optional = [name for name, required in positional.items() if not required]
    names = [name for name in positional if len(optional) <= _MOST_OPTIONAL or name not in optional]
    return [f"[{name.upper()}]" if name in optional else name.upper() for name in names]


def is_positional(parameter: inspect.Parameter) -> bool:
    """Whether an argument can be given without its name."""
    return parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}


def _describe_options(component: Callable[..., Any]) -> list[str]:
    """Describe the keyword arguments of a command, or of the class whose methods are commands."""
    meanings = _meanings(component.__doc__ or "")
    lines = []
    for name, each in _parameters(component).items():
        if each.kind is not each.KEYWORD_ONLY and not inspect.isclass(component):
            continue
        dashes = "-" if len(name) == 1 else "--"
        lines += [f"    {dashes}{name} ({_value(each)})", *_fill(meanings.get(name, ""), 8)]
    return lines


def _value(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default in (None, parameter.empty) else f"; default {parameter.default}"
    return _type(parameter.annotation) + default


def _meanings(documentation: str) -> dict[str, str]:
    found = docstrings.parse(inspect.cleandoc(documentation)).args or []
    return {each.name.lstrip("*"): each.description or "" for each in found}


def _summary(function: Callable[..., Any]) -> str:
    return docstrings.parse(inspect.getdoc(function) or "").summary or ""


def _type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(each) for each in get_args(annotation) if each is not type(None))
    return _TYPES.get(annotation, "value")


def _fill(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
