"""Typed options of configurations and commands: read from YAML and command lines, checked before anything runs.

Options are a Pydantic model derived from `Options`; the comment beside or above a field is its help (`common.keys`).
`read_options` checks values from any source, `parse_arguments` reads the command line of a script.
"""

import argparse
import itertools
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from common.errors import Faults, UserError, did_you_mean
from common.keys import describe_field, list_keys
from common.parsing import parse_yaml, shorten
from common.places import describe_unusable_name

OptionsT = TypeVar("OptionsT", bound="Options")
# Token merging, see models/token_merging.py; here, as `ModelOptions`, so that `--help` does not import PyTorch.
MergingOption = int | list[int | float] | dict[str, Any] | None

_NO_DEFAULTS = ("null", "false", "[]", "{}", '""')  # omitted from help
_TEXT = {str, Path, Literal, type(None)}


def _check_name(name: str) -> str:
    if fault := describe_unusable_name(name):
        raise ValueError(fault)
    return name


def _check_folder(path: str) -> str:
    if fault := describe_unusable_name(path, folders=True):
        raise ValueError(fault)
    return path


FileName = Annotated[str, AfterValidator(_check_name)]  # of a file or a folder that is written
FolderName = Annotated[str, AfterValidator(_check_folder)]  # likewise; may be a path below the folder it is for


class Options(BaseModel):
    """Base of all options; values that are not declared are refused, with the nearest name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False)

    POSITIONAL: ClassVar[tuple[str, ...]] = ()  # given without a name, in this order; a list takes all that follow
    SHORT: ClassVar[Mapping[str, str]] = {}  # name → letter
    MANY: ClassVar[tuple[str, ...]] = ()  # lists of text that take all words up to the next option, with their commas
    SPELLING: ClassVar[str] = "--{}"  # format of a name in messages

    @field_validator("*", mode="before")
    @classmethod
    def _reject_missing_value(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]  # Fire reads `--epochs` without a value as true
        if value is True and not (_takes(field, bool) or _takes(field, Any)):
            raise ValueError(f"given without a value; write --{info.field_name} VALUE")
        return value

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for each group of options that cannot be given together."""
        yield from ()

    @classmethod
    def describe_unknown(cls, name: str, given: Mapping[str, Any]) -> str:
        """Return the sentence on a name that is not declared; `given` are all names and values."""
        return f"unknown option --{name}{did_you_mean(name, cls.model_fields)}"

    @classmethod
    def describe_missing(cls, name: str) -> str:
        """Return the sentence on an option that must be given."""
        meaning = next((key.meaning for key in list_keys(cls) if key.name == name), "")
        spelt = name.upper() if name in cls.POSITIONAL else cls.SPELLING.format(name)
        return f"{spelt} is missing: {meaning}"


class ModelOptions(Options):
    """The options of commands that run a model, arguments of `load_tagger`."""

    SHORT: ClassVar[Mapping[str, str]] = {"model": "m"}

    model: str = "ced_mini"  # name, checkpoint, folder of a run or of Hugging Face, or .onnx file
    weights: str | None = None  # file or URL of the weights of a model given by name
    head: str | None = None  # a head on the model's embeddings: a name in heads/, a published one, or a file


def read_options(
    kind: type[OptionsT], given: Mapping[str, Any], faults: Faults, *, parse: bool = True
) -> OptionsT | None:
    """Check values and convert them to the types of their fields.

    Args:
        kind: the class of options.
        given: name → value.
        faults: gets a sentence for every unknown name, wrong value, missing option and conflict.
        parse: whether text comes from a command line and is converted by `parse_value`.

    Returns:
        The options. Where there were faults: with the faulty values replaced by defaults, so that the data that the
        others name can be checked in the same run; None if that is not possible.
    """
    if parse:
        types_of = {name: field.annotation for name, field in kind.model_fields.items()}
        given = {name: parse_value(value, types_of.get(name, Any)) for name, value in given.items()}
    valid = dict(given)
    try:
        options = kind(**valid)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            if name in valid or fault["type"] == "missing":  # one of several of a union's members
                faults.add(_describe_fault(kind, fault, given))
            valid.pop(name, None)
        try:
            options = kind(**valid)
        except ValidationError:
            return None
    for sentence in options.conflicts():
        faults.add(sentence)
    return options


