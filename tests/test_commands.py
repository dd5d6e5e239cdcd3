"""Command lines: help wherever it is asked for, and checks before anything runs."""

import sys

import pytest

from common.commands import run_commands
from run import Runner
from training.config import TrainConfig


@pytest.mark.parametrize("words", [["probe", "--help"], ["evaluate", "-h"], ["probe", "--", "--help"]])
def test_help_is_given_and_no_option(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_commands(Runner)
    assert stopped.value.code == 0
    message = capsys.readouterr()
    assert "SYNOPSIS" in message.out + message.err
    assert "unknown option" not in message.out + message.err


def get_help(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_commands(Runner, keys={"train": TrainConfig})
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_help_lists_the_commands(words, monkeypatch, capsys):
    message = get_help(monkeypatch, capsys, *words)
    for command in ("train", "config", "evaluate", "probe"):
        assert f"\n    {command} " in message
    assert "seed: of all random numbers of a run (default 42)" in message


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "mine.yaml", "--epochs", "3", "-h"]])
def test_the_help_of_a_command_lists_its_keys_and_runs_nothing(words, monkeypatch, capsys):
    message = get_help(monkeypatch, capsys, *words)
    assert "python run.py train CONFIG_FILE" in message
    assert "resume: `auto` (the default)" in message
    for name in TrainConfig.model_fields:
        assert f"\n    --{name} (" in message
    assert "--optimizer_args.lr 3e-4" in message


class Group:
    """Commands.

    Args:
        speed: of all.
    """

    ran: list = []  # noqa: RUF012 - one list for all

    def __init__(self, speed: int = 1) -> None:
        self.speed = speed

    def go(self, place: str, *, far: float = 1.0, how: str | None = None, quick: bool = False) -> None:
        self.ran.append((self.speed, place, far, how, quick))

    def go_anywhere(self, place: str = "here", **more: str) -> None:
        self.ran.append((place, more))


def run_group(monkeypatch, words):
    Group.ran.clear()
    monkeypatch.setattr(sys, "argv", ["group.py", *words.split()])
    run_commands(Group)
    return Group.ran


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ("go home", (1, "home", 1.0, None, False)),
        ("go --place home --far -2", (1, "home", -2, None, False)),
        ("go home --far=3e-4 --quick", (1, "home", 3e-4, None, True)),
        ("go home --how None --speed 3", (3, "home", 1.0, None, False)),
        ("--speed 2 go home --how on-foot", (2, "home", 1.0, "on-foot", False)),
        ("go_anywhere", ("here", {})),
        ("go-anywhere there --some-thing x", ("there", {"some_thing": "x"})),
    ],
)
def test_command_lines_that_are_right_run_as_they_are(words, ran, monkeypatch):
    assert run_group(monkeypatch, words) == [ran]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "COMMANDS"),
        ("go", "PLACE is not given; expected python group.py go PLACE"),
        ("run home", "there is no command 'run'; expected python group.py go | go_anywhere"),
        ("go home again", "'again' is not an argument; expected"),
        ("go home far=2", "'far=2' is not an argument (did you mean --far 2?)"),
        ("go home --fat 2", "unknown option --fat (did you mean 'far'?)"),
        ("go home --far away", "--far is 'away'; expected a number"),
        ("go home --far True", "--far is 'True'; expected a number"),
        ("go home --how", "--how is given without a value"),
        ("go home --speed 1.5", "--speed is '1.5'; expected a whole number"),
    ],
)
def test_command_lines_that_are_wrong_run_nothing(words, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_group(monkeypatch, words)
    message = capsys.readouterr()
    assert sentence in message.out + message.err
    assert Group.ran == []
