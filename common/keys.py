"""The keys of a configuration, read from the class that checks it: meaning, type, default.

The class is a Pydantic model. The meaning of a key is the comment above it or on its line, so that there is no second
list to maintain; a comment `# --- title` begins a group.
"""

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_HEADING = "# --- "
_OURS = "ours"  # marks the keys that published configurations do not have
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Path: "path"}
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: as in a YAML file.
        meaning: the comment beside it; "" where there is none.
        kind: the type of its values, in words.
        default: as YAML has it; None where the key must be given.
        group: the heading above it.
    """

    name: str
    meaning: str
    kind: str
    default: str | None
    group: str

    def describe_default(self) -> str:
        """Return "default 3", or that the key must be given."""
        return "must be given" if self.default is None else f"default {self.default}"


def list_keys(model: type[BaseModel]) -> list[Key]:
    """Return the keys of a configuration in the order of its class."""
    comments = _read_comments(model)
    keys = []
    for name, field in model.model_fields.items():
        group, meaning = comments.get(name, ("", ""))
        default = None if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        keys.append(Key(name, meaning, describe_field(field), default, group))
    return keys


def describe_keys(model: type[BaseModel], width: int = 100) -> str:
    """Format the keys of a configuration by groups: name, type and default on a line, the meaning below."""
    lines: list[str] = []
    group = None
    for key in list_keys(model):
        if key.group != group:
            group = key.group
            lines += ["", f"  {group}"] if group else [""]
        lines.append(f"    --{key.name} ({key.kind}; {key.describe_default()})")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines[1:])


def _read_comments(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Return the group and the meaning of each key of a class, from the comments of its source and of its bases."""
    comments: dict[str, tuple[str, str]] = {}
    for base in model.__bases__:
        if issubclass(base, BaseModel) and base is not BaseModel:
            comments |= _read_comments(base)
    lines = textwrap.dedent(inspect.getsource(model)).splitlines()
    definition = ast.parse("\n".join(lines)).body[0]
    assert isinstance(definition, ast.ClassDef)
    group, after = "", 0
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.end_lineno is None:
            after = node.end_lineno or after
            continue
        above = [line.strip() for line in lines[after : node.lineno - 1] if line.strip().startswith("#")]
        headings = [number for number, line in enumerate(above) if line.startswith(_HEADING)]
        if headings:
            group = above[headings[-1]].removeprefix(_HEADING)
            above = above[headings[-1] + 1 :]
        beside = [_find_comment(line) for line in lines[node.lineno - 1 : node.end_lineno]]
        words = " ".join(comment.removeprefix("#").strip() for comment in [*above, *beside] if comment)
        comments[node.target.id] = (group, words.removeprefix(_OURS).removeprefix(":").strip())
        after = node.end_lineno
    return comments


def _find_comment(line: str) -> str:
    """Return the comment at the end of a line of code; "" where there is none. A "  # " in a string would be one."""
    return line[line.index("  # ") + 2 :] if "  # " in line else ""


def describe_field(field: FieldInfo) -> str:
    """Describe the type of a field and its limits: "whole number, at least 1"."""
    return ", ".join([_describe_type(field.annotation), *_describe_limits(field.metadata)])


def _describe_limits(metadata: Iterable[Any]) -> list[str]:
    limits = [each for one in metadata for each in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return [
        f"{words} {getattr(limit, name):g}"
        for limit in limits
        for name, words in _LIMITS.items()
        if getattr(limit, name, None) is not None
    ]


def _describe_type(annotation: Any) -> str:
    """Return the name of a type for readers of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        described = " or ".join(_describe_type(argument) for argument in arguments if argument is not type(None))
        return described if type(None) not in arguments or "null" in described else f"{described} or null"
    if origin is Literal:
        return " or ".join(json.dumps(value) if not isinstance(value, str) else value for value in arguments)
    if origin is list:
        return f"list of {_describe_type(arguments[0])}"
    if origin is dict:
        return "mapping {NAME: VALUE}"
    if hasattr(annotation, "__metadata__"):
        return ", ".join([_describe_type(arguments[0]), *_describe_limits(annotation.__metadata__)])
    return _NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)))
