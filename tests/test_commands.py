"""Help wherever it is asked for."""

import sys

import pytest

from common.commands import run_commands
from run import Runner


@pytest.mark.parametrize("words", [["probe", "--help"], ["evaluate", "-h"], ["probe", "--", "--help"]])
def test_help_is_given_and_no_option(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_commands(Runner)
    assert stopped.value.code == 0
    told = capsys.readouterr()
    assert "SYNOPSIS" in told.out + told.err
    assert "unknown option" not in told.out + told.err


@pytest.mark.parametrize("words", [["{a}", "--to", "1,2"], ["{a}", "--to=1,2"], ["--to", "1,2", "--name={a}"]])
def test_values_stay_text_where_wanted(words, monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["command.py", *words])
    run_commands(lambda name, to=None, flag=False: given.append((name, to, flag)), as_text=True)
    assert given == [("{a}", "1,2", False)]