def parse_value(value: Any, annotation: Any = Any) -> Any:
    """Convert the text of a command line to what YAML would make of it, given the type of its field.

    Text stays text in fields of text, `A,B` becomes a list in fields that take one, and `null` is None everywhere.
    """
    members = _members(annotation)
    kinds = {get_origin(each) or each for each in members}
    if not isinstance(value, str):
        is_item = kinds <= {list, type(None)} and isinstance(value, int | float) and not isinstance(value, bool)
        return [value] if is_item else value
    text = value.strip()
    if text in ("null", "None") and type(None) in kinds:
        return None
    if kinds <= _TEXT:
        return value
    is_list = "," in text or kinds <= {list, type(None)}
    if list in kinds and is_list and not text.startswith(("[", "{")):
        item = next(get_args(each)[0] for each in members if get_origin(each) is list)
        return [parse_value(part.strip(), item) for part in text.split(",") if part.strip()]
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError:
        return value
    return value if isinstance(parsed, str) or (str in kinds and type(parsed) not in kinds) else parsed


def parse_arguments(
    kind: type[OptionsT],
    description: str,
    words: Sequence[str] | None = None,
) -> OptionsT:
    """Read the options of a script from its command line.

    `--help` prints the description and all options and exits; an invalid command line ends with one message for all of
    its faults and status 2. `--name VALUE`, `--name=VALUE` and dashes for underscores are accepted; an option of type
    bool is true when it is given without a value.

    Args:
        kind: the class of options.
        description: what the command does.
        words: of the command line; `sys.argv[1:]` by default.
    """
    parser = _create_parser(kind, description)
    words = sys.argv[1:] if words is None else words
    parsed, more = parser.parse_known_args(_normalize(kind, list(words)))
    given = {name: value for name, value in vars(parsed).items() if value not in (None, [])}
    faults = Faults("the command line")
    many = [name for name in kind.POSITIONAL if _takes(kind.model_fields[name], list)]
    while more:
        name, equals, value = more.pop(0).partition("=")
        if not name.startswith("-") and many:  # positional values on both sides of the options
            given.setdefault(many[0], []).append(name + equals + value)
        elif not name.startswith("-"):
            faults.add(f"{name!r} belongs to no option{'; a model is given with -m' if 'model' in kind.SHORT else ''}")
        elif equals or (more and not more[0].startswith("-")):
            given[name.lstrip("-")] = value if equals else more.pop(0)
        else:
            given[name.lstrip("-")] = True
    options = read_options(kind, given, faults)
    try:
        faults.raise_if_any()
    except UserError as error:
        message = faults.sentences[0] if len(faults.sentences) == 1 else error
        parser.exit(2, f"error: {message}; {parser.prog} --help lists all options\n")
    assert options is not None
    return options


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; {self.prog} --help lists all options\n")


def _create_parser(kind: type[Options], description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for key in list_keys(kind):
        field = kind.model_fields[key.name]
        details = key.kind if key.default in _NO_DEFAULTS else f"{key.kind}; {key.describe_default()}"
        about = f"{key.meaning} ({details})".replace("%", "%%")
        if key.name in kind.POSITIONAL:
            parser.add_argument(
                key.name, metavar=key.name.upper(), nargs="*" if _takes(field, list) else "?", help=about
            )
            continue
        flags = [f"-{kind.SHORT[key.name]}"] if key.name in kind.SHORT else []
        n_values = "?" if _takes(field, bool) else "+" if key.name in kind.MANY else None
        action = "extend" if key.name in kind.MANY else "store"
        parser.add_argument(*flags, f"--{key.name}", metavar="VALUE", nargs=n_values, action=action, help=about)
    return parser


def _normalize(kind: type[Options], words: list[str]) -> list[str]:
    """Spell options with underscores, and give those of type bool the value true where none follows."""
    flags = {f"--{name}" for name, field in kind.model_fields.items() if _takes(field, bool)}
    normal = []
    for word, following in itertools.pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        is_flag = word in flags and following.lower() not in ("true", "false")
        normal.append(f"{word}=true" if is_flag else word)  # argparse would take the next word for its value
    return normal


def _members(annotation: Any) -> list[Any]:
    """Return the types of a union, without what `Annotated` adds; of another type, itself alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for member in get_args(annotation) for each in _members(member)]
    return [annotation]


def _takes(field: FieldInfo, kind: Any) -> bool:
    return any(kind in (each, get_origin(each)) for each in _members(field.annotation))


def _describe_fault(kind: type[Options], fault: Any, given: Mapping[str, Any]) -> str:
    """Put an error of Pydantic into a sentence."""
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        return kind.describe_unknown(name, given)
    if fault["type"] == "missing":
        return kind.describe_missing(name)
    spelt, found = kind.SPELLING.format(name), fault["input"]
    shown = shorten(repr(found))
    if fault["type"] == "value_error":
        return f"{spelt} is {shown}: {fault['msg'].removeprefix('Value error, ')}"
    hint = ""
    if fault["type"] == "literal_error" and isinstance(found, str):
        hint = did_you_mean(found, re.findall("'([^']+)'", fault["ctx"]["expected"]))
    return f"{spelt} is {shown}; expected {describe_field(kind.model_fields[name])}{hint}"
