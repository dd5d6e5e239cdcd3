"""YAML and JSON of strangers: the value it stands for, or one sentence; in little time and memory."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.errors import Faults, UserError
from common.options import Options, parse_value, read_options
from common.parsing import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_YAML_BYTES,
    load_json,
    parse_json,
    parse_yaml,
    read_json,
    read_record,
)
from training.config import SoftTargetConfig, TrainConfig
from training.settings import read_config, read_settings

ROOT = Path(__file__).resolve().parents[2]


def make_bomb(entry: str) -> str:
    """Nine aliases of nine aliases ..., a billion values in all."""
    lines = [f"a0: &a0 {entry}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines)


YAML_ATTACKS = {
    "aliases": (make_bomb("[x, x, x]"), "more than 20,000 values"),
    "merged aliases": ("\n".join(["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}"
                                                     for n in range(1, 10)]), "more than 20,000 values"),
    "an alias of itself": ("a: &a [*a]", "part of its own value"),
    "3,000 brackets": ("a: " + "[" * 3000, "nested deeper than 64"),
    "3,000 braces": ("{a: " * 3000, "nested deeper than 64"),
    "3,000 dashes": ("- " * 3000, "nested deeper than 64"),
    "5,000 digits": ("a: " + "1" * 5000, "a number of 5000 digits"),
    "5,000 hexadecimal digits": ("a: 0x" + "f" * 5000, "a number of 5002 digits"),
    "sexagesimal digits": ("a: 1" + ":1" * 3000, "digits"),
    "a key twice": ("a: 1\nb: 2\na: 3", "the key 'a' is there twice"),
    "a tab": ("a:\n\tb: 1", "cannot start any token"),
    "binary": ("a: \x00\x01", "special characters are not allowed"),
    "NaN": ("a: .nan", "is no number that can be used"),
    "an object": ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "binary data": ("a: !!binary aGk=", "could not determine a constructor"),
    "a set": ("a: !!set {x}", "could not determine a constructor"),
    "no integer": ("a: !!int ''", "is no value of the type int"),
    "no boolean": ("a: !!bool x", "is no value of the type bool"),
    "a list as a key": ("? [1]\n: 2", "unhashable key"),
    "two documents": ("--- a\n--- b", "expected a single document"),
    "thousands of values": ("- a\n" * 22_000, "more than 20,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("attack", YAML_ATTACKS)
def test_yaml_that_asks_for_too_much_is_a_sentence_with_its_place(attack: str, tmp_path: Path) -> None:
    text, sentence = YAML_ATTACKS[attack]
    start = time.process_time()
    with pytest.raises(yaml.YAMLError, match=sentence):
        parse_yaml(text)
    assert time.process_time() - start < 10
    (tmp_path / "c.yaml").write_text(text)
    faults = Faults("c.yaml")
    assert read_settings(tmp_path / "c.yaml", {}, faults) is None
    [found] = faults.sentences
    assert len(found) < 400


def test_configurations_mean_what_they_meant() -> None:
    for path in [*ROOT.glob("trainconfig/*.yaml"), *ROOT.glob("logitconfig/*.yaml")]:
        assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    assert parse_yaml("a: &x {b: [1, 2.5, yes, ~]}\nc: *x\nd: {<<: *x, e: .inf}") == {
        "a": {"b": [1, 2.5, True, None]},
        "c": {"b": [1, 2.5, True, None]},
        "d": {"b": [1, 2.5, True, None], "e": math.inf},
    }
    assert parse_yaml("day: 2026-01-02") == {"day": "2026-01-02"}  # JSON could not hold a date


def test_a_file_that_is_no_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "big.yaml", "wb") as file:
        file.truncate(1 << 30)
    for path, sentence in ((tmp_path / "big.yaml", f"more than {MAX_YAML_BYTES:,} bytes"), ("/dev/zero", "more than")):
        faults = Faults("big")
        assert read_settings(path, {}, faults) is None
        assert sentence in faults.sentences[0]
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=f"more than {MAX_JSON_BYTES:,} bytes"):
        load_json(tmp_path / "big.json")


class _Numbers(Options):
    count: int = 1
    share: float = 0.5
    items: list[int] = []  # noqa: RUF012
    anything: Any = None


@pytest.mark.parametrize(
    "value", ["[" * 3000, "{a: " * 3000, "1" * 5000, "&a [*a]", "!!int ''", "2026-13-45", "a: b: c"]
)
def test_a_value_on_a_command_line_is_used_or_a_short_sentence(value: str) -> None:
    assert parse_value(value) == value
    for name in ("count", "share", "items"):
        faults = Faults("the command line")
        read_options(_Numbers, {name: value}, faults)
        assert [sentence.startswith(f"--{name} is ") and len(sentence) < 400 for sentence in faults.sentences] == [True]


JSON_ATTACKS = {
    "100,000 brackets": ("[" * 100_000, "nested deeper than 64"),
    "closed brackets": ("[" * 900 + "]" * 900, "nested deeper than 64"),
    "mappings": ('{"a":' * 900 + "1" + "}" * 900, "nested deeper than 64"),
    "5,000 digits": ('{"a": ' + "1" * 5000 + "}", "a number has 5000 digits"),
    "a number too large": ('{"a": 1e999}', "1e999 is too large"),
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' is there more than once"),
    "a list": ("[1]", "it holds a list, expected a mapping"),
    "a number": ("1", "it holds a number, expected a mapping"),
    "nothing": ("", "Expecting value"),
    "no text": ("\xff", "can't decode|Expecting value"),
}


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_json_that_asks_for_too_much_is_a_sentence(attack: str, tmp_path: Path) -> None:
    text, sentence = JSON_ATTACKS[attack]
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"x.json: cannot be read as JSON .*({sentence}).*; make it again"):
        read_json(tmp_path / "x.json", "make it again")


class _Record(BaseModel):
    count: int
    names: list[str] = []


def test_a_record_of_other_types_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"count": "many", "names": 3}')
    with pytest.raises(UserError, match=r"count is 'many': .*, names is 3: .*; make it again"):
        read_record(tmp_path / "x.json", _Record, "make it again")
    (tmp_path / "x.json").write_text('{"count": 2}')
    assert read_record(tmp_path / "x.json", _Record, "").count == 2


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PLAIN)
def test_what_json_writes_is_read_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps({"a": value})) == {"a": value}


def check_text(text: str) -> None:
    """A text is what PyYAML's and Python's own readers make of it, or refused."""
    for parse, reference, refusals in (
        (parse_yaml, yaml.safe_load, yaml.YAMLError),
        (parse_json, json.loads, ValueError),
    ):
        try:
            value = parse(text)
        except refusals:
            continue
        json.dumps(value)  # every later step can write it
        expected = reference(text)
        if parse is parse_json or "-" not in text:  # dates stay text
            assert value == expected


MARKS = [
    "- ",
    "\n",
    "  ",
    "\t",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "&x ",
    "*x",
    "<<: ",
    "'",
    '"',
    "|",
    ">",
    "#",
    "%",
    "---",
    "? ",
]
TAGS = ["!!int ", "!!str ", "!!set "]
VALUES = ["a", "b: ", "1", "1e3", "0x1f", "1:30", ".inf", ".nan", "~", "yes", "2026-01-01"]
LETTERS = ["\\", "\u2028", "\x85", "\x00", "\ufeff", "é"]
FRAGMENTS = st.sampled_from(MARKS + TAGS + VALUES + LETTERS)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(FRAGMENTS, max_size=12).map("".join))
def test_any_text_is_read_as_it_is_elsewhere_or_refused(text: str) -> None:
    check_text(text)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FRAGMENTS, max_size=25).map("".join))
def test_thousands_of_texts_are_read_as_they_are_elsewhere_or_refused(text: str) -> None:
    check_text(text)


PLAIN_VALUES = (None, True, -1, 0, 2**70, 1e300, -0.5, "", "x", "../x", ".inf", "[" * 100, "\x00", "é" * 300)
NESTED_VALUES: tuple[Any, ...] = ([], [1], ["x"], {}, {"x": 1}, [[[]]], {"x": {"y": []}})
ODD_VALUES = st.sampled_from(PLAIN_VALUES + NESTED_VALUES)


def check_config(kind: Any, folder: Path, changes: dict[str, Any]) -> None:
    """A configuration with changed values is one, or has sentences."""
    examples = ROOT / ("trainconfig" if kind is TrainConfig else "logitconfig")
    base = yaml.safe_load((examples / "own_teacher.yaml").read_text())
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(base | changes))
    faults = Faults("c.yaml")
    config = read_config(kind, path, {}, faults)
    assert faults.sentences or isinstance(config, kind)
    assert all(len(sentence) < 2000 for sentence in faults.sentences)


def changes_of(kind: Any) -> Any:
    return st.dictionaries(st.sampled_from([*kind.model_fields, "unknown"]), ODD_VALUES, min_size=1, max_size=3)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(train=changes_of(TrainConfig), store=changes_of(SoftTargetConfig))
def test_any_value_of_a_configuration_is_used_or_a_sentence(tmp_path_factory: Any, train: Any, store: Any) -> None:
    check_config(TrainConfig, tmp_path_factory.getbasetemp(), train)
    check_config(SoftTargetConfig, tmp_path_factory.getbasetemp(), store)


@pytest.mark.long
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(train=changes_of(TrainConfig), store=changes_of(SoftTargetConfig))
def test_thousands_of_configurations_are_used_or_sentences(tmp_path_factory: Any, train: Any, store: Any) -> None:
    check_config(TrainConfig, tmp_path_factory.getbasetemp(), train)
    check_config(SoftTargetConfig, tmp_path_factory.getbasetemp(), store)


def test_the_limit_of_depth_is_the_same_in_both() -> None:
    for depth, is_read in ((MAX_DEPTH - 1, True), (MAX_DEPTH + 1, False)):
        text = '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
        for parse, refusals in ((parse_yaml, yaml.YAMLError), (parse_json, ValueError)):
            try:
                parse(text)
                assert is_read
            except refusals:
                assert not is_read
