"""Command lines of functions and classes, checked before Fire runs them."""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import fire
from fire.parser import DefaultParseValue

from common.closed_output import end_with_reader
from common.entry_points import fail
from common.errors import did_you_mean
from common.help import describe_command, describe_commands, is_positional, list_commands, list_positional
from common.options import Options

_HELP = ("--help", "-h")
_NUMBERS = {int: "a whole number", float: "a number"}


@end_with_reader
def run_commands(component: Callable[..., Any], *, keys: Mapping[str, type[Options]] | None = None) -> None:
    """Check the command line and run it with Fire, which alone would run a command first and complain afterwards.

    `--help` and `-h` print the help at any position.

    Args:
        component: a function, or a class whose methods are commands.
        keys: command → the configuration whose keys it takes as options; of a single function, "" → configuration.
    """
    words = sys.argv[1:]
    program = Path(sys.argv[0]).name if Path(sys.argv[0]).is_absolute() else sys.argv[0]
    line = _CommandLine.read(words)
    group = component if inspect.isclass(component) else None
    commands = list_commands(group) if group else {"": component}
    name = (line.positional or [""])[0].replace("-", "_") if group else ""
    if any(word in _HELP for word in words) or (group and not words):
        if name in commands:
            call = f"{program} {name}".strip()
            print(describe_command(commands[name], call, (keys or {}).get(name)))
        else:
            assert group is not None
            print(describe_commands(group, program))
        sys.exit(0)
    if name not in commands:
        found = "no command is given" if not name else f"there is no command {name!r}{did_you_mean(name, commands)}"
        fail(f"{found}; expected python {program} {' | '.join(commands)}; see --help")
    if "--" not in words:  # what follows -- are flags of Fire
        options = (keys or {}).get(name)
        _check(line, commands[name], group, program, name, options.model_fields if options else ())
    fire.Fire(component, command=words)


@dataclass
class _CommandLine:
    """The words of a command line, separated as Fire separates them.

    Attributes:
        positional: values without a name.
        options: name → value of `--name value`; None where no value follows.
    """

    positional: list[str] = field(default_factory=list)
    options: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def read(cls, words: Sequence[str]) -> "_CommandLine":
        line, rest = cls(), [word for word in words if word not in _HELP]
        while rest:
            word = rest.pop(0)
            if not _is_option(word):
                line.positional.append(word)
                continue
            name, equals, value = word.lstrip("-").partition("=")
            has_value = bool(equals) or (bool(rest) and not _is_option(rest[0]))
            line.options[name.replace("-", "_")] = (value if equals else rest.pop(0)) if has_value else None
        return line


def _is_option(word: str) -> bool:
    return word.startswith("--") or re.match("-[a-zA-Z]", word) is not None  # -3 is a value


def _check(
    line: _CommandLine,
    function: Callable[..., Any],
    group: type | None,
    program: str,
    name: str,
    keys: Iterable[str],
) -> None:
    """Exit with one message where Fire would run the command first, or print a traceback."""
    parameters = {key: each for key, each in inspect.signature(function).parameters.items() if key != "self"}
    given = line.positional[1:] if group else line.positional
    by_place = [key for key, each in parameters.items() if is_positional(each)]
    is_variadic = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    usage = " ".join(filter(None, [f"python {program}", name, *list_positional(parameters), "[--option VALUE ...]"]))
    if len(given) > len(by_place) and not is_variadic:
        extra = given[len(by_place)]
        option, _, value = extra.partition("=")
        as_option = f" (did you mean --{option} {value or 'VALUE'}?)" if option in {*parameters, *keys} else ""
        fail(f"{extra!r} is not an argument{as_option}; expected {usage}")
    if group is not None:
        parameters |= {key: each for key, each in inspect.signature(group).parameters.items() if key not in parameters}
    required = [key for key in by_place[len(given) :] if parameters[key].default is inspect.Parameter.empty]
    missing = [key for key in required if key not in line.options]
    if missing:
        fail(f"{missing[0].upper()} is not given; expected {usage}; see --help")
    takes_options = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for option, given_value in line.options.items():
        if option not in parameters and len(option) > 1 and not takes_options:
            fail(f"unknown option --{option}{did_you_mean(option, parameters)}; --help lists all")
        if option in parameters:
            _check_value(option, given_value, parameters[option].annotation)


def _check_value(option: str, value: str | None, annotation: Any) -> None:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    numbers = [kind for kind in kinds if kind in _NUMBERS]
    if value is None and (numbers or str in kinds) and bool not in kinds:
        fail(f"--{option} is given without a value")
    if value is not None and numbers and str not in kinds:
        parsed = DefaultParseValue(value)
        if parsed is None and type(None) in kinds:
            return
        if isinstance(parsed, bool) or not isinstance(parsed, int if float not in numbers else int | float):
            fail(f"--{option} is {value!r}; expected {_NUMBERS[numbers[0]]}")
