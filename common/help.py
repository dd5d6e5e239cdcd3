"""Help of commands that are functions: their docstrings, and the options they take."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from common.keys import describe_keys


def describe_commands(group: type, program: str) -> str:
    """Return the help of a class whose methods are commands: the summary of each, and the class's docstring."""
    commands = list_commands(group)
    width = max(map(len, commands))
    summaries = {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in commands.items()}
    return "\n".join(
        [
            f"SYNOPSIS\n    python {program} COMMAND ... [--option VALUE ...]\n\nCOMMANDS",
            *(f"    {name:<{width}}  {summary}" for name, summary in summaries.items()),
            f"\n    python {program} COMMAND --help describes each.\n\nOPTIONS of every command\n",
            inspect.getdoc(group) or "",
        ]
    )


def describe_command(function: Callable[..., Any], program: str, keys: type[BaseModel] | None = None) -> str:
    """Return the help of a command.

    Args:
        function: the command.
        program: the program and the name of the command.
        keys: the class whose fields are options of the command as well.
    """
    parameters = {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}
    words = "".join(f" {word}" for word in list_positional(parameters))
    text = f"SYNOPSIS\n    python {program}{words} [--option VALUE ...]\n\n{inspect.getdoc(function)}"
    return text if keys is None else f"{text}\n\nOPTIONS\n\n{describe_keys(keys)}"


def list_commands(group: type) -> Mapping[str, Callable[..., Any]]:
    """Return the public methods of a class, in their order."""
    return {name: each for name, each in vars(group).items() if inspect.isfunction(each) and not name.startswith("_")}


def list_positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the positional arguments as a synopsis shows them."""
    positional = {name.upper(): each.default is each.empty for name, each in parameters.items() if is_positional(each)}
    return [name if is_required else f"[{name}]" for name, is_required in positional.items()]


def is_positional(parameter: inspect.Parameter) -> bool:
    """Whether an argument can be given without its name."""
    return parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
