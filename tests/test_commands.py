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
