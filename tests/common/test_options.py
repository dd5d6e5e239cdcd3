"""Typed options: what a command line or a configuration becomes, and what is said of mistakes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from common.errors import Faults
from common.options import MergingOption, Options, parse_arguments, parse_value, read_options


class Small(Options):
    """Some options."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("sounds",)
    SHORT: ClassVar[dict[str, str]] = {"model": "m"}
    MANY: ClassVar[tuple[str, ...]] = ("labels",)

    sounds: list[str] = Field([])  # files
    model: str  # a name
    pattern: str = ""  # of names
    widths: list[Annotated[int, Field(ge=1)]] | None = None  # of layers
    share: float = Field(0.2, ge=0, lt=1)  # of the clips
    kind: Literal["csv", "json"] | None = None  # of output
    quick: bool = False  # leave something out
    names: str | list[str] | None = None  # one or several
    merging: MergingOption = None  # of tokens
    folder: Path | None = None  # for output
    labels: list[str] = Field([])  # to choose

    def conflicts(self):
        """Yield a sentence for what cannot be combined."""
        if self.quick and self.share > 0.5:
            yield "--quick cannot be combined with a --share above 0.5"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.wav b.wav -m x", {"sounds": ["a.wav", "b.wav"], "model": "x"}),
        ("a.wav -m x b.wav", {"sounds": ["a.wav", "b.wav"], "model": "x"}),
        ("-m x --quick a.wav", {"sounds": ["a.wav"], "model": "x", "quick": True}),
        ("a.wav --quick false --model=x", {"sounds": ["a.wav"], "model": "x", "quick": False}),
        ("-m 2024 --pattern {label}_{}.wav", {"model": "2024", "pattern": "{label}_{}.wav"}),
        ("-m x --pattern 1,2", {"model": "x", "pattern": "1,2"}),
        ("-m x --widths 512,256", {"model": "x", "widths": [512, 256]}),
        ("-m x --widths 9 --share 3e-1", {"model": "x", "widths": [9], "share": 0.3}),
        ("-m x --widths null --kind csv", {"model": "x", "widths": None, "kind": "csv"}),
        ("-m x --names a,b", {"model": "x", "names": ["a", "b"]}),
        ("-m x --names 01", {"model": "x", "names": "01"}),
        ("-m x --folder 2024", {"model": "x", "folder": Path("2024")}),
        ("-m x --folder 2024-01-01,b", {"model": "x", "folder": Path("2024-01-01,b")}),
        ("-m x --merging 16", {"model": "x", "merging": 16}),
        (
            "a.wav -m x --labels a,b c --quick",
            {"sounds": ["a.wav"], "model": "x", "labels": ["a,b", "c"], "quick": True},
        ),
        ("--labels=a --labels b -m x c.wav", {"sounds": ["c.wav"], "model": "x", "labels": ["a", "b"]}),
        ("-m x --merging 16,-1", {"model": "x", "merging": [16, -1]}),
    ],
)
def test_a_command_line_becomes_typed_options(words, expected):
    options = parse_arguments(Small, "About.", words.split())
    assert options.model_dump(exclude_unset=True) == expected


def test_mappings_are_yaml():
    merging = parse_value("{r: [8, -1], proportional: false}", MergingOption)
    assert merging == {"r": [8, -1], "proportional": False}
    assert parse_value("[a, null]", str | list[str | None]) == ["a", None]
    assert parse_value("{r: [8", MergingOption) == "{r: [8"
    assert parse_value("true", bool | str | None) is True
    assert parse_value("path.pt", bool | str | None) == "path.pt"


def test_every_fault_is_in_one_message_and_nothing_runs(capsys):
    words = ["--shares", "0.3", "--kind", "cvs", "--share", "much", "--widths", "3,x", "--pattern"]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Small, "About.", words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "has 1 fault" in message or "expected one argument" in message  # argparse: a value is missing
    with pytest.raises(SystemExit):
        parse_arguments(Small, "About.", words[:-1])
    message = capsys.readouterr().err
    for part in (
        "has 5 faults",
        "unknown option --shares (did you mean 'share'?)",
        "--kind is 'cvs'; expected csv or json or null (did you mean 'csv'?)",
        "--share is 'much'; expected number, at least 0, below 1",
        "--widths is 'x'; expected list of whole number, at least 1 or null",
        "--model is missing: a name",
        "--help lists all options",
    ):
        assert part in message


def test_conflicts_are_reported_beside_wrong_values_that_become_defaults():
    faults = Faults("the command")
    options = read_options(Small, {"model": "x", "quick": True, "share": 0.7, "widths": "0"}, faults)
    assert faults.sentences == [
        "--widths is 0; expected list of whole number, at least 1 or null",
        "--quick cannot be combined with a --share above 0.5",
    ]
    assert options is not None
    assert options.widths is None


def test_values_of_a_file_are_taken_as_they_are():
    faults = Faults("the file")
    given: dict[str, Any] = {"model": "x", "names": "runs/a,b"}
    assert read_options(Small, given, faults, parse=False).names == "runs/a,b"
    assert read_options(Small, given, faults).names == ["runs/a", "b"]
    assert not faults.sentences


def test_the_help_of_a_script_has_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Small, "About sounds.", ["a.wav", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "About sounds." in text
    assert "-m VALUE, --model VALUE a name (text; must be given)" in text
    assert "of the clips (number, at least 0, below 1; default 0.2)" in text
