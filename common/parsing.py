"""YAML and JSON of users: parsed within limits of size, depth and digits.

Both formats allow a few bytes to stand for gigabytes (aliases of aliases), for more nesting than Python's stack holds,
or for values that no later step can write again (dates, NaN, numbers of thousands of digits). What is refused here is
refused in every file and on every command line, with the place and the reason.
"""

import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from common.errors import UserError, some

RecordT = TypeVar("RecordT", bound=BaseModel)

MAX_YAML_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 24
MAX_DEPTH = 64  # of lists and mappings in each other
MAX_VALUES = 20_000  # of a YAML document, where an alias counts as what it stands for
MAX_DIGITS = 64  # of a whole number

_KINDS = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", type(None): "nothing"}


def check_regular_file(path: str | Path) -> None:
    """Check that a path is a file that can be read to its end: no folder, device or pipe.

    Raises:
        UserError: it is something else, or may not be read.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UserError(f"{path} is {kind}; expected a file")


def read_bounded(path: str | Path, limit: int) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `limit` bytes, or is no UTF-8.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        # Python allocates as much as is to be read; a device or a pipe has no size.
        content = file.read(min(limit, status.st_size) + 1 if stat.S_ISREG(status.st_mode) else limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content.decode("utf-8")


# --- JSON ---


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """Return the value that a JSON text stands for.

    Args:
        text: of one value.
        kind: expected type of the value: dict or list.

    Raises:
        ValueError: it is no JSON, of another type, nested deeper than `MAX_DEPTH`, or has a key twice, NaN, or a number
            of more than `MAX_DIGITS` digits.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_parse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
            object_pairs_hook=_build_mapping,
        )
        depth = _measure_depth(value)
    except RecursionError:
        depth = MAX_DEPTH + 1
    except TypeError:
        raise ValueError(f"expected text, found {type(text).__name__}") from None
    if depth > MAX_DEPTH:
        raise ValueError(f"its lists and mappings are nested deeper than {MAX_DEPTH}")
    if not isinstance(value, kind):
        raise ValueError(f"it holds {_KINDS.get(type(value), 'a value')}, expected {_KINDS[kind]}")
    return value


def load_json(path: str | Path, kind: type = dict) -> Any:
    """Return the value in a JSON file; `OSError`, and `ValueError` of `parse_json`, are for the caller to explain."""
    Path(path).stat()  # raises where it is missing
    check_regular_file(path)
    return parse_json(read_bounded(path, MAX_JSON_BYTES), kind)


def read_json(path: str | Path, remedy: str, kind: type = dict) -> Any:
    """Return the value in a JSON file.

    Args:
        path: the file.
        remedy: what to do about a damaged file, for the message.
        kind: expected type of the value: dict or list.

    Raises:
        UserError: it cannot be read, or see `parse_json`.
    """
    try:
        return load_json(path, kind)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {remedy}") from None


def read_record(path: str | Path, kind: type[RecordT], remedy: str) -> RecordT:
    """Return the mapping in a JSON file as a Pydantic model, which states the types and limits of its values.

    Raises:
        UserError: see `read_json`; or a value is missing, or of another type.
    """
    value = read_json(path, remedy)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {some(describe_faults(error), 3)}; {remedy}") from None


def describe_faults(error: ValidationError) -> list[str]:
    """Return a sentence for each value that Pydantic refused."""
    sentences: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        # Members of unions are in the place as well, such as list[str].
        place = ".".join(str(part) for part in fault["loc"] if isinstance(part, int) or part.isidentifier())
        reason = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if fault["type"] == "missing":
            sentence = f"{place} is missing"
        elif isinstance(fault["input"], dict) and fault["type"] == "value_error":  # between values
            sentence = f"{place}: {reason}" if place else reason
        else:
            sentence = f"{place} is {format_value(fault['input'])}: {reason}"
        sentences.setdefault(place, sentence)
    return list(sentences.values())


def format_value(value: Any) -> str:
    """Return a value as text of bounded length, whatever is nested in it."""
    if isinstance(value, Mapping | list | tuple | set):
        return reprlib.repr(value)[:100]
    if isinstance(value, str | bytes | int | float | None):
        return shorten(ascii(value), 100)
    return f"a {type(value).__name__}"


def shorten(text: str, limit: int = 200) -> str:
    """Return the beginning of a long text, so that a message stays a sentence whatever was found."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def _parse_constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)  # a setting may be infinite


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits; at most {MAX_DIGITS} are supported")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _build_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} is there more than once")
    return mapping


def _measure_depth(value: Any) -> int:
    """Return how deep lists and mappings are nested: level by level, since recursion is what is to be prevented."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return depth


# --- YAML ---


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML document stands for: null, booleans, numbers, text, lists and mappings.

    Dates stay text, since neither JSON nor a model's arguments have them.

    Raises:
        yaml.YAMLError: it is no YAML, or has a tag of another type, a key twice, a value that contains itself, more
            than `MAX_VALUES` values, more than `MAX_DEPTH` levels, or a number of more than `MAX_DIGITS` digits.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """Builds plain values, within limits."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._n_values = 0
        self._sizes: dict[int, int] = {}  # id of a composed node → values in it

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a value, and count it; an alias as often as it is used."""
        event = self.peek_event()
        before = self._n_values
        self._n_values += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH}", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ComposerError(None, None, f"the alias *{event.anchor} is part of its own value", event.start_mark)
            self._n_values = before + self._sizes[id(node)]
        if self._n_values > MAX_VALUES:
            raise ComposerError(None, None, f"more than {MAX_VALUES:,} values, aliases included", event.start_mark)
        self._sizes.setdefault(id(node), self._n_values - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping; a key that is there twice is an error, since YAML would keep the last without a word."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"the key {key.value[:80]!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Build a value; what PyYAML raises for a malformed one (`!!int ""`) is an error of the document, too."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            what = f"{str(node.value)[:80]!r} is no value of the type {node.tag.rpartition(':')[2]} ({error})"
            raise ConstructorError(None, None, what, node.start_mark) from None

    def build_int(self, node: Any) -> int:
        """Build a whole number."""
        if len(node.value) > MAX_DIGITS:
            what = f"a number of {len(node.value)} digits; at most {MAX_DIGITS} are supported"
            raise ConstructorError(None, None, what, node.start_mark)
        return self.construct_yaml_int(node)

    def build_float(self, node: Any) -> float:
        """Build a number; `.nan` and numbers that overflow are errors, `.inf` is not."""
        value = self.construct_yaml_float(node)
        if math.isnan(value) or (math.isinf(value) and ".inf" not in node.value.lower()):
            raise ConstructorError(None, None, f"{node.value[:40]} is no number that can be used", node.start_mark)
        return value


_JSON_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag in _JSON_TAGS or tag is None
} | {"tag:yaml.org,2002:int": _Loader.build_int, "tag:yaml.org,2002:float": _Loader.build_float}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
